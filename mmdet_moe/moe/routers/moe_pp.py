"""MoE++: experts that cost nothing, and gates that remember the layer before."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdet_moe.moe.registry import ROUTERS
from mmdet_moe.moe.routers.gated import GatedRouter, drop_over_capacity
from mmdet_moe.moe.routing import Routing, RoutingContext

if TYPE_CHECKING:
    from mmdet_moe.moe.layer import MoELayer


class CopyExpert(nn.Module):
    """The item itself."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


class ZeroExpert(nn.Module):
    """Nothing. Stands for its place in the counts; its pairs are dropped, so it is not called."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(x)


class ConstantExpert(nn.Module):
    r"""A learned mixture of the item and a learned vector.

    .. math:: f(x) = \alpha_1 x + \alpha_2 v, \qquad \alpha = \mathrm{softmax}(W_c x)

    Args:
        in_channels: d.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        #: Dimension of the channels; None: 1 for 4 dimensions or more, else the last.
        self.channel_dim: int | None = None
        self.vector = nn.Parameter(torch.empty(in_channels))
        self.mix = nn.Parameter(torch.empty(2, in_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.vector, std=0.02)
        nn.init.normal_(self.mix, std=0.02)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dim = self.channel_dim
        if dim is None or x.ndim == 2:
            dim = 1 if x.ndim >= 4 else -1
        moved = x.movedim(dim, -1)
        alpha = F.linear(moved, self.mix).softmax(-1).to(moved.dtype)
        out = alpha[..., :1] * moved + alpha[..., 1:] * self.vector.to(moved.dtype)
        return out.movedim(-1, dim)


@ROUTERS.register
class MoEPPRouter(GatedRouter):
    r"""Top-k over the experts and three kinds of free ones: copy, constant and zero.

    .. math::
        \ell^j &= W_2 \tanh(W_1 x) + W_r\, \ell^{j-1} \\
        p &= \mathrm{softmax}(\ell) \in \mathbb{R}^{N}, \qquad
        w_{te} = \frac{p_{te}\,[e \text{ chosen, not zero}]}
                      {\sum_{e' \text{ chosen, not zero}} p_{te'}}

    The N experts are the layer's E, then copies, constants (:class:`ConstantExpert`) and zeros. An
    item with zero experts only gives zeros. The copies and constants live in the router
    (``router.extra_experts``): a dense checkpoint and upcycling reach the layer's E alone.

    **Gating residual.** :math:`\ell^{j-1}` are the logits of the MoE++ layer that ran before this
    one in the same forward, if it had as many items and experts. A layer that runs again (a head on
    its next level) begins a new chain, and has none before it. :math:`W_r` starts at zero. They
    come without their gradient (the paper lets it flow): the layer before may be in another segment
    of activation checkpointing, whose graph is gone.

    **Load loss.** Free experts are punished less, and so used more for easy items:

    .. math:: L = w \sum_e \eta_e f_e P_e, \quad
        f_e = \frac{1}{T} \sum_t [e \text{ chosen}], \quad
        P_e = \frac{1}{T} \sum_t p_{te}, \quad \eta_e = 1 \text{ or } \tau

    with tau for the free experts. **Capacity** (None: dropless), gamma the factor and Z the number
    of free experts: :math:`\gamma \tau k T / (\tau E + Z)` for an expert,
    :math:`\gamma k T / (\tau E + Z)` for a free one.

    Args:
        in_channels: d. The module replaced must give as many channels as it takes.
        num_experts: E.
        k: Experts per item.
        zero, copy, constant: How many of each.
        hidden: Width of the gate; None: N.
        residual: Whether the logits of the layer before are added.
        tau: See above.
        weight: w; in the log as ``loss_moe_heterogeneous_load``.
        capacity_factor, test_capacity_factor: gamma in training and evaluation.
        prioritised: Over the capacity, keep the items of largest probability, as
            :class:`~mmdet_moe.moe.routers.gated.SelectingRouter` does.
        jitter, z_loss: Of :class:`~mmdet_moe.moe.routers.gated.GatedRouter`.

    Source: Jin et al. 2025 (MoE++, arXiv 2410.07348), eq. 2-9 and its public code (gate, weights).
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        k: int = 2,
        *,
        zero: int = 1,
        copy: int = 1,
        constant: int = 2,
        hidden: int | None = None,
        residual: bool = True,
        tau: float = 0.75,
        weight: float = 0.01,
        capacity_factor: float | None = None,
        test_capacity_factor: float | None = None,
        prioritised: bool = False,
        jitter: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        if min(zero, copy, constant) < 0:
            raise ValueError(f'MoEPPRouter: negative numbers of experts: {zero, copy, constant}')
        self.num_choices = num_experts + copy + constant + zero
        self.hidden = hidden or self.num_choices
        super().__init__(in_channels, num_experts, jitter=jitter, z_loss=z_loss)
        if not 1 <= k <= self.num_choices:
            raise self.refusal(f'k must be 1 to {self.num_choices} experts, got {k}')
        self.check_capacity(capacity_factor, test_capacity_factor, prioritised)
        if not (math.isfinite(tau) and tau > 0):
            raise self.refusal(f'tau must be > 0, got {tau}')
        if not (math.isfinite(weight) and weight >= 0):
            raise self.refusal(f'weight must be >= 0, got {weight}')
        self.k = k
        self.zero = zero
        self.tau = tau
        self.weight = weight
        self.capacity_factor = capacity_factor
        self.test_capacity_factor = test_capacity_factor
        self.prioritised = prioritised
        free: list[nn.Module] = [CopyExpert() for _ in range(copy)]
        free += [ConstantExpert(in_channels) for _ in range(constant)]
        free += [ZeroExpert() for _ in range(zero)]
        self.free = nn.ModuleList(free)
        self.residual = (
            nn.Parameter(torch.empty(self.num_choices, self.num_choices)) if residual else None
        )
        self.reset_parameters()

    @property
    def extra_experts(self) -> nn.ModuleList:
        """The copies, constants and zeros."""
        return self.free

    def make_gate(self, projection: int) -> None:
        self.gate_in = nn.Parameter(torch.empty(self.hidden, self.in_channels))
        self.gate_out = nn.Parameter(torch.empty(self.num_choices, self.hidden))

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.gate_in, a=math.sqrt(5))
        nn.init.normal_(self.gate_out, std=0.01)
        if self.residual is not None:
            nn.init.zeros_(self.residual)
        for expert in self.free:
            if isinstance(expert, ConstantExpert):
                expert.reset_parameters()

    def attach(self, layer: MoELayer) -> None:
        expert = layer.experts[0]
        for one, other in (('in_features', 'out_features'), ('in_channels', 'out_channels')):
            taken, given = getattr(expert, one, None), getattr(expert, other, None)
            if taken != given and isinstance(taken, int) and isinstance(given, int):
                raise ValueError(
                    f'MoE layer {layer.name!r}: a copy expert gives what it takes, but the '
                    f'{layer.dense_type} takes {taken} channels and gives {given}'
                )
        for extra in self.free:
            if isinstance(extra, ConstantExpert):
                extra.channel_dim = layer.channel_dim

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.gate_in.to(x.dtype)).tanh(), self.gate_out.to(x.dtype))

    def complete(self, logits: Tensor, context: RoutingContext) -> Tensor:
        if self.residual is None:
            return logits
        before = context.state.received('moe++', self, logits)
        if before is not None and before.shape == logits.shape:
            logits = logits + F.linear(before.to(logits), self.residual.to(logits.dtype))
        context.state.leave('moe++', logits)
        return logits

    def weigh(self, logits: Tensor, experts: Tensor) -> Tensor:
        """The entries of the softmax, scaled to sum to 1 over the chosen that are not zero."""
        weights = logits.softmax(1).gather(1, experts)
        weights = weights.masked_fill(experts >= self.num_choices - self.zero, 0.0)
        return weights / weights.sum(1, keepdim=True).clamp(min=1e-9)

    def route(self, x: Tensor, logits: Tensor, context: RoutingContext) -> Routing:
        logits = context.constrain(logits)
        p = logits.softmax(1)
        indices = p.topk(self.k, dim=1).indices
        losses: dict[str, Tensor] = {}
        if context.training and self.weight:
            loss = heterogeneous_load_loss(p, indices, self.num_experts, self.tau)
            losses['heterogeneous_load'] = self.weight * loss
        factor = self.capacity_factor if context.training else self.test_capacity_factor
        weights = self.weigh(logits, indices)
        if self.zero:
            indices = indices.masked_fill(indices >= self.num_choices - self.zero, -1)
        if factor is not None:
            heavy, light = heterogeneous_capacity(
                logits.shape[0], self.num_experts, self.num_choices, self.k, self.tau, factor
            )
            capacity = indices.new_full((self.num_choices,), light)
            capacity[: self.num_experts] = heavy
            # The gate's own word: the weights are normalised by now.
            priority = p.detach().amax(1) if self.prioritised else None
            indices = drop_over_capacity(indices, capacity, self.num_choices, priority)
        return Routing.from_topk(
            weights,
            indices,
            self.num_choices,
            dropping=bool(self.zero) or factor is not None,
            logits=logits,
            probabilities=p,
            losses=losses,
        )

    def extra_repr(self) -> str:
        names = [type(e).__name__.removesuffix('Expert').lower() for e in self.free]
        return f'{self.in_channels} -> {self.num_experts} + {names}, k={self.k}'


# Pure functions


def heterogeneous_load_loss(
    probabilities: Tensor, indices: Tensor, num_experts: int, tau: float
) -> Tensor:
    """sum_e eta_e · f_e · P_e, see :class:`MoEPPRouter`; 0 for no items.

    Args:
        probabilities: (T, N).
        indices: (T, k) what was chosen, zero experts too.
        num_experts: E: the first E of the N count 1, the others ``tau``.
        tau: See above.
    """
    num_items, choices = probabilities.shape
    if not num_items:
        return probabilities.sum() * 0.0
    eta = probabilities.new_full((choices,), tau)
    eta[:num_experts] = 1.0
    experts = torch.arange(choices, device=indices.device)
    chosen = (indices.unsqueeze(-1) == experts).sum((0, 1)).to(eta.dtype) / num_items
    return (eta * chosen * probabilities.mean(0)).sum()


def heterogeneous_capacity(
    num_items: int, num_experts: int, choices: int, k: int, tau: float, factor: float
) -> tuple[int, int]:
    """Capacities ceil(gamma·tau·k·T / (tau·E + Z)) of an expert, without the tau of one of the
    Z = N - E free ones."""
    share = factor * k * num_items / (tau * num_experts + choices - num_experts)
    return math.ceil(tau * share - 1e-9), math.ceil(share - 1e-9)


__all__ = [
    'ConstantExpert',
    'CopyExpert',
    'MoEPPRouter',
    'ZeroExpert',
    'heterogeneous_capacity',
    'heterogeneous_load_loss',
]
