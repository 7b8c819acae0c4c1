"""Kullback-Leibler divergence of the experts' use from the uniform one."""

from __future__ import annotations

from torch import Tensor

from mmdet_moe.moe.balance.base import GateLoss, p_log_p, shares
from mmdet_moe.moe.registry import BALANCE
from mmdet_moe.moe.routing import Routing, RoutingContext


def kl_loss(importance: Tensor) -> Tensor:
    r"""0 at uniform use, ln E at full collapse, never negative.

    .. math:: L = \sum_e P_e \ln(E P_e), \quad P_e = I_e / \textstyle\sum_j I_j

    Args:
        importance: I, (E,) sum of each expert's gates. Where the gates of an item sum to 1, its
            sum is B and P_e = I_e / B, as in the paper; otherwise (k = 1 with the gate as weight,
            dropped items) P still is a distribution. All zero (an empty batch): 0.

    Source: Pavlitska et al. (arXiv 2204.10598), the soft constraint "KL divergence".
    """
    return p_log_p(shares(importance), scale=importance.numel()).sum()


@BALANCE.register
class KLLoss(GateLoss):
    """:func:`kl_loss` of the layer's importance; of the combine weights, as in the paper.

    Args:
        weight: Factor of the loss; 0.5 (CIFAR-100) and 0.25 (RetinaNet) in the paper.
        of: See :class:`GateLoss`.
    """

    name = 'kl'

    def __init__(self, weight: float = 0.01, of: str = 'weights') -> None:
        super().__init__(weight, of)

    def sums(self, routing: Routing, context: RoutingContext) -> Tensor:
        return self.gate_sums(routing, context)

    def value(self, sums: Tensor) -> Tensor:
        return kl_loss(sums)
