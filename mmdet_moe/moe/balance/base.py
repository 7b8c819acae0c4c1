"""What may stand in a layer's ``balance`` list, and what the members have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmdet_moe.moe.routing import Routing, RoutingContext, to_device

if TYPE_CHECKING:
    from mmdet_moe.moe.state import RoutingState

#: What a loss may be taken of.
GATES = ('probabilities', 'weights')
#: Stands for 0 inside a logarithm, so that neither p ln p nor its gradient is NaN at p = 0.
TINY = 1e-30


class BalanceLoss(nn.Module):
    """Base of what may stand in a layer's ``balance`` list.

    A subclass implements :meth:`forward`. One that acts on the logits before the selection (a
    constraint) overrides :meth:`constrain`, keeps its running state in buffers, and moves it in
    :meth:`settle`. One object belongs to one layer.

    Args:
        weight: Factor of the loss.
    """

    #: Key of the loss in the log: ``loss_moe_<name>``.
    name = ''
    #: Whether it may put the logits of an expert to -inf.
    closes: bool = False
    #: Whether it is a loss of the router's probabilities, which not every router has.
    needs_probabilities: bool = False

    def __init__(self, weight: float = 0.01) -> None:
        super().__init__()
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f'{type(self).__name__}: weight must be >= 0, got {weight}')
        self.weight = weight
        self._taken = False

    def check(self, router: nn.Module) -> None:
        """Take ``router``'s layer as this loss's own, when the layer is built.

        Raises:
            ValueError: If this loss can do nothing for the router, or has a layer already.
        """
        if self._taken:
            raise ValueError(
                f'this {type(self).__name__} balances another layer already; give each layer its '
                f'own, or a dict'
            )
        self._taken = True
        if self.needs_probabilities and not getattr(router, 'has_probabilities', True):
            raise ValueError(
                f'{type(self).__name__} is a loss of probabilities, which {type(router).__name__} '
                f'has not'
            )

    def forward(self, routing: Routing, context: RoutingContext) -> dict[str, Tensor]:
        """The weighted losses of one routing, scalars by name."""
        raise NotImplementedError

    def constrain(self, logits: Tensor, context: RoutingContext) -> Tensor:
        """Change (T, E) logits before the router selects; the identity here."""
        return logits

    def settle(self, state: RoutingState) -> None:
        """The forward is over (:meth:`RoutingState.collect`), on every rank; nothing here."""

    def extra_repr(self) -> str:
        return f'weight={self.weight}'


@dataclass
class _Running:
    """What the calls of one forward have added up to so far."""

    sums: Tensor | None = None
    loss: Tensor | None = None


class SummedLoss(BalanceLoss):
    r"""A loss of sums over items, taken over all calls of the layer in one forward together.

    A head that runs on five FPN levels calls its layer five times. Balancing each level by itself
    would forbid experts to specialise on levels, so the sums S of the calls are added before the
    loss L is taken. Call n hands out what it adds,

    .. math:: L(S_1 + \dots + S_n) - L(S_1 + \dots + S_{n-1}),

    which adds up to the loss of the whole forward, gradients included. A recomputation under
    activation checkpointing takes L at the forward's full sums, with the gradient of its own call.

    A subclass implements :meth:`sums` and :meth:`value`.
    """

    def sums(self, routing: Routing, context: RoutingContext) -> Tensor:
        """(S,) whatever :meth:`value` needs, additive over items, at least float32."""
        raise NotImplementedError

    def value(self, sums: Tensor) -> Tensor:
        """The unweighted loss, a scalar, of summed :meth:`sums`."""
        raise NotImplementedError

    def forward(self, routing: Routing, context: RoutingContext) -> dict[str, Tensor]:
        mine = self.sums(routing, context)
        known = context.state.cached(self, _Running)
        if context.recompute:
            others = 0.0 if known.sums is None else known.sums.detach() - mine.detach()
            return {self.name: self.weight * self.value(mine + others)}
        sums = mine if known.sums is None else mine + known.sums
        loss = self.weight * self.value(sums)
        added = loss if known.loss is None else loss - known.loss
        known.sums, known.loss = sums, loss
        return {self.name: added}

    def settle(self, state: RoutingState) -> None:
        # The graph is the collected loss's from here on; the sums stay for a recomputation.
        known = state.cached(self, _Running)
        known.loss = None
        known.sums = None if known.sums is None else known.sums.detach()


class GateLoss(SummedLoss):
    """A loss of the gates: those before the selection, or the weights that the experts really get.

    Args:
        weight: Factor of the loss.
        of: 'probabilities': the gates of all experts before the selection (V-MoE). 'weights': the
            combine weights w_te, zero for experts not chosen (Shazeer's G(x); w_be in arXiv
            2204.10598). A router without gates has weights only.
    """

    def __init__(self, weight: float = 0.01, of: str = 'probabilities') -> None:
        super().__init__(weight)
        if of not in GATES:
            raise ValueError(f'{type(self).__name__}: of must be one of {GATES}, got {of!r}')
        self.of = of

    def check(self, router: nn.Module) -> None:
        super().check(router)
        constant = getattr(router, 'k', None) == 1 and getattr(router, 'renormalize', False)
        if self.of == 'weights' and constant:
            raise ValueError(
                f"{type(self).__name__}(of='weights') has nothing to move: with k=1 and "
                f"renormalize={router.renormalize!r} every weight is 1. Use of='probabilities'"
            )

    def gate_sums(self, routing: Routing, context: RoutingContext, power: int = 1) -> Tensor:
        """(E,) sum over the items of each expert's gates to the ``power``."""
        if self.of == 'probabilities' and routing.probabilities is not None:
            gates = full_precision(routing.probabilities)
            return (gates if power == 1 else gates.pow(power)).sum(0)
        return weight_sums(routing, context, power)

    def extra_repr(self) -> str:
        return f'weight={self.weight}, of={self.of}'


def full_precision(values: Tensor) -> Tensor:
    """At least float32."""
    return values if values.dtype == torch.float64 else values.float()


def weight_sums(routing: Routing, context: RoutingContext, power: int = 1) -> Tensor:
    """(E,) sum over its pairs of each expert's combine weights to the ``power``.

    Raises:
        ValueError: If the router selects nothing (Soft MoE): then nothing is out of balance.
    """
    if not isinstance(routing, Routing):
        raise ValueError(f'MoE layer {context.layer!r}: its router selects nothing to balance')
    if routing.weights is None or routing.items is None:  # every weight is 1
        return to_device(torch.tensor(routing.counts, dtype=torch.float32), context.device)
    weights = full_precision(routing.weights)
    weights = weights if power == 1 else weights.pow(power)
    return torch.stack([part.sum() for part in weights.split(routing.counts)])


def probabilities_of(loss: BalanceLoss, routing: Routing, context: RoutingContext) -> Tensor:
    """(T, E) the gates before the selection, which ``loss`` cannot do without."""
    if routing.probabilities is None:
        raise ValueError(
            f'{type(loss).__name__} at {context.layer!r}: the router gave no probabilities'
        )
    return full_precision(routing.probabilities)


def shares(sums: Tensor) -> Tensor:
    """(E,) numbers divided by their sum; zeros stay where all are zero (an empty batch)."""
    total = sums.sum()
    return sums / torch.where(total > 0, total, torch.ones_like(total))


def p_log_p(p: Tensor, scale: float = 1.0) -> Tensor:
    """p ln(scale p), with value 0 and a finite gradient at p = 0."""
    return p * (scale * p.clamp(min=TINY)).log()
