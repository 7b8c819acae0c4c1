"""The loss of GShard and Switch Transformer: share of the items times mean gate."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdet_moe.moe.balance.base import SummedLoss, probabilities_of, shares
from mmdet_moe.moe.registry import BALANCE
from mmdet_moe.moe.routing import Routing, RoutingContext, to_device

CHOICES = ('first', 'all')


def switch_loss(fractions: Tensor, mean_gates: Tensor) -> Tensor:
    r"""1 at uniform use, E at full collapse.

    .. math:: L = E \sum_e f_e P_e

    The gradient flows through P alone; f counts.

    Args:
        fractions: f, (E,) share of the choices that went to each expert, sum 1.
        mean_gates: P, (E,) mean gate over the items.

    Source: Fedus et al. 2021 (Switch Transformer, arXiv 2101.03961), eq. 4-6; Lepikhin et al. 2020
    (GShard, arXiv 2006.16668), section 2.2.
    """
    return fractions.numel() * (fractions.detach() * mean_gates).sum()


@BALANCE.register
class SwitchLoss(SummedLoss):
    """:func:`switch_loss` of the router's gates.

    Args:
        weight: Factor of the loss.
        choices: What f counts. 'first': each item's best expert, before any item is dropped
            (Switch; GShard too, for its top-2). 'all': every pair that is really computed.
    """

    name = 'switch'
    needs_probabilities = True

    def __init__(self, weight: float = 0.01, choices: str = 'first') -> None:
        super().__init__(weight)
        if choices not in CHOICES:
            raise ValueError(f'SwitchLoss: choices must be one of {CHOICES}, got {choices!r}')
        self.choices = choices

    def sums(self, routing: Routing, context: RoutingContext) -> Tensor:
        gates = probabilities_of(self, routing, context)
        if self.choices == 'first':
            # What the selection was made from.
            known = (routing.noisy_logits, routing.logits, gates)
            scores = next(values for values in known if values is not None)
            experts = torch.arange(gates.shape[1], device=gates.device)
            chosen = (scores.argmax(1, keepdim=True) == experts).sum(0)
        else:
            chosen = to_device(torch.tensor(routing.counts), gates.device)
        items = gates.new_full((1,), gates.shape[0])
        return torch.cat([chosen.to(gates.dtype), gates.sum(0), items])

    def value(self, sums: Tensor) -> Tensor:
        chosen, gates = sums[:-1].unflatten(0, (2, -1))
        return switch_loss(shares(chosen), gates / sums[-1].clamp(min=1.0))

    def extra_repr(self) -> str:
        return f'weight={self.weight}, choices={self.choices}'
