r"""Slots: experts that get mixtures of an image's tokens, and tokens that get mixtures of slots.

Axes: B images, N tokens per image, T = B·N items, E experts, S slots per expert, d channels.

With logits :math:`\ell_{bn,es}`,

.. math::
    \tilde x_{b,es} &= \sum_n D_{bn,es}\, x_{bn}, && D = \mathrm{softmax}_n(\ell) \\
    y_{bn} &= \sum_{es} C_{bn,es}\, f_e(\tilde x_{b,es}), && C = \mathrm{softmax}_{es}(\ell)

Both softmaxes have the same numerators :math:`A = e^{\ell - c}`, so A is computed once and divided
after the products, where the numbers are fewest:

.. math:: \tilde x = \mathrm{diag}(A^\top 1)^{-1} A^\top x, \qquad
    y = \mathrm{diag}(A 1)^{-1} A f(\tilde x)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmdet_moe.moe.dispatch import run_experts
from mmdet_moe.moe.routing import Routing


@dataclass
class SlotRouting:
    """The soft assignment of T items to E·S slots; what Soft MoE gives a layer for a ``Routing``.

    Attributes:
        num_items: T.
        num_experts: E.
        affinity: (B, N, E·S) positive A, float32 or float64; None where there is no item.
        slots: S.
        losses, stats, logits, probabilities, k: As ``Routing``'s. Nothing is selected, so there are
            no logits to balance.
    """

    num_items: int
    num_experts: int
    affinity: Tensor | None
    slots: int
    logits: Tensor | None = None
    noisy_logits: Tensor | None = None
    noise_std: Tensor | float | None = None
    probabilities: Tensor | None = None
    k: int | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        #: (B, N, 1) sums over slots.
        self.totals = None if self.affinity is None else self.affinity.sum(2, keepdim=True)

    @property
    def counts(self) -> list[int]:
        """Rows each expert runs: B·S."""
        images = 0 if self.affinity is None else self.affinity.shape[0]
        return [images * self.slots] * self.num_experts

    def to_dense(self) -> Tensor:
        """(T, E) combine weights of an expert's slots together, without gradient."""
        if self.affinity is None or self.totals is None:
            return torch.zeros(self.num_items, self.num_experts)
        weights = (self.affinity / self.totals).detach()
        return weights.view(self.num_items, self.num_experts, self.slots).sum(2)

    def importance(self) -> Tensor:
        """(E,) sum of the combine weights of an expert's slots over the items."""
        if self.affinity is None or self.totals is None:
            return torch.zeros(self.num_experts)
        sums = self.totals.reciprocal().transpose(1, 2) @ self.affinity  # (B, 1, E·S)
        return sums.sum((0, 1)).view(self.num_experts, self.slots).sum(1)


def run_slots(
    experts: Sequence[nn.Module] | nn.ModuleList,
    items: Tensor,
    routing: SlotRouting,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    per_item: Callable[[int | str, Any], bool] | None = None,
) -> Tensor:
    """Fill the slots, run each expert once on all its slots, combine.

    Args:
        experts: E modules (rows, d) -> (rows, d').
        items: (T, d), image-major.
        routing: The affinities.
        args, kwargs: Further arguments, handed to every expert whole.
        per_item: As ``run_experts``'.

    Returns:
        (T, d').

    Raises:
        ValueError: For a further argument with one row per item: a slot is no item.
        TypeError: If an expert gives anything else than a tensor.
    """
    kwargs = kwargs or {}
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in arguments:
        if per_item is not None and per_item(key, value):
            raise ValueError(
                f'argument {key!r} has one row per item, but Soft MoE gives its experts slots, '
                f'which are mixtures of items'
            )
    num_experts, affinity = routing.num_experts, routing.affinity
    if affinity is None:
        nothing = Routing(items.shape[0], num_experts, [0] * num_experts)
        return run_experts(experts, items, nothing, args, kwargs, per_item)
    images, tokens, all_slots = affinity.shape
    x = items.view(images, tokens, -1)
    dtype = mixing_dtype(items)
    slots = _mix(affinity.transpose(1, 2), affinity.sum(1).unsqueeze(2), x, dtype)
    # Expert-major, so that the slots of one expert are one contiguous piece.
    slots = slots.view(images, num_experts, routing.slots, -1).transpose(0, 1)
    rows = images * all_slots
    place = torch.arange(rows, device=items.device)
    in_place = Routing(rows, num_experts, routing.counts, place, inverse=place, in_order=True, k=1)
    out = run_experts(experts, slots.reshape(rows, -1), in_place, args, kwargs)
    if not isinstance(out, Tensor):
        raise TypeError(f'experts of a Soft MoE layer must give tensors, got {type(out).__name__}')
    out = out.view(num_experts, images, routing.slots, -1).transpose(0, 1)
    assert routing.totals is not None
    out = _mix(affinity, routing.totals, out.reshape(images, all_slots, -1), dtype)
    return out.reshape(images * tokens, -1)


def mixing_dtype(items: Tensor) -> torch.dtype:
    """What the mixtures are computed in: autocast's type where that is on (double stays), else the
    items'."""
    kind = items.device.type
    if items.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return items.dtype
    return torch.get_autocast_dtype(kind)


def _mix(affinity: Tensor, totals: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Weighted means of (B, n, d) values: (affinity / totals) @ values, shape (B, m, d).

    Args:
        affinity: (B, m, n).
        totals: (B, m, 1), its sums over n.
        values: (B, n, d).
        dtype: Of the product. In a low precision the weights are divided first, because their
            numerators alone may be below its range.
    """
    if dtype == affinity.dtype == values.dtype:
        return torch.bmm(affinity, values) / totals
    return torch.bmm((affinity / totals).to(dtype), values.to(dtype))
