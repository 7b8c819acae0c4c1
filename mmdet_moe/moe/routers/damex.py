"""DAMEX: a learned router that is taught the expert of each item's dataset."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmdet_moe.moe.registry import ROUTERS, build_router
from mmdet_moe.moe.routers.base import Router
from mmdet_moe.moe.routers.plan import PlanRouter
from mmdet_moe.moe.routing import Routing, RoutingContext, to_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmdet_moe.moe.layer import MoELayer
    from mmdet_moe.planning import ExpertPlan

UNKNOWN = ('ignore', 'error')
#: What layers and balance losses ask of a router, and the inner one answers.
INHERITED = (
    'needs_maps', 'needs_embeddings', 'has_probabilities', 'granularity', 'granularities',
    'k', 'renormalize',
)  # fmt: skip


@ROUTERS.register
class DAMEXRouter(Router):
    r"""Any learned router, supervised by a plan in training.

    .. math:: L = - w \frac{1}{T} \sum_t \sum_e W_{d(t), e} \ln \mathrm{softmax}(\ell_t)_e

    with d(t) the dataset of the item's image, W the plan's weights (a row with several experts is a
    soft target) and w ``weight``. In the paper the table is a dict made by hand, here it is a GEM
    plan. Each item's target comes from its own image, so any batch size and both granularities
    work. At test no domain is needed: the inner router routes.

    The inner router must score the plan's experts for each item: Soft MoE (which selects nothing)
    and MoE++ (which has free experts beside them) are refused.

    Items whose domain is not told, or not in the plan, teach nothing ('ignore'); the mean is over
    the others. An expert that a balancing constraint blocks in a batch is not taught in it.

    Args:
        plan: As ``PlanRouter``'s.
        router: Dict of the learned router, e.g. ``dict(type='CosineRouter')``.
        in_channels: d.
        num_experts: To check against the plan's; by default the plan's.
        weight: w; in the log as ``loss_moe_damex``.
        unknown: 'ignore' or 'error', in training.

    Source: Jain et al. 2023 (DAMEX, arXiv 2311.04894), eq. 5.
    """

    def __init__(
        self,
        plan: str | Mapping[str, Any] | ExpertPlan,
        router: Mapping[str, Any] | Router,
        in_channels: int,
        num_experts: int | None = None,
        *,
        weight: float = 0.1,
        unknown: str = 'ignore',
    ) -> None:
        if unknown not in UNKNOWN:
            raise ValueError(f'DAMEXRouter: unknown must be one of {UNKNOWN}, got {unknown!r}')
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f'DAMEXRouter: weight must be >= 0, got {weight}')
        table = PlanRouter(plan, num_experts=num_experts)
        super().__init__(table.num_experts)
        self.plan = table
        self.inner: Router = build_router(
            router, in_channels=in_channels, num_experts=table.num_experts
        )
        if not self.inner.learned or self.inner.num_experts != table.num_experts:
            raise ValueError(
                f'DAMEXRouter: the router must be a learned one of the {table.num_experts} experts '
                f'of the plan, got {self.inner!r}'
            )
        if not self.inner.selects or len(self.inner.extra_experts):
            raise ValueError(
                f'DAMEXRouter: {type(self.inner).__name__} does not score the {table.num_experts} '
                f'experts of the plan, and no others, for each item: the plan cannot supervise it'
            )
        self.weight = weight
        self.unknown = unknown
        for what in INHERITED:
            if hasattr(self.inner, what):
                setattr(self, what, getattr(self.inner, what))

    @property
    def keeps_dense_function(self) -> bool:
        return self.inner.keeps_dense_function

    @property
    def noise(self) -> str | None:
        """The inner router's."""
        return getattr(self.inner, 'noise', None)

    def weigh(self, logits: Tensor, experts: Tensor) -> Tensor:
        return self.inner.weigh(logits, experts)

    def attach(self, layer: MoELayer) -> None:
        self.inner.attach(layer)

    def reset_parameters(self) -> None:
        self.inner.reset_parameters()

    def check_datasets(self, domains: Sequence[str], held_out: bool = False) -> None:
        self.plan.check_datasets(domains, held_out)

    def forward(self, items: Tensor | None, context: RoutingContext) -> Routing:
        routing = self.inner(items, context)
        assert isinstance(routing, Routing)
        if context.training:
            if routing.logits is None:
                raise ValueError(f'{type(self.inner).__name__} gives no logits to supervise')
            routing.losses['damex'] = self.weight * self._loss(routing.logits, context)
        return routing

    def _loss(self, logits: Tensor, context: RoutingContext) -> Tensor:
        weights, known = self.plan.told_weights(context)
        if self.unknown == 'error' and not bool(known.all()):
            image = int((~known).nonzero()[0])
            names = context.state.domains or [None] * len(known)
            raise ValueError(
                f'image {image} of the batch, domain {names[image]!r}: not one of the datasets of '
                f'the plan: {list(self.plan.datasets)}'
            )
        weights = to_device(weights, logits.device, logits.dtype)
        if context.items_per_image != 1:
            weights = weights.repeat_interleave(context.items_per_image, dim=0)
        return soft_cross_entropy(logits, weights)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -sum_e target · ln softmax over the items that have a target; 0 where none has.

    Args:
        logits: (T, E); an expert at -inf counts for nothing.
        targets: (T, E), rows summing to 1, or to 0 for items without a target.
    """
    log_p = logits.log_softmax(1).masked_fill(logits.isneginf(), 0.0)
    number = (targets.sum(1) > 0).sum().clamp(min=1)
    return -torch.sum(targets * log_p) / number


__all__ = ['DAMEXRouter', 'soft_cross_entropy']
