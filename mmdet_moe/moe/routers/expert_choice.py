"""Expert choice: every expert takes the items that suit it best."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from mmdet_moe.moe.registry import ROUTERS
from mmdet_moe.moe.routers.gated import GatedRouter, expert_capacity
from mmdet_moe.moe.routing import Routing, RoutingContext

GROUPS = ('image', 'batch')


@ROUTERS.register
class ExpertChoiceRouter(GatedRouter):
    r"""Each expert takes its C best of N items, so that the load is even by construction.

    .. math:: S = \mathrm{softmax}_e(\ell) \in \mathbb{R}^{N \times E}, \qquad
        C = \min(N, \lceil c N / E \rceil), \qquad
        w_{te} = S_{te} \;\text{where t is among the C largest of column e}

    An item can be taken by several experts, or by none: then it gives zeros, which suits a module
    with a residual around it. Groups of N: the tokens of one image, so that an image's result does
    not depend on the rest of its batch; or the whole batch, the only possibility where the items
    are images.

    Args:
        in_channels: d.
        num_experts: E.
        capacity_factor: c, the mean number of experts per item.
        test_capacity_factor: c in evaluation; None: as in training.
        group: 'image', 'batch', or None for images where the items are tokens.
        options: Of :class:`~mmdet_moe.moe.routers.gated.GatedRouter`.

    Source: Zhou et al. 2022 (arXiv 2202.09368), section 3.2, eq. 1-2.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        capacity_factor: float = 2.0,
        *,
        test_capacity_factor: float | None = None,
        group: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, num_experts, **options)
        test = capacity_factor if test_capacity_factor is None else test_capacity_factor
        for factor in (capacity_factor, test):
            if not (math.isfinite(factor) and factor > 0):
                raise self.refusal(f'a capacity factor must be > 0, got {factor}')
        if group is not None and group not in GROUPS:
            raise self.refusal(f'group must be None or one of {GROUPS}, got {group!r}')
        self.capacity_factor = capacity_factor
        self.test_capacity_factor = test
        self.group = group
        self.reset_parameters()

    def weigh(self, logits: Tensor, experts: Tensor) -> Tensor:
        """The entries of the softmax over all E."""
        return logits.softmax(1).gather(1, experts)

    def route(self, x: Tensor, logits: Tensor, context: RoutingContext) -> Routing:
        logits = context.constrain(logits)
        p = logits.softmax(1)
        factor = self.capacity_factor if context.training else self.test_capacity_factor
        per_group = context.num_items
        if self.group == 'image' or (self.group is None and context.items_per_image > 1):
            per_group = context.items_per_image
        groups = context.num_items // per_group if per_group else 0
        taken = expert_capacity(per_group, self.num_experts, 1, factor)
        scores = p.view(groups, per_group, self.num_experts)
        weights, places = scores.topk(taken, dim=1)  # (G, C, E)
        offsets = per_group * places.new_ones(groups).cumsum(0) - per_group
        items = (places + offsets.view(-1, 1, 1)).permute(2, 0, 1).reshape(-1)
        experts = items.new_ones(self.num_experts).cumsum(0) - 1
        # A constraint has closed the experts at -inf: they take nothing, not even with weight 0.
        experts = experts.masked_fill(logits.isneginf().all(0), -1)
        return Routing.from_pairs(
            items,
            experts.repeat_interleave(groups * taken),
            weights.permute(2, 0, 1).reshape(-1),
            context.num_items,
            self.num_experts,
            logits=logits,
            probabilities=p,
        )
