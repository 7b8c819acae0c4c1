r"""Hard constraints: an expert that got too much gets nothing from the next batch.

The importance of expert e in a batch is the sum of its combine weights,
:math:`I_e = \sum_b w_{be}`: over all calls of the layer in one forward (the levels of a head) and
over all ranks.

**When.** Which experts are closed is decided once per forward, from the buffers. The account moves
once per forward too, in :meth:`RoutingState.collect`: every rank comes there, also one on which the
layer had no item or did not run, so that the reduction waits for nobody. It moves in training only,
and not again when activation checkpointing recomputes, where the same experts are closed as in the
first pass. A forward that is not collected does not count, nor does one without an item on any
rank, or with weights that are not finite.

**Never all.** At least ``min_open`` experts stay open, by default one: those with the least
account, of lower number among equals. A router that takes k experts per item then gets fewer where
fewer are open: a closed expert has weight 0 and its pairs are dropped. If k always stayed open, a
starved expert would have to share every item with k - 1 rivals that are over the threshold, and the
relative constraint could not balance a router that insists. With several constraints
in one list, a later one counts what the earlier ones have closed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

from mmdet_moe.moe.balance.base import BalanceLoss, weight_sums
from mmdet_moe.moe.registry import BALANCE
from mmdet_moe.moe.routing import Routing, RoutingContext

if TYPE_CHECKING:
    from mmdet_moe.moe.state import RoutingState


class ImportanceConstraint(BalanceLoss):
    """Closes experts whose account is over a threshold.

    A subclass keeps the account in buffers, and implements :meth:`account` and :meth:`update`.

    Args:
        threshold: An expert is closed while its account is greater.
        num_experts: E; the layer fills it in.
        min_open: Experts that stay open at least.
    """

    closes = True

    def __init__(self, threshold: float, num_experts: int, min_open: int = 1) -> None:
        super().__init__(weight=0.0)
        if not math.isfinite(threshold) or threshold < 0:
            raise ValueError(f'{type(self).__name__}: threshold must be >= 0, got {threshold}')
        if not 1 <= min_open <= num_experts:
            raise ValueError(
                f'{type(self).__name__}: min_open must be 1 to {num_experts}, got {min_open}'
            )
        self.threshold = threshold
        self.num_experts = num_experts
        self.min_open = min_open

    def account(self) -> Tensor:
        """(E,) what is compared with the threshold."""
        raise NotImplementedError

    def update(self, share: Tensor) -> None:
        """Book one batch: share (E,), I_e / sum_j I_j."""
        raise NotImplementedError

    def check(self, router: nn.Module) -> None:
        super().check(router)
        experts = getattr(router, 'num_experts', self.num_experts)
        if experts != self.num_experts:
            raise ValueError(
                f'{type(self).__name__} is for {self.num_experts} experts, the router has {experts}'
            )
        if len(getattr(router, 'extra_experts', ())):
            raise ValueError(
                f'{type(self).__name__} evens out all experts, {type(router).__name__} has free '
                f'ones, which are meant to get another share'
            )

    @torch.no_grad()
    def blocked(self, closed: Tensor | None = None) -> Tensor:
        """(E,) bool: the experts closed in the next forward, at most E - min_open.

        Args:
            closed: (E,) bool, those that others have closed, at most E - min_open.
        """
        account = self.account()
        over = account > self.threshold
        if closed is not None:
            account = account.masked_fill(closed, torch.inf)
        return over.index_fill(0, account.argsort(stable=True)[: self.min_open], False)

    def constrain(self, logits: Tensor, context: RoutingContext) -> Tensor:
        """-inf for closed experts, in training."""
        if not context.training:
            return logits
        if logits.shape[1:] != (self.num_experts,):
            raise ValueError(
                f'{type(self).__name__} at {context.layer!r}: logits must have shape '
                f'(T, {self.num_experts}), got {tuple(logits.shape)}'
            )
        return logits.masked_fill(self._mask(context), -torch.inf)

    def _mask(self, context: RoutingContext) -> Tensor:
        """This forward's :meth:`blocked`, the same in all its calls and recomputations."""

        def decide() -> Tensor:
            closed = torch.zeros(self.num_experts, dtype=torch.bool, device=self.account().device)
            for other in context.balance:
                if other is self:
                    break
                if isinstance(other, ImportanceConstraint):
                    closed = closed | other._mask(context)
            return self.blocked(closed)

        return context.state.cached((self, 'blocked'), decide)

    # Without gradients, also because a checkpoint compares what the two passes save for them.
    @torch.no_grad()
    def forward(self, routing: Routing, context: RoutingContext) -> dict[str, Tensor]:
        """Add to this forward's importance; no loss."""

        def never_asked() -> NoReturn:
            raise ValueError(
                f'{type(self).__name__} at {context.layer!r}: the router lets nobody constrain it '
                f'(it never calls context.constrain); use another router or a balance loss'
            )

        if context.num_items:
            context.state.cached((self, 'blocked'), never_asked)
        if not context.recompute:
            importance = self._importance(context.state)
            importance += weight_sums(routing, context).to(importance)
        return {}

    def _importance(self, state: RoutingState) -> Tensor:
        """(E,) I of this forward so far, on this rank."""
        return state.cached((self, 'importance'), lambda: torch.zeros_like(self.account()))

    @torch.no_grad()
    def settle(self, state: RoutingState) -> None:
        if not self.training:
            return
        importance = self._importance(state)
        dist = torch.distributed
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(importance)
        self.update(importance / importance.sum())

    def extra_repr(self) -> str:
        return f'threshold={self.threshold}'


@BALANCE.register
class RelativeImportanceConstraint(ImportanceConstraint):
    r"""Closes an expert while its accumulated excess over an even share is above the threshold.

    .. math:: R_e \leftarrow R_e + \frac{I_e - \bar I}{\bar I}, \quad
        \text{closed in the next batch if } R_e > m

    with :math:`\bar I` the mean over experts, which is B/E where the weights of each item sum to 1.
    R is never reset, and sums to 0. It is an integral controller: R stays bounded, hence after n
    batches each expert's mean share is 1/E up to O(1/n), however the router wishes.

    State dict: ``relative`` (E,).

    Args:
        threshold: m; 0.5 for classification, 0.3 for RetinaNet in the paper.
        num_experts: E; the layer fills it in.
        min_open: Experts that stay open at least.

    Source: Pavlitska et al. (arXiv 2204.10598), hard constraint "relative importance".
    """

    relative: Tensor

    def __init__(self, threshold: float = 0.5, *, num_experts: int, min_open: int = 1) -> None:
        super().__init__(threshold, num_experts, min_open)
        self.register_buffer('relative', torch.zeros(num_experts))

    def account(self) -> Tensor:
        return self.relative

    def update(self, share: Tensor) -> None:
        excess = self.num_experts * share - 1.0
        self.relative += torch.where(share.isfinite().all(), excess, 0.0)


@BALANCE.register
class MeanImportanceConstraint(ImportanceConstraint):
    r"""Closes an expert while its mean share is above an even one by more than the threshold.

    .. math:: M_e \leftarrow M_e + \frac1n \Big(\frac{I_e}{\sum_j I_j} - M_e\Big), \quad
        \text{closed in the next batch if } M_e - \frac1E > m

    the mean over all n batches so far, each with equal weight; the share is I_e / B where the
    weights of each item sum to 1. It only caps, at 1/E + m; below that it asks nothing.

    State dict: ``mean`` (E,) and ``batches`` (), a count.

    Args:
        threshold: m; 0.3 in the paper. Without effect where 1/E + m >= 1.
        num_experts: E; the layer fills it in.
        min_open: Experts that stay open at least.

    Source: Pavlitska et al. (arXiv 2204.10598), hard constraint "mean importance".
    """

    mean: Tensor
    batches: Tensor

    def __init__(self, threshold: float = 0.3, *, num_experts: int, min_open: int = 1) -> None:
        super().__init__(threshold, num_experts, min_open)
        self.register_buffer('mean', torch.zeros(num_experts))
        self.register_buffer('batches', torch.zeros((), dtype=torch.long))

    def account(self) -> Tensor:
        return self.mean - 1.0 / self.num_experts

    def update(self, share: Tensor) -> None:
        counts = share.isfinite().all()
        self.batches += counts
        change = (share - self.mean) / self.batches.clamp(min=1.0)
        self.mean += torch.where(counts, change, 0.0)
