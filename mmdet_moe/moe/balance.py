r"""Losses that ask for a balanced use of the experts: pure functions, and their config classes.

Axes: T items, E experts, k selected.

Both count how much each expert gets, and punish the squared coefficient of variation

.. math:: \mathrm{CV}^2(v) = \frac{\mathrm{Var}(v)}{\mathrm{mean}(v)^2 + \epsilon}

Through the variance, never the standard deviation: the root has NaN gradients at perfect balance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmdet_moe.moe.registry import BALANCE
from mmdet_moe.moe.routing import Routing, RoutingContext

#: Keeps the load's Gaussian tail finite where a learned noise has gone to nothing.
MIN_NOISE_STD = 1e-6


def cv_squared(values: Tensor, unbiased: bool = False, eps: float = 1e-10) -> Tensor:
    """Squared coefficient of variation of E numbers; 0 where E < 2 or all are zero.

    Args:
        values: (E,) non-negative.
        unbiased: Divide the variance by E - 1 (full collapse gives E) and not by E (gives E - 1).
        eps: Added to the squared mean.
    """
    values = values.float()
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
    return cv_squared(gates.float().sum(0), unbiased)


def load_loss(logits: Tensor, noisy_logits: Tensor, noise_std: Tensor | float, k: int) -> Tensor:
    r"""Squared coefficient of variation of the experts' load, in V-MoE's logit form.

    The load is the expected number of items that would choose the expert if its noise were drawn
    again and the threshold stayed, smooth in the logits:

    .. math:: \mathrm{load}_e = \sum_t \Phi\big((\ell_{te} - \tau_t) / \sigma_{te}\big)

    with :math:`\ell` the clean logits, :math:`\tau_t` the k-th largest *noisy logit* of item t.

    Args:
        logits: (T, E) without noise.
        noisy_logits: (T, E) with noise.
        noise_std: sigma, (T, E) or broadcastable, or a number.
        k: Experts per item.

    Source: Riquelme et al. 2021 (arXiv 2106.05974), appendix A.2; Shazeer et al. 2017, eq. 8-10.
    """
    logits, noisy_logits = logits.float(), noisy_logits.float()
    num_experts = logits.shape[1]
    if k >= num_experts or not logits.shape[0]:
        # Every expert is chosen by every item (or there is none): nothing can be out of balance.
        return logits.sum() * 0.0
    threshold = noisy_logits.topk(k, dim=1).values[:, -1:]
    sigma = torch.as_tensor(noise_std, device=logits.device).float().clamp(min=MIN_NOISE_STD)
    wins = 0.5 * (1.0 + torch.erf((logits - threshold) / sigma / math.sqrt(2.0)))
    return cv_squared(wins.sum(0))


class BalanceLoss(nn.Module):
    """Base of what may stand in a layer's ``balance`` list.

    A subclass implements :meth:`forward`. One that acts on the logits before the selection (a
    constraint) overrides :meth:`constrain`, keeps its running state in buffers, and updates it
    only if ``context.training and not context.recompute``.

    Args:
        weight: Factor of the loss.
    """

    #: Key of the loss in the log: ``loss_moe_<name>``.
    name = ''

    def __init__(self, weight: float = 0.01) -> None:
        super().__init__()
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f'{type(self).__name__}: weight must be >= 0, got {weight}')
        self.weight = weight

    def check(self, router: nn.Module) -> None:
        """Refuse a router this loss can do nothing for, when the layer is built."""

    def forward(self, routing: Routing, context: RoutingContext) -> dict[str, Tensor]:
        """The weighted losses of one routing, scalars by name."""
        raise NotImplementedError

    def constrain(self, logits: Tensor, context: RoutingContext) -> Tensor:
        """Change (T, E) logits before the router selects; the identity here."""
        return logits

    def extra_repr(self) -> str:
        return f'weight={self.weight}'


@BALANCE.register
class ImportanceLoss(BalanceLoss):
    """:func:`importance_loss` of the router's gates before selection (V-MoE).

    Args:
        weight: Factor of the loss.
        unbiased: See :func:`cv_squared`.
    """

    name = 'importance'

    def __init__(self, weight: float = 0.01, unbiased: bool = False) -> None:
        super().__init__(weight)
        self.unbiased = unbiased

    def forward(self, routing: Routing, context: RoutingContext) -> dict[str, Tensor]:
        if routing.probabilities is not None:
            value = importance_loss(routing.probabilities, self.unbiased)
        else:
            value = cv_squared(routing.importance(), self.unbiased)
        return {self.name: self.weight * value}


@BALANCE.register
class LoadLoss(BalanceLoss):
    """:func:`load_loss` of a router with noise."""

    name = 'load'

    def check(self, router: nn.Module) -> None:
        if getattr(router, 'noise', None) is None:
            raise ValueError(
                f'LoadLoss needs a router with noise, {type(router).__name__} has none: the load '
                f'is smooth only through the noise'
            )

    def forward(self, routing: Routing, context: RoutingContext) -> dict[str, Tensor]:
        if routing.logits is None or routing.noisy_logits is None or routing.noise_std is None:
            raise ValueError(f'LoadLoss at {context.layer!r}: the router gave no noisy logits')
        value = load_loss(routing.logits, routing.noisy_logits, routing.noise_std, routing.k or 1)
        return {self.name: self.weight * value}
