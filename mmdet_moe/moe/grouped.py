r"""Two-layer feed-forward experts as one autograd function: the short way round the dispatch.

Axes: T items, P places per item, E experts, n (item, expert) pairs, r rows of one expert, d
channels, h hidden channels.

An expert that is a plain ``Linear``, or ``Linear, activation, Linear``, needs no autograd graph of
its own. Knowing what it computes,

.. math::
    y_t = \sum_{(t, e)} w_{te} \big(\phi(x_t W_e^\top + b_e) V_e^\top + c_e\big),

the experts write into one buffer, temporaries the size of a block of rows are used again by every
expert, nothing is concatenated, and what is cheap to have again in backward (the gathered rows,
:math:`\phi`) is not kept. Kept are the hidden pre-activations, as the dense module keeps them, and
the outputs where the combine weights learn. Fresh memory is what costs on a CPU: 40 MB take a third
of the time of the matrix product that fills them.

Anything else (dropout that is on, hooks, a subclass with a forward of its own, norms, ...) takes
the general way in :mod:`mmdet_moe.moe.dispatch`. Both give the same numbers up to rounding.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdet_moe.moe.routing import Routing

#: Rows an expert computes at a time on the CPU: its temporaries stay near the processor, and the
#: matrix products are long enough to be fast.
BLOCK_ROWS = 1024
#: Torch's grouped matrix product, under either of its names; None before torch 2.8.
GROUPED_MM: Callable[..., Tensor] | None = getattr(
    F, 'grouped_mm', getattr(torch, '_grouped_mm', None)
)


# Which experts are plain


@dataclass(frozen=True)
class Activation:
    """An elementwise function with its derivative.

    Attributes:
        forward: ``(input, out)`` writes phi(input).
        backward: ``(grad, kept, out)`` writes grad · phi'.
        plain: The function with an autograd graph.
        keeps_output: Whether ``kept`` is phi(input) and not the input.
    """

    forward: Callable[[Tensor, Tensor], Any]
    backward: Callable[[Tensor, Tensor, Tensor], Any]
    plain: Callable[[Tensor], Tensor]
    keeps_output: bool = False


_aten = torch.ops.aten


def _relu(module: nn.Module) -> Activation:
    return Activation(
        lambda x, out: torch.clamp_min(x, 0, out=out),
        lambda g, y, out: _aten.threshold_backward.grad_input(g, y, 0, grad_input=out),
        F.relu,
        keeps_output=True,
    )


def _gelu(module: nn.Module) -> Activation:
    how: str = module.approximate  # type: ignore[assignment]
    return Activation(
        lambda x, out: _aten.gelu.out(x, approximate=how, out=out),
        lambda g, x, out: _aten.gelu_backward.grad_input(g, x, approximate=how, grad_input=out),
        lambda x: F.gelu(x, approximate=how),
    )


def _silu(module: nn.Module) -> Activation:
    return Activation(
        lambda x, out: _aten.silu.out(x, out=out),
        lambda g, x, out: _aten.silu_backward.grad_input(g, x, grad_input=out),
        F.silu,
    )


#: The activations there is a derivative for, by exact type.
ACTIVATIONS: dict[type[nn.Module], Callable[[nn.Module], Activation]] = {
    nn.ReLU: _relu,
    nn.GELU: _gelu,
    nn.SiLU: _silu,
}

Chain = Callable[[Any], Sequence[nn.Module]]
#: What a module of exactly this type computes: these modules, one after the other.
CHAINS: dict[type[nn.Module], Chain] = {nn.Sequential: lambda module: list(module)}
#: Subclasses of ``nn.Linear`` with a forward of their own that computes the same.
LINEARS: set[type[nn.Module]] = {nn.Linear}


def register_chain(kind: type[nn.Module]) -> Callable[[Chain], Chain]:
    """Decorate a function that says which modules a module of type ``kind`` applies in turn.

    Exactly that type: a subclass may do otherwise. Return the module itself in a list where it
    does more than a chain.
    """

    def register(chain: Chain) -> Chain:
        CHAINS[kind] = chain
        return chain

    return register


@dataclass(frozen=True)
class PlainExpert:
    """``linears`` (one or two) with ``activation`` between two."""

    linears: tuple[nn.Linear, ...]
    activation: Activation | None = None
    #: Experts of one group have one signature: kind of activation, places of biases.
    signature: tuple[Any, ...] = ()

    @property
    def params(self) -> list[Tensor | None]:
        """Weight and bias of each linear layer."""
        return [p for linear in self.linears for p in (linear.weight, linear.bias)]


def plain_expert(expert: nn.Module) -> PlainExpert | None:
    """What ``expert`` computes if it is plain, else None.

    Read anew at each call, for hooks, training mode and the modules themselves may change.
    """
    linears: list[nn.Linear] = []
    activation: nn.Module | None = None
    todo = [expert]
    while todo:
        module = todo.pop(0)
        if _is_watched(module):
            return None
        kind = type(module)
        if kind in CHAINS:
            parts = list(CHAINS[kind](module))
            if any(part is module for part in parts):
                return None
            todo[:0] = parts
        elif kind is nn.Identity or (
            kind is nn.Dropout and (not module.training or module.p == 0)  # type: ignore[operator]
        ):
            continue
        elif kind in LINEARS and len(linears) < 2 and len(linears) == (activation is not None):
            assert isinstance(module, nn.Linear)
            linears.append(module)
        elif kind in ACTIVATIONS and len(linears) == 1 and activation is None:
            activation = module
        else:
            return None
    if len(linears) != (1 if activation is None else 2):
        return None
    function = None if activation is None else ACTIVATIONS[type(activation)](activation)
    shapes = [(tuple(m.weight.shape), m.bias is not None) for m in linears]
    dtypes = {m.weight.dtype for m in linears}
    if len(dtypes) != 1:
        return None
    how = getattr(activation, 'approximate', None)
    return PlainExpert(tuple(linears), function, (type(activation), how, *shapes, *dtypes))


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody wants to see the module called, or changed how."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or 'forward' in module.__dict__
    )


def _is_compiling() -> bool:
    """Whether torch.compile traces this call, and would rather see plain operations."""
    compiler = getattr(torch, 'compiler', None)  # since torch 2.1
    return hasattr(compiler, 'is_compiling') and compiler.is_compiling()  # type: ignore[union-attr]


def plain_experts(
    experts: Sequence[nn.Module] | nn.ModuleList, active: Sequence[int], items: Tensor
) -> list[PlainExpert] | None:
    """The active experts, if all are plain and alike and ``items`` are theirs, else None."""
    hooks = nn.modules.module
    if (
        items.ndim < 2
        or not items.numel()
        or not items.is_floating_point()
        or torch.jit.is_tracing()
        or _is_compiling()
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    ):
        return None
    found: list[PlainExpert] = []
    for e in active:
        expert = plain_expert(experts[e])
        if expert is None or (found and expert.signature != found[0].signature):
            return None
        found.append(expert)
    weight = found[0].linears[0].weight
    if items.shape[-1] != weight.shape[1] or items.device != weight.device:
        return None
    autocast = compute_dtype(items) is not None and weight.dtype != torch.float64
    return found if autocast or items.dtype == weight.dtype else None


def compute_dtype(items: Tensor) -> torch.dtype | None:
    """What autocast computes linear layers in here; None where it is off (or double)."""
    kind = items.device.type
    if items.dtype == torch.float64:
        return None
    if not hasattr(torch, 'get_autocast_dtype'):  # before torch 2.4
        if kind == 'cpu':
            return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


# Products


class Products:
    """The three matrix products of a linear layer, by torch's BLAS."""

    def linear(self, x: Tensor, w: Tensor | None, b: Tensor | None, out: Tensor) -> None:
        """x W^T + b, of (r, in), (out, in) and (out,)."""
        assert w is not None
        if b is None:
            torch.mm(x, w.t(), out=out)
        else:
            torch.addmm(b, x, w.t(), out=out)

    def times(self, grad: Tensor, w: Tensor, out: Tensor) -> None:
        """G W, of (r, out) and (out, in): the gradient of the input."""
        torch.mm(grad, w, out=out)

    def outer(self, grad: Tensor, x: Tensor) -> Tensor:
        """G^T X, of (r, out) and (r, in): the gradient of the weight."""
        return grad.t() @ x


class OneDNNProducts(Products):
    """The same by oneDNN's linear layer, which torch has for itself on x86.

    On few rows, as experts have them, it is faster than MKL by a tenth (AMD EPYC: 197 x 768 x
    3072 at 101, 109 and 104 instead of 91, 91 and 89 GFLOP/s). It gives fresh memory; the copy
    costs less than that.
    """

    def __init__(self) -> None:
        self.product = torch.ops.mkldnn._linear_pointwise

    def linear(self, x: Tensor, w: Tensor | None, b: Tensor | None, out: Tensor) -> None:
        out.copy_(self.product(x, w, b, 'none', [], ''))

    def times(self, grad: Tensor, w: Tensor, out: Tensor) -> None:
        out.copy_(self.product(grad, w.t(), None, 'none', [], ''))

    def outer(self, grad: Tensor, x: Tensor) -> Tensor:
        # Only where the result is wide does it gain by a transposed product.
        if grad.shape[1] > x.shape[1]:
            return grad.t() @ x
        return self.product(grad.t(), x.t(), None, 'none', [], '')


BLAS = Products()


@functools.cache
def onednn_products() -> Products:
    """oneDNN's, where this torch has them and they compute what they should; else BLAS's.

    The operator is torch's own (its compiler uses it), but not public: so it is tried first.
    """
    try:
        if not torch.backends.mkldnn.is_available():
            return BLAS
        found = OneDNNProducts()
        numbers = torch.arange(12, dtype=torch.float32)
        x, w, b = numbers[:6].view(2, 3), numbers.view(4, 3), numbers[:4]
        out, back = x.new_empty(2, 4), x.new_empty(2, 3)
        found.linear(x, w, b, out)
        found.times(out, w, back)
        good = out.equal(F.linear(x, w, b)) and back.equal(out @ w)
        return found if good and found.outer(x, out).equal(x.t() @ out) else BLAS
    except (AttributeError, RuntimeError, TypeError):
        return BLAS


def _onednn_is_on() -> bool:
    """Whether the user lets torch use oneDNN (``torch.backends.mkldnn.flags``)."""
    return getattr(torch._C, '_get_mkldnn_enabled', lambda: True)()


def products_of(x: Tensor) -> Products:
    """Whose products to use for tensors like ``x``."""
    if x.device.type != 'cpu' or x.dtype != torch.float32 or not _onednn_is_on():
        return BLAS
    return onednn_products()


# The function


@dataclass(frozen=True)
class Layout:
    """Where the pairs of a routing are; the tensors of it are handed over apart.

    Attributes:
        counts: Pairs of each active expert.
        num_items: T.
        uniform: k where every item has k pairs and ``inverse`` says where, else 0.
        in_order: See ``Routing``.
        learns: Whether there may be a backward; inside a function autograd does not tell.
    """

    counts: tuple[int, ...]
    num_items: int
    uniform: int
    in_order: bool
    learns: bool

    def blocks(self, rows: int) -> list[list[slice]]:
        """For each active expert its pairs, at most ``rows`` at a time, in pieces of equal size."""
        found, start = [], 0
        for count in self.counts:
            pieces = max(1, -(-count // rows))
            ends = [start + count * i // pieces for i in range(pieces + 1)]
            found.append([slice(a, b) for a, b in zip(ends, ends[1:], strict=False)])
            start += count
        return found


def run_plain_experts(experts: Sequence[PlainExpert], items: Tensor, routing: Routing) -> Tensor:
    """Combine the outputs of plain experts.

    Args:
        experts: The active ones, those with a count, in order.
        items: (T, ..., d).
        routing: Who takes what, on the items' device, with at least one pair.

    Returns:
        (T, ..., d_out), zeros for items no expert took.
    """
    params = [p for expert in experts for p in expert.params]
    weights = routing.weights
    dtype = compute_dtype(items)
    if dtype is not None:
        items = items.to(dtype)
        params = [None if p is None else p.to(dtype) for p in params]
    if weights is not None:
        weights = weights.to(items.dtype)
    uniform = 0
    if routing.inverse is not None:
        uniform = routing.inverse.numel() // routing.num_items
    layout = Layout(
        tuple(count for count in routing.counts if count),
        routing.num_items,
        uniform,
        routing.in_order,
        torch.is_grad_enabled(),
    )
    activation = experts[0].activation
    with torch.autocast(items.device.type, enabled=False):
        return _PlainExperts.apply(
            items, weights, routing.items, routing.inverse, layout, activation, *params
        )


class _PlainExperts(torch.autograd.Function):
    """See the module. Parameters are those of the active experts only: an idle one is not in the
    graph, so its gradients stay None and DDP sees that it was not used."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weights: Tensor | None,
        items: Tensor,
        inverse: Tensor | None,
        layout: Layout,
        activation: Activation | None,
        *params: Tensor | None,
    ) -> Tensor:
        rows = x.reshape(layout.num_items, -1)
        places, d = x.shape[1:-1].numel(), x.shape[-1]
        depth = 1 if activation is None else 2
        per = 2 * depth
        pairs = sum(layout.counts)
        out_channels = params[per - 2].shape[0]  # type: ignore[union-attr]
        y = x.new_empty((pairs, places * out_channels))
        need = ctx.needs_input_grad
        learns = layout.learns and (need[0] or any(need[6:]) or need[1])
        blocks = layout.blocks(_block_rows(x, places))
        most = max(s.stop - s.start for expert in blocks for s in expert)
        products = products_of(x)
        kept: Any = None
        buffer: Any = None
        gathered: Tensor | None = None
        if activation is not None:
            channels = params[0].shape[0]  # type: ignore[union-attr]
            if learns:
                kept = x.new_empty((pairs * places, channels))
            if not (learns and activation.keeps_output):
                buffer = x.new_empty((most * places, channels))
        if not layout.in_order:
            gathered = x.new_empty((most, rows.shape[1]))
        for e, pieces in enumerate(blocks):
            w, b, *last = params[per * e : per * (e + 1)]
            for s in pieces:
                xe = _take(rows, items, s, layout, gathered).reshape(-1, d)
                ye = y[s].view(-1, out_channels)
                if activation is None:
                    products.linear(xe, w, b, ye)
                    continue
                m = xe.shape[0]
                at = slice(s.start * places, s.stop * places)
                pre = buffer[:m] if kept is None else kept[at]
                products.linear(xe, w, b, pre)
                hidden = pre if kept is None or activation.keeps_output else buffer[:m]
                activation.forward(pre, hidden)
                products.linear(hidden, last[0], last[1], ye)
        out = _combine(y, weights, items, inverse, layout)
        ctx.layout, ctx.activation, ctx.shape = layout, activation, x.shape
        outputs = y if need[1] else None
        ctx.save_for_backward(x, weights, items, inverse, kept, outputs, *params)
        return out.view(*x.shape[:-1], out_channels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with torch.autocast(grad.device.type, enabled=False):
            return _PlainExperts._backward(ctx, grad)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, items, inverse, kept, y, *params = ctx.saved_tensors
        layout, activation = ctx.layout, ctx.activation
        need = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _again(ctx, grad, x, weights, items, layout, activation, params)
        places, d = ctx.shape[1:-1].numel(), ctx.shape[-1]
        per = 2 if activation is None else 4
        rows = x.reshape(layout.num_items, -1)
        grad = grad.reshape(layout.num_items, -1)
        out_channels = grad.shape[1] // places
        pairs = sum(layout.counts)
        blocks = layout.blocks(_block_rows(x, places))
        most = max(s.stop - s.start for expert in blocks for s in expert)
        products = products_of(x)
        dx = x.new_empty((pairs, rows.shape[1])) if need[0] else None
        dw = weights.new_empty(pairs) if need[1] else None
        taken: Any = None
        scaled: Any = None
        hidden: Any = None
        dh: Any = None
        if not layout.in_order:
            taken = x.new_empty((most, rows.shape[1]))
        if not layout.in_order or weights is not None:
            scaled = x.new_empty((most, grad.shape[1]))
        if activation is not None:
            dh = x.new_empty((most * places, params[0].shape[0]))
            hidden = None if activation.keeps_output else torch.empty_like(dh)
        grads: list[Tensor | None] = []
        for e, pieces in enumerate(blocks):
            w, b, *last = params[per * e : per * (e + 1)]
            wants = need[6 + per * e : 6 + per * (e + 1)]
            own = _Gradients(wants, products)
            for s in pieces:
                ge = _take(grad, items, s, layout, scaled)
                if dw is not None:
                    torch.linalg.vecdot(ge, y[s], out=dw[s])
                if weights is not None:
                    ge = torch.mul(ge, weights[s, None], out=scaled[: s.stop - s.start])
                ge = ge.reshape(-1, out_channels)
                xe = None
                if wants[0]:
                    xe = _take(rows, items, s, layout, taken).reshape(-1, d)
                if activation is not None:
                    m = ge.shape[0]
                    at = slice(s.start * places, s.stop * places)
                    he = kept[at]
                    if not activation.keeps_output and wants[2]:
                        activation.forward(kept[at], hidden[:m])
                        he = hidden[:m]
                    own.add(2, ge, he)
                    products.times(ge, last[0], dh[:m])
                    activation.backward(dh[:m], kept[at], dh[:m])
                    ge = dh[:m]
                own.add(0, ge, xe)
                if dx is not None:
                    products.times(ge, w, dx[s].view(-1, d))
            grads += own.values
        if dx is not None:
            dx = _combine(dx, None, items, inverse, layout).view(ctx.shape)
        return (dx, dw, None, None, None, None, *grads)


def grouped_mm_fits(experts: Sequence[PlainExpert], items: Tensor) -> bool:
    """Whether torch's grouped matrix product takes these experts: bfloat16 on a CUDA device of
    compute capability 8 or more, every row a multiple of 16 bytes."""
    if GROUPED_MM is None or items.device.type != 'cuda':
        return False
    if (compute_dtype(items) or items.dtype) != torch.bfloat16:
        return False
    sizes = [size for linear in experts[0].linears for size in linear.weight.shape]
    return torch.cuda.get_device_capability(items.device)[0] >= 8 and not any(s % 8 for s in sizes)


def grouped_mm_experts(
    experts: Sequence[PlainExpert], rows: Tensor, counts: Sequence[int]
) -> Tensor:
    """The outputs of plain experts by grouped matrix products: one launch per layer.

    Args:
        experts: The active ones.
        rows: (n, ..., d) items, grouped by expert.
        counts: Of each active expert, on the host, sum n; no wait for the device.

    Returns:
        (n, ..., d_out) outputs, without combine weights. Autograd differentiates it.
    """
    dtype = compute_dtype(rows) or rows.dtype
    shape = rows.shape
    places = shape[1:-1].numel()
    sizes = torch.tensor([count * places for count in counts])
    ends = sizes.cumsum(0).to(device=rows.device, dtype=torch.int32, non_blocking=True)
    sizes = sizes.to(rows.device, non_blocking=True)
    activation = experts[0].activation
    with torch.autocast(rows.device.type, enabled=False):
        x = rows.reshape(-1, shape[-1]).to(dtype)
        for layer in range(len(experts[0].linears)):
            linears = [expert.linears[layer] for expert in experts]
            weight = torch.stack([linear.weight.to(dtype) for linear in linears])
            if layer:
                assert activation is not None
                x = activation.plain(x)
            assert GROUPED_MM is not None
            x = GROUPED_MM(x, weight.transpose(1, 2), offs=ends)
            if linears[0].bias is not None:
                bias = torch.stack([linear.bias.to(dtype) for linear in linears])
                x = x + bias.repeat_interleave(sizes, dim=0, output_size=x.shape[0])
    return x.view(*shape[:-1], x.shape[1])


class _Gradients:
    """Weight and bias gradients of one expert, added up over its blocks."""

    def __init__(self, wants: Sequence[bool], products: Products) -> None:
        self.wants = wants
        self.products = products
        self.values: list[Tensor | None] = [None] * len(wants)

    def add(self, i: int, grad: Tensor, x: Tensor | None) -> None:
        """Those of layer weight ``i`` and its bias, from (r, out) gradients and (r, in) inputs."""
        if self.wants[i]:
            assert x is not None
            value = self.values[i]
            if value is None:
                self.values[i] = self.products.outer(grad, x)
            else:
                value.addmm_(grad.t(), x)
        if self.wants[i + 1]:
            bias = self.values[i + 1]
            total = grad.sum(0)
            self.values[i + 1] = total if bias is None else bias.add_(total)


def _block_rows(x: Tensor, places: int) -> int:
    """Pairs an expert computes at a time."""
    if x.device.type != 'cpu':
        return sys.maxsize  # the allocator uses memory again by itself, and launches cost
    return max(1, BLOCK_ROWS // places)


def _take(x: Tensor, items: Tensor, s: slice, layout: Layout, out: Tensor | None) -> Tensor:
    """(r, ...) rows of the pairs ``s``; in ``out`` where they must be gathered."""
    if layout.in_order:
        return x[s]
    assert out is not None
    return torch.index_select(x, 0, items[s], out=out[: s.stop - s.start])


def _combine(
    y: Tensor, weights: Tensor | None, items: Tensor, inverse: Tensor | None, layout: Layout
) -> Tensor:
    """(T, c) sum of each item's rows of (n, c), times their weights."""
    if layout.in_order:
        return y if weights is None else y * weights[:, None]
    k = layout.uniform
    if k == 1 and weights is None:
        assert inverse is not None
        return y.index_select(0, inverse)
    if y.device.type != 'cpu' or y.dtype != torch.float32 or not y.numel():
        if weights is not None:
            y = y * weights[:, None]
        if inverse is not None:
            y = y.index_select(0, inverse)
            return y if k == 1 else y.view(layout.num_items, k, -1).sum(1)
        return y.new_zeros((layout.num_items, y.shape[1])).index_add_(0, items, y)
    # Gather, weigh and sum in one pass over the memory.
    if inverse is None:
        inverse = items.argsort(stable=True)
        ends = torch.bincount(items, minlength=layout.num_items).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    else:
        starts = torch.arange(0, inverse.numel(), k, device=y.device)
    if weights is not None:
        weights = weights.index_select(0, inverse)
    return torch.embedding_bag(y, inverse, starts, False, 0, False, weights)[0]


def _again(
    ctx: Any,
    grad: Tensor,
    x: Tensor,
    weights: Tensor | None,
    items: Tensor,
    layout: Layout,
    activation: Activation | None,
    params: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradients with a graph (``create_graph``): by autograd, through plain operations."""
    need = ctx.needs_input_grad
    per = 2 if activation is None else 4
    parts = []
    chosen = x if layout.in_order else x.index_select(0, items)
    for e, xe in enumerate(chosen.split(layout.counts)):
        w, b, *last = params[per * e : per * (e + 1)]
        ye = F.linear(xe, w, b)  # type: ignore[arg-type]
        if activation is not None:
            ye = F.linear(activation.plain(ye), last[0], last[1])  # type: ignore[arg-type]
        parts.append(ye)
    y = torch.cat(parts)
    if weights is not None:
        y = y * weights.view(-1, *[1] * (y.ndim - 1))
    if not layout.in_order:
        y = y.new_zeros((layout.num_items, *y.shape[1:])).index_add(0, items, y)
    inputs: list[Any] = [x, weights, None, None, None, None, *params]
    wanted = [i for i, wants in enumerate(need) if wants]
    found = torch.autograd.grad(
        y, [inputs[i] for i in wanted], grad, create_graph=True, allow_unused=True
    )
    out: list[Tensor | None] = [None] * len(need)
    for i, value in zip(wanted, found, strict=True):
        out[i] = value
    return tuple(out)
