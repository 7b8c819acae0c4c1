"""Noisy top-k routing with a linear or a cosine gate: the learned baseline."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdet_moe.moe.registry import ROUTERS
from mmdet_moe.moe.routers.base import Router
from mmdet_moe.moe.routing import Routing, RoutingContext

KINDS = ('linear', 'cosine')
NOISES = ('learned', 'fixed')


@ROUTERS.register
class TopKRouter(Router):
    r"""Each item to its k best experts.

    Logits of an item x, and its noisy logits in training:

    .. math::
        \ell &= W_g x && \text{(linear)} \\
        \ell_e &= \tau \cos(W x + b, v_e), \quad \tau = \exp(\min(t, \ln 100)) && \text{(cosine)} \\
        h &= \ell + \varepsilon \odot \sigma, \quad \varepsilon \sim N(0, 1)

    with :math:`\sigma = \mathrm{softplus}(W_n x)` (noise 'learned', Shazeer) or
    :math:`\sigma = 1/E` ('fixed', V-MoE and GMoE). The k largest of h are chosen. With
    ``renormalize`` their weights are the softmax over the k chosen (they sum to 1), without it
    their entries of the softmax over all E.

    Logits, noise and weights are computed in float32, under autocast too.

    Args:
        in_channels: d.
        num_experts: E.
        k: Experts per item.
        kind: 'linear' or 'cosine'.
        noise: 'learned', 'fixed', False, or True for the usual one (linear: learned, cosine:
            fixed). In training only.
        noise_std: sigma of the fixed noise, times 1/E.
        renormalize: None means k > 1. With k = 1 the weight would be 1 whatever the router says,
            and no gradient would reach it but the balance losses'.
        projection: Width the cosine gate projects to.
        temperature: Initial t of the cosine gate; tau starts at exp(t). The default is ln 2, so
            that tau starts at 2.

    Source: Shazeer et al. 2017 (arXiv 1701.06538), eq. 3-5; Chi et al. 2022 (X-MoE, arXiv
    2204.09179), section 3; Li et al. 2023 (GMoE, arXiv 2206.04046), section 4.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        k: int = 2,
        kind: str = 'linear',
        noise: bool | str = True,
        noise_std: float = 1.0,
        renormalize: bool | None = None,
        projection: int = 256,
        temperature: float = math.log(2.0),
    ) -> None:
        super().__init__(num_experts)
        if not 1 <= k <= num_experts:
            raise ValueError(f'TopKRouter: k must be 1 to {num_experts} experts, got {k}')
        if kind not in KINDS:
            raise ValueError(f'TopKRouter: kind must be one of {KINDS}, got {kind!r}')
        if noise is True:
            noise = 'learned' if kind == 'linear' else 'fixed'
        if noise is not False and noise not in NOISES:
            raise ValueError(f'TopKRouter: noise must be a bool or one of {NOISES}, got {noise!r}')
        if noise_std <= 0:
            raise ValueError(f'TopKRouter: noise_std must be > 0, got {noise_std}; noise=False')
        self.in_channels = in_channels
        self.k = k
        self.kind = kind
        self.noise: str | None = noise or None
        self.noise_std = noise_std
        self.renormalize = k > 1 if renormalize is None else renormalize
        self.initial_temperature = temperature
        if kind == 'linear':
            self.gate = nn.Parameter(torch.empty(num_experts, in_channels))
        else:
            self.project = nn.Linear(in_channels, projection)
            self.expert_embeddings = nn.Parameter(torch.empty(num_experts, projection))
            self.temperature = nn.Parameter(torch.empty(()))
        if self.noise == 'learned':
            self.noise_gate = nn.Parameter(torch.empty(num_experts, in_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear: small normal gate (near-uniform at first), zero noise gate (sigma = ln 2)."""
        if self.kind == 'linear':
            nn.init.normal_(self.gate, std=0.01)
        else:
            self.project.reset_parameters()
            nn.init.normal_(self.expert_embeddings, std=0.01)
            nn.init.constant_(self.temperature, self.initial_temperature)
        if self.noise == 'learned':
            nn.init.zeros_(self.noise_gate)

    @property
    def keeps_dense_function(self) -> bool:
        return self.renormalize

    def _logits(self, x: Tensor) -> Tensor:
        if self.kind == 'linear':
            return F.linear(x, self.gate.to(x.dtype))
        projected = F.linear(x, self.project.weight.to(x.dtype), self.project.bias.to(x.dtype))
        cosine = F.normalize(projected, dim=1) @ F.normalize(self.expert_embeddings.to(x.dtype)).t()
        return cosine * self.temperature.to(x.dtype).clamp(max=math.log(100.0)).exp()

    def forward(self, items: Tensor | None, context: RoutingContext) -> Routing:
        assert items is not None
        if items.shape[1] != self.in_channels:
            raise ValueError(
                f'the router of {context.layer!r} was made for {self.in_channels} channels and '
                f'got {items.shape[1]}'
            )
        with torch.autocast(items.device.type, enabled=False):
            x = items if items.dtype == torch.float64 else items.float()
            return self._route(x, context)

    def _route(self, x: Tensor, context: RoutingContext) -> Routing:
        logits = context.constrain(self._logits(x))
        noisy, std = logits, None
        if context.training and self.noise is not None:
            if self.noise == 'learned':
                std = F.softplus(F.linear(x, self.noise_gate.to(x.dtype)))
            else:
                std = logits.new_tensor(self.noise_std / self.num_experts)
            noisy = logits + torch.randn_like(logits) * std
        chosen, indices = noisy.topk(self.k, dim=1)
        if self.renormalize:
            weights = chosen.softmax(1)
        else:
            weights = noisy.softmax(1).gather(1, indices)
        return Routing.from_topk(
            weights,
            indices,
            self.num_experts,
            logits=logits,
            noisy_logits=None if std is None else noisy,
            noise_std=std,
            probabilities=logits.softmax(1),
        )

    def extra_repr(self) -> str:
        return (
            f'{self.in_channels} -> {self.num_experts}, k={self.k}, kind={self.kind}, '
            f'noise={self.noise}, renormalize={self.renormalize}'
        )
