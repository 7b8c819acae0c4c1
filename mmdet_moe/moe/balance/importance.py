r"""Importance: how much weight each expert gets.

.. math:: \mathrm{CV}^2(v) = \frac{\mathrm{Var}(v)}{\mathrm{mean}(v)^2 + \epsilon}

Through the variance, never the standard deviation: the root has NaN gradients at perfect balance.
"""

from __future__ import annotations

from torch import Tensor

from mmdet_moe.moe.balance.base import GateLoss, full_precision
from mmdet_moe.moe.registry import BALANCE
from mmdet_moe.moe.routing import Routing, RoutingContext


def cv_squared(values: Tensor, unbiased: bool = False, eps: float = 1e-10) -> Tensor:
    """Squared coefficient of variation of E numbers; 0 where E < 2 or all are zero.

    Args:
        values: (E,) non-negative.
        unbiased: Divide the variance by E - 1 (full collapse gives E) and not by E (gives E - 1).
        eps: Added to the squared mean.
    """
    values = full_precision(values)
    if values.numel() < 2:
        return values.sum() * 0.0
    return values.var(unbiased=unbiased) / (values.mean() ** 2 + eps)


def importance_loss(gates: Tensor, unbiased: bool = False) -> Tensor:
    """Squared coefficient of variation of the experts' importance.

    Args:
        gates: (T, E) gates; an expert's importance is the sum of its column.
        unbiased: See :func:`cv_squared`.

    Source: Shazeer et al. 2017 (arXiv 1701.06538), eq. 6-7; variance form of V-MoE.
    """
    return cv_squared(full_precision(gates).sum(0), unbiased)


@BALANCE.register
class ImportanceLoss(GateLoss):
    """:func:`importance_loss` of the router's gates: 0 at uniform use, E - 1 (E) at collapse.

    ``of='weights', unbiased=True, weight=0.5`` is arXiv 2204.10598's.

    Args:
        weight: Factor of the loss.
        unbiased: See :func:`cv_squared`.
        of: See :class:`GateLoss`.
    """

    name = 'importance'

    def __init__(
        self, weight: float = 0.01, unbiased: bool = False, of: str = 'probabilities'
    ) -> None:
        super().__init__(weight, of)
        self.unbiased = unbiased

    def sums(self, routing: Routing, context: RoutingContext) -> Tensor:
        return self.gate_sums(routing, context)

    def value(self, sums: Tensor) -> Tensor:
        return cv_squared(sums, self.unbiased)
