"""Load: how many items each expert can expect."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmdet_moe.moe.balance.base import SummedLoss, full_precision
from mmdet_moe.moe.balance.importance import cv_squared
from mmdet_moe.moe.registry import BALANCE
from mmdet_moe.moe.routing import Routing, RoutingContext

#: Keeps the load's Gaussian tail finite where a learned noise has gone to nothing.
MIN_NOISE_STD = 1e-6


def expected_load(
    logits: Tensor, noisy_logits: Tensor, noise_std: Tensor | float, k: int
) -> Tensor:
    """(E,) the load of :func:`load_loss`, same arguments."""
    logits, noisy_logits = full_precision(logits), full_precision(noisy_logits)
    num_experts = logits.shape[1]
    if k >= num_experts or not logits.shape[0]:
        # Every expert is chosen by every item (or there is none): nothing can be out of balance.
        return logits.new_zeros(num_experts)
    threshold = noisy_logits.topk(k, dim=1).values[:, -1:]
    sigma = torch.as_tensor(noise_std, device=logits.device).to(logits.dtype)
    # A constraint's -inf: no chance to be chosen, and no inf * 0 in the gradient of sigma.
    possible = logits.detach() > -torch.inf
    margin = torch.where(possible, logits, 0.0) - threshold
    wins = 0.5 * (1.0 + torch.erf(margin / sigma.clamp(min=MIN_NOISE_STD) / math.sqrt(2.0)))
    return torch.where(possible, wins, 0.0).sum(0)


def load_loss(logits: Tensor, noisy_logits: Tensor, noise_std: Tensor | float, k: int) -> Tensor:
    r"""Squared coefficient of variation of the experts' load, in V-MoE's logit form.

    The load is the expected number of items that would choose the expert if its noise were drawn
    again and the threshold stayed, smooth in the logits:

    .. math:: \mathrm{load}_e = \sum_t \Phi\big((\ell_{te} - \tau_t) / \sigma_{te}\big)

    with :math:`\ell` the clean logits, :math:`\tau_t` the k-th largest *noisy logit* of item t. An
    expert with logit -inf (closed by a constraint) has no load.

    Args:
        logits: (T, E) without noise.
        noisy_logits: (T, E) with noise.
        noise_std: sigma, (T, E) or broadcastable, or a number.
        k: Experts per item.

    Source: Riquelme et al. 2021 (arXiv 2106.05974), appendix A.2; Shazeer et al. 2017, eq. 8-10.
    """
    return cv_squared(expected_load(logits, noisy_logits, noise_std, k))


@BALANCE.register
class LoadLoss(SummedLoss):
    """:func:`load_loss` of a router with noise."""

    name = 'load'

    def check(self, router: nn.Module) -> None:
        super().check(router)
        if getattr(router, 'noise', None) is None:
            raise ValueError(
                f'LoadLoss needs a router with noise, {type(router).__name__} has none: the load '
                f'is smooth only through the noise'
            )

    def sums(self, routing: Routing, context: RoutingContext) -> Tensor:
        if routing.logits is None or routing.noisy_logits is None or routing.noise_std is None:
            raise ValueError(f'LoadLoss at {context.layer!r}: the router gave no noisy logits')
        return expected_load(
            routing.logits, routing.noisy_logits, routing.noise_std, routing.k or 1
        )

    def value(self, sums: Tensor) -> Tensor:
        return cv_squared(sums)
