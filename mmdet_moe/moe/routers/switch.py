"""Switch and GShard: softmax over all experts, then the k best."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmdet_moe.moe.registry import ROUTERS
from mmdet_moe.moe.routers.gated import SelectingRouter, chosen_entries
from mmdet_moe.moe.routing import Routing, RoutingContext

SECONDS = ('all', 'random')


@ROUTERS.register
class SwitchRouter(SelectingRouter):
    r"""The k largest entries of the softmax over all E; no noise.

    .. math:: p = \mathrm{softmax}(\ell), \qquad
        w_{te} = p_{te} \;\text{(k = 1)}, \qquad
        w_{te} = \frac{p_{te}}{\sum_{e' \text{ chosen}} p_{te'} + 10^{-9}} \;\text{(renormalised)}

    With ``second='random'`` every choice j after the first is kept, in training, with probability
    :math:`\min(1, w_j / \mathrm{threshold})`; what is left is not normalised again, so that the
    expected weight of a weak second choice is small twice over, as in GShard. In evaluation all
    choices are kept. Goes with ``SwitchLoss``.

    Args:
        in_channels: d.
        num_experts: E.
        k: Experts per item.
        second: 'all' or 'random'.
        threshold: See above.
        options: Of :class:`~mmdet_moe.moe.routers.gated.SelectingRouter` and ``GatedRouter``.

    Source: Fedus et al. 2022 (Switch Transformer, arXiv 2101.03961), eq. 1-2; Lepikhin et al. 2021
    (GShard, arXiv 2006.16668), algorithm 1.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        k: int = 1,
        *,
        second: str = 'all',
        threshold: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, num_experts, k, **options)
        if second not in SECONDS:
            raise self.refusal(f'second must be one of {SECONDS}, got {second!r}')
        if not threshold > 0:
            raise self.refusal(f'threshold must be > 0, got {threshold}')
        self.second = second
        self.threshold = threshold
        self.reset_parameters()

    @property
    def keeps_dense_function(self) -> bool:
        return super().keeps_dense_function and (self.second == 'all' or self.k == 1)

    def weigh(self, logits: Tensor, experts: Tensor) -> Tensor:
        """Their entries of the softmax over all E, with ``renormalize`` scaled to sum to 1."""
        return chosen_entries(logits.softmax(1), experts, self.renormalize)

    def route(self, x: Tensor, logits: Tensor, context: RoutingContext) -> Routing:
        logits = context.constrain(logits)
        p = logits.softmax(1)
        indices = p.topk(self.k, dim=1).indices
        weights = chosen_entries(p, indices, self.renormalize)
        dropping = self.second == 'random' and context.training and self.k > 1
        if dropping:
            kept = torch.rand_like(weights) * self.threshold < weights.detach()
            kept[:, 0] = True
            indices = torch.where(kept, indices, -1)
        return self.assign(
            weights, indices, context, dropping=dropping, logits=logits, probabilities=p
        )


@ROUTERS.register
class GShardRouter(SwitchRouter):
    """:class:`SwitchRouter` with GShard's settings: two experts, the second one at random.

    Args:
        in_channels: d.
        num_experts: E.
        k: Experts per item; the same with more than two is ST-MoE's top-n.
        second: 'all' or 'random'.
        options: As :class:`SwitchRouter`'s.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        k: int = 2,
        *,
        second: str = 'random',
        **options: Any,
    ) -> None:
        super().__init__(in_channels, num_experts, k, second=second, **options)
