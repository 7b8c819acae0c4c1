"""Entropy: all experts over the batch, few for each item."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmdet_moe.moe.balance.base import SummedLoss, p_log_p, probabilities_of, shares
from mmdet_moe.moe.registry import BALANCE
from mmdet_moe.moe.routing import Routing, RoutingContext


def entropy_loss(probabilities: Tensor, item_weight: float = 0.0) -> Tensor:
    r"""Minus the entropy of the mean gate, plus the mean entropy of the items' gates.

    .. math::
        L = -H\big(\textstyle\frac1T \sum_t p_t\big) + c\, \frac1T \sum_t H(p_t),
        \quad H(p) = -\sum_e p_e \ln p_e

    With c = 0 that is the KL loss of the probabilities minus ln E: the same gradient. With c = 1
    it is minus the mutual information of item and expert. Between -ln E (uniform use; for c > 0
    by items that are sure of themselves) and c ln E; 0 at full collapse.

    Args:
        probabilities: (T, E) gates, each row sums to 1.
        item_weight: c.

    Source: c = 1 in the follow-ups of arXiv 2204.10598 on adversarially trained BlockMoE and
    ConvMoE: :math:`\mathrm{mean}_t H(p_t) - H(\mathrm{mean}_t p_t)`.
    """
    return _value(_sums(probabilities), item_weight)


def _sums(p: Tensor) -> Tensor:
    """(E + 2,): the gates' sum (E), the items' entropies' sum, the number of items."""
    items = p.new_full((1,), p.shape[0])
    return torch.cat([p.sum(0), -p_log_p(p).sum().reshape(1), items])


def _value(sums: Tensor, item_weight: float) -> Tensor:
    value = p_log_p(shares(sums[:-2])).sum()
    if item_weight:
        value = value + item_weight * sums[-2] / sums[-1].clamp(min=1.0)
    return value


@BALANCE.register
class EntropyLoss(SummedLoss):
    """:func:`entropy_loss` of the router's probabilities.

    Args:
        weight: Factor of the loss.
        item_weight: c: how much a decided router counts beside a balanced one.
    """

    name = 'entropy'
    needs_probabilities = True

    def __init__(self, weight: float = 0.01, item_weight: float = 0.0) -> None:
        super().__init__(weight)
        if not math.isfinite(item_weight) or item_weight < 0:
            raise ValueError(f'EntropyLoss: item_weight must be >= 0, got {item_weight}')
        self.item_weight = item_weight

    def sums(self, routing: Routing, context: RoutingContext) -> Tensor:
        return _sums(probabilities_of(self, routing, context))

    def value(self, sums: Tensor) -> Tensor:
        return _value(sums, self.item_weight)

    def extra_repr(self) -> str:
        return f'weight={self.weight}, item_weight={self.item_weight}'
