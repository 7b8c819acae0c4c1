"""How fast our MoE layer is, and what memory it takes: against dense, the packages, the einsum.

    python benchmarks/moe_layer.py [--quick] [--out work_dirs/benchmarks/moe_layer.json] [--seed 0]
                                   [--only vit-s,vit-b,decoder,encoder-k1,encoder-k2,many,stage,
                                    encoder-1x10k,scaling] [--threads 1] [--rounds 0]
                                   [--max-gb 8] [--device cpu]

A step is forward, a loss on the output plus the method's own auxiliary losses, backward; gradients
start as None, as after ``zero_grad``. The methods of a shape run in turns in one process and the
median of each counts. With one thread, times are processor seconds (what the clock shows on an idle
machine), with more the clock's. Memory is the largest sum of tensor bytes that live at once during
a step, beyond what lived before it, by torch's own record; it includes the gradients.

Everybody does the same work: k experts' products for every token. The packages drop what does not
fit their capacity, so theirs is set to k·T/E, which makes T·k rows, or up to
2.5 % fewer where a package rounds it down; ours drops nothing.
Soft methods get T·k slots per image. "dense" is one FFN with k times the hidden width, "dense, one"
the FFN a single expert is, which is the static plan's own work.

With ``--device cuda`` steps run under bfloat16 autocast, times are the clock's between two waits
for the device, memory is what torch's allocator says. It has not been run: no GPU was at hand.

Prints one table, writes JSON, says PASS or FAIL per promise; exit 1 if one fails.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from _common import Promise, provenance, table, verdict, write_json
from torch import Tensor, nn
from torch.nn import functional as F

from mmdet_moe.moe import MoELayer, RoutingState

#: Times within this factor count as equal.
EQUAL = 1.03
#: What may still be called linear, or flat.
STRAIGHT = 1.15


@dataclass(frozen=True)
class Shape:
    """B images of N tokens (or maps of N x N) of d channels; E experts of hidden width h, k each.

    Attributes:
        limit: Promised time over the dense FFN's; None where none is promised.
    """

    name: str
    images: int
    tokens: int
    d: int
    hidden: int
    experts: int
    k: int
    activation: str = 'GELU'
    limit: float | None = 1.25
    kind: str = 'ffn'

    @property
    def text(self) -> str:
        size = f'{self.tokens}x{self.d}'
        if self.kind == 'stage':
            size = f'{self.d}x{self.tokens}x{self.tokens}'
        return f'{self.images}x{size} h{self.hidden} E{self.experts} k{self.k}'

    def input(self, seed: int) -> Tensor:
        """The batch."""
        g = torch.Generator().manual_seed(seed)
        if self.kind == 'stage':
            return torch.randn(self.images, self.d, self.tokens, self.tokens, generator=g)
        return torch.randn(self.images, self.tokens, self.d, generator=g)


SHAPES = [
    Shape('vit-s', 32, 197, 384, 1536, 6, 2),
    Shape('vit-b', 8, 197, 768, 3072, 8, 1, limit=1.5),
    Shape('decoder', 2, 1100, 256, 2048, 8, 1, 'ReLU'),
    Shape('encoder-k1', 2, 20000, 256, 2048, 8, 1, 'ReLU'),
    Shape('encoder-k2', 2, 20000, 256, 2048, 8, 2, 'ReLU'),
    # Of the encoder's kind, at a length at which the packages' one-hot tensors still fit.
    Shape('encoder-1x10k', 1, 10000, 256, 2048, 8, 2, 'ReLU', limit=None),
    Shape('many', 1, 4096, 512, 2048, 64, 2, limit=2.0),
    # The second stage of a small RetinaNet backbone, one expert per image.
    Shape('stage', 8, 40, 128, 128, 4, 1, 'ReLU', limit=None, kind='stage'),
]
GROUPS = [*(shape.name for shape in SHAPES), 'scaling']


# --- methods --------------------------------------------------------------------------------------


def ffn(shape: Shape, width: int = 1) -> nn.Sequential:
    """``Linear, activation, Linear``, ``width`` times as wide."""
    hidden = width * shape.hidden
    act: nn.Module = getattr(nn, shape.activation)()
    return nn.Sequential(nn.Linear(shape.d, hidden), act, nn.Linear(hidden, shape.d))


def stage(shape: Shape) -> nn.Sequential:
    """Two blocks of two 3x3 convolutions with batch norm."""
    parts: list[nn.Module] = []
    for _ in range(4):
        conv = nn.Conv2d(shape.d, shape.d, 3, padding=1, bias=False)
        parts += [conv, nn.BatchNorm2d(shape.d), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts)


class Method:
    """A module and how to call it: ``loss, output`` of a batch.

    Attributes:
        work: What its time is compared with: 'dense' or 'dense, one'.
    """

    work = 'dense'

    def __init__(self, module: nn.Module, call: Callable[[Tensor], tuple[Tensor, Any]]) -> None:
        self.module = module.train()
        self.call = call

    def step(self, x: Tensor, grad: Tensor) -> None:
        """Forward and backward from clean gradients."""
        self.module.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == 'cuda'):
            out, extra = self.call(x)
        loss = (out * grad).sum() if extra is None else (out * grad).sum() + extra
        loss.backward()

    def parameter_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.module.parameters())


def plain(module: nn.Module) -> Method:
    return Method(module, lambda x: (module(x), None))


def our_layer(shape: Shape, router: dict[str, Any], balance: bool, expert: Any = ffn) -> MoELayer:
    losses = [dict(type='ImportanceLoss', weight=0.01)] if balance else []
    return MoELayer(
        [expert(shape) for _ in range(shape.experts)],
        router,
        RoutingState(),
        balance=losses,
        in_channels=shape.d,
        default_granularity='image' if shape.kind == 'stage' else 'token',
    )


def ours_topk(shape: Shape) -> Method:
    """Our layer with the linear top-k router and the importance loss."""
    expert = stage if shape.kind == 'stage' else ffn
    layer = our_layer(
        shape, dict(type='TopKRouter', k=shape.k, noise=False), balance=True, expert=expert
    )

    def call(x: Tensor) -> tuple[Tensor, Any]:
        layer.state.begin(num_images=len(x), training=True)
        out = layer(x)
        return out, sum(layer.state.collect().values())

    return Method(layer, call)


def ours_plan(shape: Shape, domains: int, order: str = 'in turn') -> Method:
    """Our layer with a static plan and a batch of so many domains."""
    plan = {f'd{e}': f'e{e}' for e in range(shape.experts)}
    expert = stage if shape.kind == 'stage' else ffn
    layer = our_layer(shape, dict(type='PlanRouter', plan=plan), balance=False, expert=expert)
    names = [f'd{i % domains}' for i in range(shape.images)]
    if order == 'sorted':
        names.sort()

    def call(x: Tensor) -> tuple[Tensor, Any]:
        layer.state.begin(names, training=True)
        return layer(x), None

    method = Method(layer, call)
    method.work = 'dense, one'
    return method


def ours_soft(shape: Shape) -> Method:
    """Our Soft MoE with T·k slots per image."""
    slots = max(1, shape.tokens * shape.k // shape.experts)
    layer = our_layer(shape, dict(type='SoftMoERouter', slots=slots), balance=False)

    def call(x: Tensor) -> tuple[Tensor, Any]:
        layer.state.begin(num_images=len(x), training=True)
        return layer(x), None

    return Method(layer, call)


def mixture_of_experts(shape: Shape) -> Method:
    """``mixture-of-experts``: top-2 (its second expert off for k = 1), no biases in its experts."""
    package = importlib.import_module('mixture_of_experts')
    layer = package.MoE(
        dim=shape.d,
        num_experts=shape.experts,
        hidden_dim=shape.hidden,
        activation=getattr(nn, shape.activation),
        second_policy_train='all' if shape.k == 2 else 'none',
        capacity_factor_train=float(shape.k),
    )
    return Method(layer, lambda x: layer(x))


def st_moe(shape: Shape) -> Method:
    """``st-moe-pytorch`` around the same FFNs as ours (its own have a third more weights)."""
    package = importlib.import_module('st_moe_pytorch')
    layer = package.MoE(
        dim=shape.d,
        num_experts=shape.experts,
        gating_top_n=shape.k,
        threshold_train=0.0,
        capacity_factor_train=float(shape.k),
        experts=nn.ModuleList(ffn(shape) for _ in range(shape.experts)),
    )

    def call(x: Tensor) -> tuple[Tensor, Any]:
        found = layer(x)
        return found.outputs, found.total_aux_loss

    return Method(layer, call)


def soft_moe(shape: Shape) -> Method:
    """``soft-moe-pytorch`` with T·k slots per image."""
    package = importlib.import_module('soft_moe_pytorch')
    layer = package.SoftMoE(
        dim=shape.d,
        num_experts=shape.experts,
        num_slots=max(1, shape.tokens * shape.k // shape.experts),
        expert_mult=shape.hidden // shape.d,
    )
    if shape.activation != 'GELU':
        for expert in layer.experts.experts:
            expert[1] = getattr(nn, shape.activation)()
    return plain(layer)


class OneHot(nn.Module):
    """Dispatch by one-hot tensors (T, E, C) and einsum, as SF-MoE's code does; one group."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.gate = nn.Linear(shape.d, shape.experts, bias=False)
        self.experts = nn.ModuleList(ffn(shape) for _ in range(shape.experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, experts = self.shape.k, self.shape.experts
        rows = x.flatten(0, 1)
        capacity = -(-len(rows) * k // experts)
        p = self.gate(rows).softmax(1)
        weights, chosen = p.topk(k, 1)
        mask = F.one_hot(chosen, experts).float()  # (T, k, E)
        place = mask.flatten(0, 1).cumsum(0).view_as(mask) - 1
        mask = mask * (place < capacity)
        place = (place * mask).sum(2).long()  # (T, k)
        slot = F.one_hot(place.clamp(max=capacity - 1), capacity).float()
        combine = torch.einsum('tk,tke,tkc->tec', weights, mask, slot)
        dispatch = (combine != 0).to(x.dtype)
        inputs = torch.einsum('tec,td->ecd', dispatch, rows)
        outputs = torch.stack([f(part) for f, part in zip(self.experts, inputs, strict=True)])
        out = torch.einsum('tec,ecd->td', combine, outputs).view_as(x)
        return out, experts * (p.mean(0) * mask[:, 0].mean(0)).sum()


class AllMasked(nn.Module):
    """Every expert on every item, and most of it multiplied by zero, as MoA's code does."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        expert = stage if shape.kind == 'stage' else ffn
        self.shape = shape
        self.gate = nn.Linear(shape.d, shape.experts, bias=False)
        self.experts = nn.ModuleList(expert(shape) for _ in range(shape.experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = x.mean((2, 3)) if self.shape.kind == 'stage' else x
        p = self.gate(features).softmax(-1)
        weights, chosen = p.topk(self.shape.k, -1)
        gates = torch.zeros_like(p).scatter(-1, chosen, weights)
        more = [1] * (x.ndim - features.ndim + 1) if self.shape.kind == 'stage' else [1]
        parts = [
            f(x) * gates[..., e].reshape(*gates.shape[:-1], *more)
            for e, f in enumerate(self.experts)
        ]
        usage = p.flatten(0, -2).mean(0)
        return torch.stack(parts).sum(0), self.shape.experts * usage.square().sum()


def called(module: nn.Module) -> Method:
    return Method(module, lambda x: module(x))


OURS, SOFT = 'ours, top-k', 'ours, soft'
TOPK_PEERS = ('mixture-of-experts', 'st-moe-pytorch', 'one-hot einsum', 'all, masked')
SOFT_PEERS = ('soft-moe-pytorch',)
PLANS = ('ours, plan, 1 domain', 'ours, plan, mixed', 'ours, plan, sorted')


def methods(shape: Shape, max_gb: float) -> Iterator[tuple[str, Callable[[], Method] | str]]:
    """(name, how to build it, or why it is left out)."""
    expert = stage if shape.kind == 'stage' else ffn
    domains = min(shape.images, shape.experts)
    if shape.kind == 'stage':
        yield 'dense', lambda: plain(stage(shape))
    else:
        yield 'dense', lambda: plain(ffn(shape, shape.k))
    if shape.k > 1:
        yield 'dense, one', lambda: plain(expert(shape))
    yield OURS, lambda: ours_topk(shape)
    yield 'ours, plan, 1 domain', lambda: ours_plan(shape, 1)
    if domains > 1:
        yield 'ours, plan, mixed', lambda: ours_plan(shape, domains)
        yield 'ours, plan, sorted', lambda: ours_plan(shape, domains, 'sorted')
    if shape.kind == 'stage':
        yield 'all, masked', lambda: called(AllMasked(shape))
        return
    # float32 tensors over tokens and slots: of one sequence each, of the whole batch in ours.
    pairs = shape.tokens**2 * shape.k * shape.images * 4 / 2**30
    whole = (shape.tokens * shape.images) ** 2 * shape.k * 4 / 2**30
    wide = shape.tokens * shape.images * shape.hidden * shape.experts * 8 / 2**30

    def fits(gigabytes: float, build: Callable[[], Method]) -> Callable[[], Method] | str:
        return build if gigabytes <= max_gb else f'would take about {gigabytes:.0f} GB'

    yield SOFT, fits(4 * pairs, lambda: ours_soft(shape))
    if shape.k <= 2:
        yield 'mixture-of-experts', fits(6 * pairs, lambda: mixture_of_experts(shape))
    if shape.k >= 2:
        yield 'st-moe-pytorch', fits(8 * pairs, lambda: st_moe(shape))
    else:
        yield 'st-moe-pytorch', 'has no top-1'
    yield 'soft-moe-pytorch', fits(6 * pairs, lambda: soft_moe(shape))
    yield 'one-hot einsum', fits(4 * whole, lambda: called(OneHot(shape)))
    yield 'all, masked', fits(wide, lambda: called(AllMasked(shape)))


# --- measuring ------------------------------------------------------------------------------------


def peak_bytes(step: Callable[[], None], device: str) -> int:
    """Largest sum of live tensor bytes during ``step`` beyond those before it."""
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    deltas = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.nbytes())
    live = peak = 0
    for *_, delta in deltas:
        live += delta
        peak = max(peak, live)
    return peak


def seconds(threads: int, device: str) -> Callable[[], float]:
    """The clock: the processor's with one thread, else the wall's."""

    def after_waiting() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    if device == 'cuda':
        return after_waiting
    return time.process_time if threads == 1 else time.perf_counter


def gradient_of(x: Tensor) -> Tensor:
    """What a loss gives back to an output of the shape of ``x``."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device)


def measure(
    built: dict[str, Method],
    x: Tensor,
    rounds: int,
    budget: float,
    clock: Any,
    tick: Any,
    grad: Tensor | None = None,
) -> dict[str, list[float]]:
    """Seconds of each method's steps, in turns; fewer rounds where the budget of time is spent.

    ``grad`` is given back to the output, by default one of the shape of ``x``.
    """
    start = time.perf_counter()
    x = x.requires_grad_()
    grad = gradient_of(x) if grad is None else grad
    for method in built.values():
        method.step(x, grad)  # warm up
    times: dict[str, list[float]] = {name: [] for name in built}
    for i in range(rounds):
        for name, method in built.items():
            before = clock()
            method.step(x, grad)
            times[name].append(clock() - before)
            method.module.zero_grad(set_to_none=True)  # gradients of 64 experts are not small
            tick()
        if i >= 2 and time.perf_counter() - start > budget:
            break
    return times


def run_shape(shape: Shape, args: argparse.Namespace, tick: Any) -> dict[str, Any]:
    """All methods on a shape: times, memory, parameters."""
    built: dict[str, Method] = {}
    left_out: dict[str, str] = {}
    for name, build in methods(shape, args.max_gb):
        if isinstance(build, str):
            left_out[name] = build
            continue
        torch.manual_seed(args.seed)
        try:
            built[name] = build()
            built[name].module.to(args.device)
        except ImportError as error:
            left_out[name] = f'not installed ({error.name})'
    x = shape.input(args.seed).to(args.device)
    rounds = args.rounds or (3 if args.quick else 9)
    clock = seconds(args.threads, args.device)
    times = measure(built, x, rounds, 60 if args.quick else 600, clock, tick)
    grad = gradient_of(x)
    results = {}
    for name, method in built.items():
        method.module.zero_grad(set_to_none=True)
        x.grad = None
        results[name] = {
            'seconds': statistics.median(times[name]),
            'runs': times[name],
            'peak_mb': peak_bytes(lambda method=method: method.step(x, grad), args.device) / 2**20,
            'parameter_mb': method.parameter_bytes() / 2**20,
            'work': method.work if 'dense, one' in built else 'dense',
        }
        method.module.zero_grad(set_to_none=True)
        tick()
    for result in results.values():
        result['ratio'] = result['seconds'] / results[result['work']]['seconds']
    record = {'shape': asdict(shape), 'results': results, 'left_out': left_out}
    record['flops'] = {
        name: flops(built[name], shape.input(args.seed).to(args.device))
        for name in ('dense', 'dense, one', OURS, 'ours, plan, 1 domain')
        if name in built
    }
    return record


def flops(method: Method, x: Tensor) -> int:
    """Floating-point operations of the products of a step, by torch's own count."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        method.step(x.requires_grad_(), torch.ones_like(x))
    method.module.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def scaling(args: argparse.Namespace, tick: Any) -> dict[str, Any]:
    """Seconds of our layer as T grows at fixed E, and as E grows at fixed T."""
    rounds = args.rounds or (3 if args.quick else 9)

    def times(shapes: dict[str, Shape]) -> dict[str, float]:
        built = {name: ours_topk(shape) for name, shape in shapes.items()}
        for method in built.values():
            method.module.to(args.device)
        clock = seconds(args.threads, args.device)
        runs: dict[str, list[float]] = {name: [] for name in shapes}
        inputs = {
            name: shape.input(args.seed).to(args.device).requires_grad_()
            for name, shape in shapes.items()
        }
        for i in range(rounds + 1):
            for name, method in built.items():
                before = clock()
                method.step(inputs[name], torch.ones_like(inputs[name]))
                if i:
                    runs[name].append(clock() - before)
                tick()
        return {name: statistics.median(found) for name, found in runs.items()}

    base = dict(name='scaling', images=1, d=256, hidden=1024)
    tokens = (2048, 4096, 8192)
    experts = (2, 8, 16, 32)
    linear = times({f'T={t}': Shape(tokens=t, experts=8, k=1, **base) for t in tokens})
    flat = times({f'E={e}': Shape(tokens=8192, experts=e, k=1, **base) for e in experts})
    per_token = [linear[f'T={t}'] / t for t in tokens]
    return {
        'linear': linear,
        'flat': flat,
        'per_token': max(per_token[1:]) / per_token[0],
        'per_expert': max(flat.values()) / min(flat.values()),
    }


# --- the report -----------------------------------------------------------------------------------


def rows_of(record: dict[str, Any]) -> list[list[str]]:
    shape, results = Shape(**record['shape']), record['results']
    rows = []
    for name, r in results.items():
        rows.append([
            f'{shape.name} {shape.text}', name, f'{1e3 * r["seconds"]:.1f}', f'{r["ratio"]:.2f}',
            f'{r["peak_mb"]:.0f}', f'{r["peak_mb"] / results["dense"]["peak_mb"]:.2f}',
        ])  # fmt: skip
    for name, why in record['left_out'].items():
        rows.append([f'{shape.name} {shape.text}', name, why, '', '', ''])
    return rows


def promises(records: list[dict[str, Any]], scaled: dict[str, Any] | None) -> list[Promise]:
    """The figures of the issue, measured."""
    out = []
    for record in records:
        shape, results = Shape(**record['shape']), record['results']
        for mine, peers in ((OURS, TOPK_PEERS), (SOFT, SOFT_PEERS)):
            found = [name for name in peers if name in results]
            if mine not in results:
                continue
            if not found:
                text = f'{shape.name}: {mine} as fast as the fastest peer or faster'
                out.append(Promise(text, 'no peer ran: raise --max-gb', False))
                continue
            best = min(found, key=lambda name: results[name]['seconds'])
            ratio = results[mine]['seconds'] / results[best]['seconds']
            text = f'{shape.name}: {mine} as fast as the fastest peer or faster'
            out.append(Promise(text, f'{ratio:.2f}x of {best}', ratio <= EQUAL))
        if shape.limit is not None:
            ratio = results[OURS]['ratio']
            text = f'{shape.name}: within {shape.limit}x of the dense FFN'
            out.append(Promise(text, f'{ratio:.2f}x', ratio <= shape.limit))
        for name in PLANS:
            if name in results:
                ratio = results[name]['ratio']
                text = f'{shape.name}: {name} within 1.05x of the dense module'
                out.append(Promise(text, f'{ratio:.2f}x', ratio <= 1.05))
        mine = results[OURS]
        limit = 1.3 * results['dense']['peak_mb'] + mine['parameter_mb']
        text = f'{shape.name}: peak memory within 1.3x of dense + expert weights'
        out.append(
            Promise(text, f'{mine["peak_mb"]:.0f} of {limit:.0f} MB', mine['peak_mb'] <= limit)
        )
        counted = record['flops']
        one, plan = counted.get('dense, one', counted['dense']), counted['ours, plan, 1 domain']
        text = f"{shape.name}: a batch of one domain is exactly one expert's work"
        out.append(Promise(text, f'{plan / 1e9:.2f} of {one / 1e9:.2f} GFLOP', plan == one))
    if scaled is not None:
        value = scaled['per_token']
        text = f'cost linear in T (per token within {STRAIGHT}x from 2048 to 8192)'
        out.append(Promise(text, f'{value:.2f}x', value <= STRAIGHT))
        value = scaled['per_expert']
        text = f'cost flat in E at T·k/E >= 256 (within {STRAIGHT}x from 2 to 32 experts)'
        out.append(Promise(text, f'{value:.2f}x', value <= STRAIGHT))
    return out


def main() -> int:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true', help='3 rounds instead of 9')
    parser.add_argument('--out', default='work_dirs/benchmarks/moe_layer.json')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', default=','.join(GROUPS), help='comma-separated groups')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=0, help='default 3 with --quick, else 9')
    parser.add_argument('--max-gb', type=float, default=8, help='leave out what would take more')
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    args = parser.parse_args()
    groups = args.only.split(',')
    unknown = sorted(set(groups) - set(GROUPS))
    if unknown:
        parser.error(f'no group is called {unknown}; there are {GROUPS}')
    torch.set_num_threads(args.threads)
    origin = provenance(args.seed)
    origin['versions'] = {'torch': torch.__version__, **installed()}
    origin['threads'] = args.threads
    origin['device'] = args.device

    records: list[dict[str, Any]] = []
    scaled = None
    columns = (SpinnerColumn(), TextColumn('{task.description} {task.completed} steps'))
    progress = Progress(
        *columns, TimeElapsedColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty()
    )
    with progress:
        for shape in SHAPES:
            if shape.name not in groups:
                continue
            task = progress.add_task(shape.name, total=None)
            record = run_shape(shape, args, lambda task=task: progress.advance(task))
            records.append(record)
            found = {name: f'{r["ratio"]:.2f}x' for name, r in record['results'].items()}
            print(shape.name, shape.text, found, f'load {os.getloadavg()[0]:.1f}', flush=True)
        if 'scaling' in groups:
            task = progress.add_task('scaling', total=None)
            scaled = scaling(args, lambda: progress.advance(task))
            print('scaling', scaled, flush=True)
    head = ('shape', 'method', 'ms', 'x dense', 'peak MB', 'x dense')
    rows = [row for record in records for row in rows_of(record)]
    if rows:
        print(f'\n{table(head, rows)}\n')
    kept = promises(records, scaled)
    print(verdict(kept))
    write_json(args.out, {**origin, 'promises': kept, 'records': records, 'scaling': scaled})
    print(f'\n{args.out}: every run. {origin["command"]}, commit {origin["commit"]}')
    return 0 if all(promise.kept for promise in kept) else 1


def installed() -> dict[str, str]:
    """Versions of the packages we compare with."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ('mixture-of-experts', 'st-moe-pytorch', 'soft-moe-pytorch'):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = 'absent'
    return found


if __name__ == '__main__':
    sys.exit(main())
