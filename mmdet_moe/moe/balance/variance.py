"""Variance of each expert's gate over the items: pushes the items apart."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdet_moe.moe.balance.base import GateLoss, full_precision
from mmdet_moe.moe.registry import BALANCE
from mmdet_moe.moe.routing import Routing, RoutingContext


def variance_loss(gates: Tensor) -> Tensor:
    r"""0 where all items have the same gates (uniform ones, or full collapse).

    .. math:: L = -\sum_e \mathrm{Var}_t(w_{te})

    with the variance over the T items divided by T. The least value, -(1 - 1/E), is that of items
    spread evenly, each with one expert of weight 1. It does not balance by itself: it stands
    *beside* a loss that does.

    Args:
        gates: (T, E).

    Source: Pavlitska et al. (arXiv 2204.10598), published code.
    """
    gates = full_precision(gates)
    return _value(_sums(gates.sum(0), gates.square().sum(0), gates.shape[0]))


def _sums(sums: Tensor, squares: Tensor, num_items: int) -> Tensor:
    """(2E + 1,): the gates' sums (E), their squares' sums (E), the number of items."""
    return torch.cat([sums, squares, sums.new_full((1,), num_items)])


def _value(sums: Tensor) -> Tensor:
    mean, mean_square = (sums[:-1] / sums[-1].clamp(min=1.0)).unflatten(0, (2, -1))
    return (mean.square() - mean_square).sum()


@BALANCE.register
class VarianceLoss(GateLoss):
    """:func:`variance_loss` of the layer's gates; of the combine weights, as in the paper.

    Args:
        weight: Factor of the loss.
        of: See :class:`GateLoss`.
    """

    name = 'variance'

    def __init__(self, weight: float = 0.01, of: str = 'weights') -> None:
        super().__init__(weight, of)

    def sums(self, routing: Routing, context: RoutingContext) -> Tensor:
        return _sums(
            self.gate_sums(routing, context),
            self.gate_sums(routing, context, power=2),
            routing.num_items,
        )

    def value(self, sums: Tensor) -> Tensor:
        return _value(sums)
