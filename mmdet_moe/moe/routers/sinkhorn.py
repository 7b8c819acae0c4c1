"""Balanced by transport: Sinkhorn scaling, and BASE's exact assignment."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdet_moe.moe.registry import ROUTERS
from mmdet_moe.moe.routers.gated import GatedRouter, SelectingRouter, chosen_entries
from mmdet_moe.moe.routing import Routing, RoutingContext


@ROUTERS.register
class SinkhornRouter(SelectingRouter):
    r"""Top-k of the doubly stochastic scaling of :math:`e^\ell` in training, of the logits at test.

    The scaling (:func:`sinkhorn`) only selects; the weights are those of the raw logits: their
    sigmoid with k = 1, else their entries of the softmax over all E.

    Args:
        in_channels: d.
        num_experts: E.
        k: Experts per item.
        iterations: Of the scaling, always as many: no wait for the device, and no endless loop.
        renormalize: None means False.
        options: Of :class:`~mmdet_moe.moe.routers.gated.SelectingRouter` and ``GatedRouter``.

    Source: Clark et al. 2022 (arXiv 2202.01169), section 4.1 (S-BASE); weights as in Megatron.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        k: int = 1,
        *,
        iterations: int = 8,
        renormalize: bool | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, num_experts, k, renormalize=renormalize or False, **options)
        if iterations < 1:
            raise self.refusal(f'iterations must be >= 1, got {iterations}')
        self.iterations = iterations
        self.reset_parameters()

    def weigh(self, logits: Tensor, experts: Tensor) -> Tensor:
        """Of sigmoids for a router of k = 1, else of the full softmax."""
        values = logits.sigmoid() if self.k == 1 else logits.softmax(1)
        return chosen_entries(values, experts, self.renormalize)

    def route(self, x: Tensor, logits: Tensor, context: RoutingContext) -> Routing:
        logits = context.constrain(logits)
        scores = logits.detach()
        if context.training:
            scores = sinkhorn(scores, self.iterations)
        indices = scores.topk(self.k, dim=1).indices
        return self.assign(
            self.weigh(logits, indices),
            indices,
            context,
            logits=logits,
            probabilities=logits.softmax(1),
        )


@ROUTERS.register
class BASERouter(GatedRouter):
    r"""The balanced assignment of largest total score in training, the best expert at test.

    In training every item gets one expert and none of the E takes more than
    :math:`\lceil T' / E \rceil` of a group of T' items (:func:`balanced_assignment`); the weight is
    the sigmoid of the chosen logit, so that the gate learns. The assignment is exact, on the host,
    and takes the cube of T': it is made in interleaved groups of at most ``group_size``.

    Args:
        in_channels: d.
        num_experts: E.
        group_size: Items that are assigned together.
        options: Of :class:`~mmdet_moe.moe.routers.gated.GatedRouter`.

    Source: Lewis et al. 2021 (BASE layers, arXiv 2103.16716), eq. 1-3.
    """

    def __init__(
        self, in_channels: int, num_experts: int, *, group_size: int = 1024, **options: Any
    ) -> None:
        super().__init__(in_channels, num_experts, **options)
        if group_size < 1:
            raise self.refusal(f'group_size must be >= 1, got {group_size}')
        self.group_size = group_size
        self.reset_parameters()

    def weigh(self, logits: Tensor, experts: Tensor) -> Tensor:
        """The sigmoid of each logit."""
        return logits.gather(1, experts).sigmoid()

    def route(self, x: Tensor, logits: Tensor, context: RoutingContext) -> Routing:
        logits = context.constrain(logits)
        if context.training:
            indices = balanced_assignment(logits.detach(), self.group_size)[:, None]
        else:
            indices = logits.argmax(1, keepdim=True)
        return Routing.from_topk(
            self.weigh(logits, indices),
            indices,
            self.num_experts,
            logits=logits,
            probabilities=logits.softmax(1),
        )


# Pure functions


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    r"""Logarithm of :math:`\mathrm{diag}(u) e^\ell \mathrm{diag}(v)` with even rows and columns.

    Each iteration scales the rows to sum to 1, then the columns to T/E; the last one leaves the
    columns exact. In logarithms, so that no logit overflows.

    Args:
        logits: (T, E); a column of -inf (an expert that is blocked) stays at -inf.
        iterations: How many.

    Returns:
        (T, E).
    """
    num_items, num_experts = logits.shape
    blocked = logits.isneginf().all(0)
    share = (num_items / (num_experts - blocked.sum()).clamp(min=1)).log()
    v = torch.zeros_like(logits[:1])
    u = torch.zeros_like(logits[:, :1])
    for _ in range(iterations):
        u = -(logits + v).logsumexp(1, keepdim=True)
        v = share - (logits + u).logsumexp(0, keepdim=True)
        v = v.masked_fill(blocked, 0.0)
    return logits + u + v


def balanced_assignment(scores: Tensor, group_size: int = 1024) -> Tensor:
    """One expert per item, at most ceil(n / E) of a group's n items per expert, largest total.

    Args:
        scores: (T, E); an expert whose column is all -inf gets nothing.
        group_size: Groups are interleaved: item t is in group t mod ceil(T / group_size).

    Returns:
        (T,) long, on the device of ``scores``.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import, and no other router needs it

    num_items = scores.shape[0]
    values = scores.detach().cpu().double().numpy()
    is_open = ~np.isneginf(values).all(axis=0)
    experts = np.flatnonzero(is_open) if is_open.any() else np.arange(values.shape[1])
    # The solver refuses what is not finite; a diverged gate must fail in the loss, as elsewhere.
    values = np.nan_to_num(values[:, experts], nan=0.0, posinf=1e9, neginf=-1e9)
    chosen = np.zeros(num_items, dtype=np.int64)
    groups = math.ceil(num_items / group_size)
    for group in range(groups):
        part = values[group::groups]
        copies = math.ceil(len(part) / len(experts))
        rows, columns = linear_sum_assignment(np.tile(part, (1, copies)), maximize=True)
        places = np.empty(len(part), dtype=np.int64)
        places[rows] = experts[columns % len(experts)]
        chosen[group::groups] = places
    return torch.from_numpy(chosen).to(scores.device)
