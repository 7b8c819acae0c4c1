"""Soft MoE: no selection; slots are mixtures of an image's tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdet_moe.moe.registry import ROUTERS
from mmdet_moe.moe.routers.base import Router
from mmdet_moe.moe.routing import RoutingContext
from mmdet_moe.moe.soft import SlotRouting

#: Largest |scale|: exp(-2 · 40) is still a normal float32, so that no sum of a softmax is zero.
MAX_SCALE = 40.0


@ROUTERS.register
class SoftMoERouter(Router):
    r"""L2-normalised tokens times L2-normalised slots times a learned scale.

    .. math:: \ell_{bn,es} = \gamma \,
        \frac{x_{bn}}{\lVert x_{bn} \rVert} \cdot \frac{\phi_{es}}{\lVert \phi_{es} \rVert}

    Dispatch is the softmax over the tokens of an image, combine the softmax over all slots: see
    :mod:`mmdet_moe.moe.soft`. What is mixed are the tokens as they are, not the normalised ones.
    The logits lie in :math:`[-|\gamma|, |\gamma|]` with :math:`|\gamma| \le 40`, and their
    exponentials need no maximum to be subtracted.

    By token only: a mixture of the images of a batch would make results depend on the batch. There
    is nothing to balance; every slot is always full.

    Args:
        in_channels: d.
        num_experts: E.
        slots: S per expert. In the paper E·S is about the number of tokens.
        scale: Initial gamma.

    Source: Puigcerver et al. 2024 (Soft MoE, arXiv 2308.00951), eq. 1-3, section 2.3 and
    algorithm 2 (normalisation).
    """

    selects = False
    granularity = 'token'
    granularities = ('token',)

    def __init__(
        self, in_channels: int, num_experts: int, slots: int = 1, *, scale: float = 1.0
    ) -> None:
        super().__init__(num_experts)
        if slots < 1:
            raise ValueError(f'SoftMoERouter: slots must be >= 1, got {slots}')
        if not 0 < abs(scale) <= MAX_SCALE:
            raise ValueError(f'SoftMoERouter: scale must be in (0, {MAX_SCALE}], got {scale}')
        self.in_channels = in_channels
        self.slots = slots
        self.initial_scale = scale
        self.slot_embeddings = nn.Parameter(torch.empty(num_experts * slots, in_channels))
        self.scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.slot_embeddings, std=1 / math.sqrt(self.in_channels))
        nn.init.constant_(self.scale, self.initial_scale)

    def forward(self, items: Tensor | None, context: RoutingContext) -> SlotRouting:
        assert items is not None
        if items.shape[1] != self.in_channels:
            raise ValueError(
                f'the router of {context.layer!r} was made for {self.in_channels} channels and '
                f'got {items.shape[1]}'
            )
        affinity = None
        if context.num_items:
            with torch.autocast(items.device.type, enabled=False):
                x = items if items.dtype == torch.float64 else items.float()
                slots = F.normalize(self.slot_embeddings.to(x.dtype), dim=1)
                scale = self.scale.to(x.dtype)
                # Held at the limit, but with a gradient that can bring it back.
                scale = scale + (scale.clamp(-MAX_SCALE, MAX_SCALE) - scale).detach()
                logits = F.linear(F.normalize(x, dim=1), slots * scale) - scale.detach().abs()
                affinity = logits.exp().view(-1, context.items_per_image, logits.shape[1])
        return SlotRouting(context.num_items, self.num_experts, affinity, self.slots)

    def extra_repr(self) -> str:
        return f'{self.in_channels} -> {self.num_experts} x {self.slots} slots'
