"""ReMoE: ReLU gates, as many experts per item as it needs, held to k on average."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmdet_moe.moe.registry import ROUTERS
from mmdet_moe.moe.routers.gated import GatedRouter
from mmdet_moe.moe.routing import Routing, RoutingContext
from mmdet_moe.moe.state import RoutingState

#: The coefficient stays between these, so that it can always come back.
COEFFICIENTS = (1e-20, 1e6)


@ROUTERS.register
class ReMoERouter(GatedRouter):
    r"""Every expert whose logit is positive, with the logit as its weight.

    .. math::
        w_{te} &= \mathrm{ReLU}(\ell_{te}) \\
        L &= \lambda_i \, \frac{1}{T} \sum_{t,e} f_e\, w_{te}, \qquad
        f_e = \frac{E}{k T} \sum_t \mathbb{1}[w_{te} > 0] \\
        \lambda_{i+1} &= \lambda_i \cdot \alpha^{\,\mathrm{sign}((1 - k/E) - S_i)}

    with :math:`S_i` the share of zero weights in step i over all ranks, :math:`\lambda_0 = 10^{-8}`
    and :math:`\alpha = 1.2`; :math:`f_e = 1` without ``balanced``. Each layer holds its own
    sparsity: with one coefficient for all, a layer can go silent while another is dense. lambda
    is a buffer, moves when the losses are collected (once per forward, however often the layer is
    called) and is in the log as ``<layer>/coefficient``.

    An item without a positive logit gives zeros. k only sets the target: there is no top-k.

    Args:
        in_channels: d.
        num_experts: E.
        target: k, the mean number of experts per item to hold.
        coefficient: lambda_0.
        factor: alpha.
        balanced: Weigh an expert's weights by its use, f_e.
        options: Of :class:`~mmdet_moe.moe.routers.gated.GatedRouter`.

    Source: Wang et al. 2025 (ReMoE, arXiv 2412.14711), eq. 5-11. There the sparsity is
    averaged over the layers.
    """

    has_probabilities = False
    coefficient: Tensor

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        target: float = 1.0,
        *,
        coefficient: float = 1e-8,
        factor: float = 1.2,
        balanced: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, num_experts, **options)
        if not 0 < target <= num_experts:
            raise self.refusal(f'target must be in (0, {num_experts}] experts, got {target}')
        if not COEFFICIENTS[0] <= coefficient <= COEFFICIENTS[1]:
            raise self.refusal(f'coefficient must be in {COEFFICIENTS}, got {coefficient}')
        if not (math.isfinite(factor) and factor > 1):
            raise self.refusal(f'factor must be > 1, got {factor}')
        self.target = target
        self.factor = factor
        self.balanced = balanced
        self.initial_coefficient = coefficient
        self.register_buffer('coefficient', torch.tensor(coefficient))
        # [pairs, entries] of the current forward; settled before a checkpoint can be written.
        self._seen: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.coefficient.fill_(self.initial_coefficient)

    def weigh(self, logits: Tensor, experts: Tensor) -> Tensor:
        """The ReLU of each logit."""
        return logits.gather(1, experts).relu()

    def route(self, x: Tensor, logits: Tensor, context: RoutingContext) -> Routing:
        logits = context.constrain(logits)
        weights = logits.relu()
        losses: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        if context.training:
            # Fixed for this forward: a recomputation comes after the buffer has moved.
            coefficient = context.state.cached((id(self), 'lambda'), self.coefficient.clone)
            losses['remoe'] = coefficient * l1_loss(weights, self.target, self.balanced)
            if not context.recompute:
                self._count(weights.detach())
            stats['coefficient'] = coefficient
        # No probabilities: its gates are the weights, which balance losses then take.
        return Routing.from_dense(weights, logits=logits, losses=losses, stats=stats)

    def _count(self, weights: Tensor) -> None:
        pairs = (weights > 0).sum().double()
        seen = torch.stack([pairs, pairs.new_tensor(float(weights.numel()))])
        self._seen = seen if self._seen is None else self._seen + seen

    @torch.no_grad()
    def settle(self, state: RoutingState) -> None:
        """Move the coefficient by what this forward saw; every rank calls it."""
        if not self.training:
            self._seen = None
            return
        seen, self._seen = self._seen, None
        if seen is None:
            seen = torch.zeros(2, dtype=torch.float64, device=self.coefficient.device)
        dist = torch.distributed
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(seen)
        step = sparsity_step(seen[0], seen[1], self.target / self.num_experts)
        moved = self.coefficient.double() * self.factor**step
        self.coefficient.copy_(moved.clamp(*COEFFICIENTS))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_seen': None}


# Pure functions


def l1_loss(weights: Tensor, target: float, balanced: bool = True) -> Tensor:
    """Mean over items of their weights' sum, each expert's times its use; 0 for no items.

    Args:
        weights: (T, E), not negative.
        target: k.
        balanced: Whether to weigh by use: E / (k T) times the number of items an expert has.
    """
    num_items, num_experts = weights.shape
    if not num_items:
        return weights.sum() * 0.0
    means = weights.mean(0)
    if balanced:
        means = means * (weights > 0).to(means.dtype).mean(0) * (num_experts / target)
    return means.sum()


def sparsity_step(pairs: Tensor, entries: Tensor, density: float) -> Tensor:
    """Sign of (1 - density) - S, with S = 1 - pairs / entries: +1 where too many experts are on;
    0 where nothing was seen."""
    return (pairs - density * entries).sign()
