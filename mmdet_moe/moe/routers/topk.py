"""Noisy top-k routing with any gate: the learned baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdet_moe.moe.registry import ROUTERS
from mmdet_moe.moe.routers.gated import SelectingRouter
from mmdet_moe.moe.routing import Routing, RoutingContext

NOISES = ('learned', 'fixed')


@ROUTERS.register
class TopKRouter(SelectingRouter):
    r"""Each item to its k best experts.

    Logits :math:`\ell` of an item as :class:`GatedRouter` has them; in training they are noisy:

    .. math:: h = \ell + \varepsilon \odot \sigma, \quad \varepsilon \sim N(0, 1)

    with :math:`\sigma = \mathrm{softplus}(W_n x)` (noise 'learned', Shazeer) or
    :math:`\sigma = 1/E` ('fixed', V-MoE and GMoE). The k largest of h are chosen. With
    ``renormalize`` their weights are the softmax over the k chosen (they sum to 1), without it
    their entries of the softmax over all E.

    Args:
        in_channels: d.
        num_experts: E.
        k: Experts per item.
        kind: 'linear', 'cosine' or 'conv'.
        noise: 'learned', 'fixed', False, or True for the usual one (cosine: fixed, else learned).
            In training only.
        noise_std: sigma of the fixed noise, times 1/E.
        options: Of :class:`SelectingRouter` (renormalisation, capacity) and :class:`GatedRouter`
            (jitter, z-loss, the cosine gate's sizes).

    Source: Shazeer et al. 2017 (arXiv 1701.06538), eq. 3-5; Riquelme et al. 2021 (V-MoE, arXiv
    2106.05974), eq. 1.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        k: int = 2,
        kind: str = 'linear',
        noise: bool | str = True,
        noise_std: float = 1.0,
        **options: Any,
    ) -> None:
        if noise is True:
            noise = 'fixed' if kind == 'cosine' else 'learned'
        if noise is not False and noise not in NOISES:
            raise ValueError(f'TopKRouter: noise must be a bool or one of {NOISES}, got {noise!r}')
        if noise_std <= 0:
            raise ValueError(f'TopKRouter: noise_std must be > 0, got {noise_std}; noise=False')
        super().__init__(in_channels, num_experts, k, kind=kind, **options)
        self.noise: str | None = noise or None
        self.noise_std = noise_std
        if self.noise == 'learned':
            self.noise_gate = nn.Parameter(torch.empty(num_experts, self.gate_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A small normal gate (near-uniform at first), a zero noise gate (sigma = ln 2)."""
        super().reset_parameters()
        if self.noise == 'learned':
            nn.init.zeros_(self.noise_gate)

    def route(self, x: Tensor, logits: Tensor, context: RoutingContext) -> Routing:
        logits = context.constrain(logits)
        noisy, std = logits, None
        if context.training and self.noise is not None:
            if self.noise == 'learned':
                std = F.softplus(F.linear(x, self.noise_gate.to(x.dtype)))
            else:
                std = logits.new_full((), self.noise_std / self.num_experts)
            noisy = logits + torch.randn_like(logits) * std
        indices = noisy.topk(self.k, dim=1).indices
        return self.assign(
            self.weigh(noisy, indices),
            indices,
            context,
            logits=logits,
            noisy_logits=None if std is None else noisy,
            noise_std=std,
            probabilities=logits.softmax(1),
        )

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, noise={self.noise}'


@ROUTERS.register
class CosineRouter(TopKRouter):
    """:class:`TopKRouter` as GMoE and MoA set it: cosine gate, softmax over all E, N(0, 1)/E noise.

    With k = 1 the weight is the chosen expert's entry of the softmax, with more they are
    sum-normalised. Goes with ``ImportanceLoss`` and ``LoadLoss`` of weight 0.005 each.

    Args:
        in_channels: d.
        num_experts: E.
        k: Experts per item.
        options: As :class:`TopKRouter`'s.

    Source: Li et al. 2023 (GMoE, arXiv 2206.04046), section 4 and its public code.
    """

    def __init__(
        self, in_channels: int, num_experts: int, k: int = 1, *, noise: bool = True, **options: Any
    ) -> None:
        super().__init__(in_channels, num_experts, k, kind='cosine', noise=noise, **options)
