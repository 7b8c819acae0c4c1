"""Run each expert on just its items, and add the results back.

Axes: T items, E experts, n (item, expert) pairs, d channels.

Items are gathered once, grouped by expert, so that each expert sees one contiguous piece; the
outputs are scaled by their combine weights and added back. Memory is n·d, whatever E is: there is
no one-hot tensor over experts and capacity. A batch that goes to one expert is that expert's plain
call. Experts that are plain two-layer FFNs take a shorter way, :mod:`mmdet_moe.moe.grouped`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmdet_moe.moe.grouped import (
    grouped_mm_experts,
    grouped_mm_fits,
    plain_experts,
    run_plain_experts,
)
from mmdet_moe.moe.routing import Routing


class _Gather(torch.autograd.Function):
    """``x[items]`` where every item has k pairs; its adjoint is :class:`_Combine`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, items: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(items, inverse)
        ctx.num_items = x.shape[0]
        return x.index_select(0, items)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _Combine.apply(grad, *ctx.saved_tensors, ctx.num_items), None, None


class _Combine(torch.autograd.Function):
    """The sum of each item's k rows of (n, ...), without a scatter-add."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, y: Tensor, items: Tensor, inverse: Tensor, num_items: int
    ) -> Tensor:
        ctx.save_for_backward(items, inverse)
        y = y.index_select(0, inverse)
        if y.shape[0] == num_items:
            return y
        return y.view(num_items, -1, *y.shape[1:]).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _Gather.apply(grad, *ctx.saved_tensors), None, None, None


def run_experts(
    experts: Sequence[nn.Module] | nn.ModuleList,
    items: Tensor,
    routing: Routing,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    per_item: Callable[[int | str, Any], bool] | None = None,
) -> Any:
    """Combine the experts' outputs over the items routed to them.

    .. math:: y_t = \\sum_{(t, e)} w_{te} f_e(x_t)

    Args:
        experts: E modules; each takes (n_e, ...) items and gives (n_e, ...) outputs, or nested
            tuples, lists and dicts of such tensors. An expert with no item is not called.
        items: (T, ...) items on dimension 0.
        routing: Who takes what.
        args: Further positional arguments of the experts.
        kwargs: Further keyword arguments.
        per_item: Whether the argument at a position (0 is the first of ``args``) or of a name has
            one row per item and is gathered with them; others go to every expert whole.

    Returns:
        As an expert's output, with T rows; zeros for items no expert took.
    """
    kwargs = kwargs or {}
    if routing.expert is not None:
        return experts[routing.expert](items, *args, **kwargs)
    pairs = sum(routing.counts)
    if pairs == 0:
        return _nothing(experts[0], items, args, kwargs, per_item)

    routing = routing.on(items.device)
    order, inverse, weights = routing.items, routing.inverse, routing.weights
    assert order is not None
    if torch.jit.is_tracing():  # an analyser of costs cannot look into functions of our own
        inverse = None
    active = [e for e, count in enumerate(routing.counts) if count]
    plain = None if args or kwargs else plain_experts(experts, active, items)
    if plain is not None and not grouped_mm_fits(plain, items):
        return run_plain_experts(plain, items, routing)

    def grouped_by_expert(x: Tensor) -> Tensor:
        if routing.in_order:
            return x
        return x.index_select(0, order) if inverse is None else _Gather.apply(x, order, inverse)

    def pieces(x: Tensor) -> Sequence[Tensor]:
        return grouped_by_expert(x).split(routing.counts)

    def combine(parts: Sequence[Tensor]) -> Tensor:
        y = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        if y.shape[0] != pairs:
            raise ValueError(
                f'the experts gave {y.shape[0]} rows for {pairs} items: an expert must keep '
                f'dimension 0'
            )
        if weights is not None:
            y = y * weights.to(y.dtype).view(-1, *[1] * (y.ndim - 1))
        if routing.in_order:
            return y
        if inverse is not None:
            return _Combine.apply(y, order, inverse, routing.num_items)
        out = y.new_zeros((routing.num_items, *y.shape[1:]))
        return out.index_add_(0, order, y)

    if plain is not None:
        counts = [routing.counts[e] for e in active]
        return combine([grouped_mm_experts(plain, grouped_by_expert(items), counts)])
    chunks = pieces(items)
    args_of = [
        pieces(value) if per_item is not None and per_item(i, value) else None
        for i, value in enumerate(args)
    ]
    kwargs_of = {
        key: pieces(value) if per_item is not None and per_item(key, value) else None
        for key, value in kwargs.items()
    }
    outputs = []
    for e in active:
        own_args = [args[i] if part is None else part[e] for i, part in enumerate(args_of)]
        own_kwargs = {k: kwargs[k] if part is None else part[e] for k, part in kwargs_of.items()}
        outputs.append(experts[e](chunks[e], *own_args, **own_kwargs))
    return _map_trees(combine, outputs)


def add_experts(
    out: Tensor, experts: Sequence[nn.Module] | nn.ModuleList, items: Tensor, routing: Routing
) -> Tensor:
    """Add the experts' outputs to ``out``, in place, where the experts are adapters of it.

    .. math:: y_t \\leftarrow y_t + \\sum_{(t, e)} w_{te} f_e(x_t)

    An adapter is narrow inside and wide at its end: it takes the combine weights itself, and puts
    them where it is narrow. Nothing of the output's size is concatenated, weighed or gathered.

    Args:
        out: (T, ..., d_out) that nobody needs as it was.
        experts: E adapters, called ``expert(x, weights)`` with (n_e, ..., d) items and (n_e,)
            weights or None; each gives (n_e, ..., d_out).
        items: (T, ..., d).
        routing: Who takes what.
    """
    if routing.expert is not None:
        return out.add_(experts[routing.expert](items, None).to(out.dtype))
    if not sum(routing.counts):
        return out
    routing = routing.on(items.device)
    order, inverse, weights = routing.items, routing.inverse, routing.weights
    assert order is not None
    rows = items
    if not routing.in_order:
        traced = inverse is None or torch.jit.is_tracing()
        rows = items.index_select(0, order) if traced else _Gather.apply(items, order, inverse)
    parts = zip(
        experts,
        rows.split(routing.counts),
        order.split(routing.counts),
        [None] * len(routing.counts) if weights is None else weights.split(routing.counts),
        strict=True,
    )
    for expert, x, places, w in parts:
        if len(places):  # one without items does not run
            out = out.index_add_(0, places, expert(x, w).to(out.dtype))
    return out


def _nothing(
    expert: nn.Module,
    items: Tensor,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    per_item: Callable[[int | str, Any], bool] | None,
) -> Any:
    """Zeros of the shape an expert would give, for a batch in which no item has an expert.

    The expert runs in evaluation mode and without gradients: it has no item, so neither its
    statistics nor its weights may move.
    """

    def probe(x: Tensor) -> Tensor:
        return x.new_zeros((1, *x.shape[1:]))

    def argument(key: int | str, value: Any) -> Any:
        return probe(value) if per_item is not None and per_item(key, value) else value

    modes = [(module, module.training) for module in expert.modules()]
    expert.eval()
    try:
        with torch.no_grad():
            out = expert(
                probe(items),
                *[argument(i, value) for i, value in enumerate(args)],
                **{key: argument(key, value) for key, value in kwargs.items()},
            )
    finally:
        for module, training in modes:
            module.training = training
    rows = items.shape[0]
    return _map_trees(lambda parts: parts[0].new_zeros((rows, *parts[0].shape[1:])), [out])


def _map_trees(function: Callable[[Sequence[Tensor]], Tensor], trees: Sequence[Any]) -> Any:
    """Apply ``function`` to the tensors at the same place of equal nested structures."""
    first = trees[0]
    if isinstance(first, Tensor):
        return function(trees)
    if isinstance(first, (tuple, list)):
        parts = [_map_trees(function, leaves) for leaves in zip(*trees, strict=True)]
        return type(first)(*parts) if hasattr(first, '_fields') else type(first)(parts)
    if isinstance(first, dict):
        return {key: _map_trees(function, [tree[key] for tree in trees]) for key in first}
    if first is None:
        return None
    raise TypeError(f'an expert gave a {type(first).__name__}; tensors and nests of them combine')
