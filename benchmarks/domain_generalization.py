"""SF-MoE, GMoE and MoA layers: time and memory against computing all experts, and one-hot dispatch.

    python benchmarks/domain_generalization.py [--quick] [--only sf-moe,gmoe,lora,kadaptation]
        [--images 32] [--rounds 0] [--threads 1] [--seed 0]
        [--out work_dirs/benchmarks/domain_generalization.json]

A step is forward, a loss on the output and the router's own losses, backward to weights and input.
The forms of a layer hold the *same* experts and gate, run in turns in one process, and the median
of each counts: processor seconds with one thread, the clock's with more. Memory is the largest sum
of tensor bytes that live at once during a step, beyond those before it, gradients included. Shapes
are those of ViT-S (SF-MoE, GMoE: FFN 384 -> 1536 -> 384, 6 experts) and of ViT-B (MoA: the frozen
fused qkv 768 -> 2304 with adapters of ranks 1, 2, 4, 8, one per token, cosine gate 256 wide), 197
tokens an image.

* *ours*: only the chosen experts run.
* *all, summed*: every expert on every token, times its gate (mostly 0), added to one sum.
* *all, stacked*: the same, but outputs are stacked to (T, E, d) first, then masked and summed.
* *one-hot*: dispatch tensors (image, token, expert, place) and einsum, capacity 1.25 times the even
  share per image; it drops what is over, ours drops nothing.

KAdaptation's forms that compute all differ in how they get Delta. *summed* and *stacked* run our
adapters, which never make it; *made once* makes it by one matrix product; *term by term* makes all
64 Kronecker products (64, d, d') and sums them up, as a straightforward implementation of the
formula does. Both have the paper's dropout of Delta's entries.

The promise: MoA at least twice as fast as computing all. Each line says which form it is against;
exit 1 if one fails.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from _common import Promise, provenance, table, verdict, write_json
from moe_layer import Method, Shape, ffn, gradient_of, measure, peak_bytes, seconds
from torch import Tensor, nn
from torch.nn import functional as F

from mmdet_moe.moe import MoELayer, RoutingState, replace_modules

TOKENS = 197
RANKS = [1, 2, 4, 8]
BALANCE = [dict(type='ImportanceLoss', weight=0.005), dict(type='LoadLoss', weight=0.005)]
OURS = 'ours'
#: What MoA is promised to be twice as fast as, per kind of adapter.
PEERS = {
    'lora': ('all, stacked', 'all, summed'),
    'kadaptation': ('all, term by term', 'all, made once', 'all, stacked', 'all, summed'),
}


class Other(nn.Module):
    """Another form of a layer: its experts and gate are the layer's own.

    Args:
        layer: Ours.
        experts: What computes; by default the layer's experts.
    """

    def __init__(self, layer: MoELayer, experts: Any = None) -> None:
        super().__init__()
        self.layer = layer
        self.experts = nn.ModuleList(layer.experts if experts is None else experts)
        self.k = layer.router.k
        self.base = layer._modules.get('base')

    def gates(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, E) probabilities, (T, k) weights and experts."""
        logits = self.layer.router.logits(rows)
        p = (logits + torch.randn_like(logits) / len(self.experts)).softmax(1)
        return p, *p.topk(self.k, 1)


class All(Other):
    """Every expert on every token."""

    stacked = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.flatten(0, 1)
        p, weights, chosen = self.gates(rows)
        gates = torch.zeros_like(p).scatter(1, chosen, weights)
        if self.stacked:
            parts = torch.stack([expert(rows) for expert in self.experts], 1)
            out = (parts * gates[:, :, None]).sum(1)
        else:
            out = sum(gates[:, e, None] * expert(rows) for e, expert in enumerate(self.experts))
        if self.base is not None:
            out = self.base(rows) + out
        return out.view(*x.shape[:2], -1), p.mean(0).square().sum()


class Stacked(All):
    """The same, masked after all are computed."""

    stacked = True


class OneHot(Other):
    """Dispatch by einsum within each image, as SF-MoE's code does."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        images, tokens, _ = x.shape
        p, weights, chosen = self.gates(x.flatten(0, 1))
        experts = len(self.experts)
        capacity = int(1.25 * tokens * self.k / experts)
        mask = F.one_hot(chosen, experts).view(images, tokens, self.k, experts).to(x.dtype)
        # Places by choice: first choices of all tokens come before second ones.
        order = mask.transpose(1, 2).reshape(images, -1, experts)
        place = (order.cumsum(1) - 1).view(images, self.k, tokens, experts).transpose(1, 2)
        mask = mask * (place < capacity)
        slot = F.one_hot((place * mask).sum(-1).long().clamp(max=capacity - 1), capacity).to(
            x.dtype
        )
        combine = torch.einsum(
            'bnk,bnke,bnkc->bnec', weights.view(images, tokens, self.k), mask, slot
        )
        inputs = torch.einsum('bnec,bnd->ebcd', (combine != 0).to(x.dtype), x)
        outputs = torch.stack([f(part) for f, part in zip(self.experts, inputs, strict=True)])
        out = torch.einsum('bnec,ebcd->bnd', combine, outputs)
        if self.base is not None:
            out = self.base(x) + out
        return out, p.mean(0).square().sum()


class Made(nn.Module):
    """An adapter whose Delta is made, with the paper's dropout of its entries.

    Args:
        adapter: A KAdaptation.
        by_term: Make every Kronecker product.
    """

    def __init__(self, adapter: Any, by_term: bool) -> None:
        super().__init__()
        self.adapter, self.by_term = adapter, by_term

    def forward(self, x: Tensor) -> Tensor:
        a = self.adapter
        if not self.by_term:
            return F.linear(x, F.dropout(a.delta(), a.dropout))
        outer = a.kronecker.u[:, :, None] * a.kronecker.v[:, None, :]
        terms = torch.einsum('jab,jkl->jakbl', outer, a.L @ a.R)
        delta = terms.reshape(len(outer), a.in_features, a.out_features).sum(0)
        return x @ F.dropout(delta, a.dropout)


class LinearAlone(nn.Module):
    """The frozen layer."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.base = layer._modules['base']

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.base(x), None


def ours(layer: MoELayer) -> Method:
    def call(x: Tensor) -> tuple[Tensor, Any]:
        layer.state.begin(num_images=len(x), training=True)
        out = layer(x)
        return out, sum(layer.state.collect().values())

    return Method(layer, call)


def other(module: nn.Module) -> Method:
    return Method(module, lambda x: module(x))


def ffn_layer(shape: Shape, router: dict[str, Any], balance: list[dict[str, Any]]) -> MoELayer:
    return MoELayer(
        [ffn(shape) for _ in range(shape.experts)],
        router,
        RoutingState(),
        balance=balance,
        in_channels=shape.d,
        default_granularity='token',
    )


def adapter_layer(kind: str, **options: Any) -> MoELayer:
    """The qkv layer of ViT-B with adapters, as after some training: no factor is zero."""
    model, state = nn.ModuleDict({'qkv': nn.Linear(768, 2304)}), RoutingState()
    spec = dict(
        targets='qkv',
        adapters=dict(type=kind, ranks=RANKS, **options),
        router=dict(type='CosineRouter'),
        balance=BALANCE,
    )
    replace_modules(model, [spec], state)
    layer = model['qkv']
    for parameter in layer.experts.parameters():
        nn.init.normal_(parameter, std=0.05)
    return layer


def forms(group: str, shape: Shape) -> dict[str, Method]:
    """The forms of a layer by name, ours first (after the frozen layer alone)."""
    if group in ('sf-moe', 'gmoe'):
        sf = group == 'sf-moe'
        router = dict(type='GShardRouter') if sf else dict(type='CosineRouter')
        layer = ffn_layer(shape, router, [dict(type='SwitchLoss', weight=0.01)] if sf else BALANCE)
        found = {'dense FFN of k experts': other(Tupled(ffn(shape, shape.k)))}
        found[OURS] = ours(layer)
        return {**found, **common(layer)}
    layer = adapter_layer({'lora': 'LoRA', 'kadaptation': 'KAdaptation'}[group])
    found = {'frozen Linear alone': other(LinearAlone(layer)), OURS: ours(layer)}
    if group == 'kadaptation':
        weights = adapter_layer('KAdaptation', dropout_on='weights')
        found["ours, dropout_on='weights'"] = ours(weights)
        for name, by_term in (('all, made once', False), ('all, term by term', True)):
            found[name] = other(All(layer, [Made(e, by_term) for e in layer.experts]))
    return {**found, **common(layer)}


class Tupled(nn.Module):
    """A module whose forward gives its output and no loss."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.module(x), None


def common(layer: MoELayer) -> dict[str, Method]:
    return {
        'all, summed': other(All(layer)),
        'all, stacked': other(Stacked(layer)),
        'one-hot': other(OneHot(layer)),
    }


GROUPS: dict[str, Callable[[int], Shape]] = {
    'sf-moe': lambda images: Shape('sf-moe', images, TOKENS, 384, 1536, 6, 2),
    'gmoe': lambda images: Shape('gmoe', images, TOKENS, 384, 1536, 6, 1),
    'lora': lambda images: Shape('lora', images, TOKENS, 768, 2304, 4, 1),
    'kadaptation': lambda images: Shape('kadaptation', images, TOKENS, 768, 2304, 4, 1),
}


def run_group(group: str, args: argparse.Namespace, tick: Callable[[], None]) -> dict[str, Any]:
    """Times and memory of a layer's forms."""
    shape = GROUPS[group](args.images)
    torch.manual_seed(args.seed)
    built = forms(group, shape)
    x = shape.input(args.seed)
    rounds = args.rounds or (3 if args.quick else 7)
    grad = gradient_of(torch.empty(*x.shape[:2], width(shape)))
    times = measure(built, x, rounds, 600, seconds(args.threads, 'cpu'), tick, grad)
    results = {}
    for name, method in built.items():
        method.module.zero_grad(set_to_none=True)
        peak = peak_bytes(lambda method=method: method.step(x, grad), 'cpu')
        results[name] = {
            'seconds': statistics.median(times[name]),
            'runs': times[name],
            'peak_mb': peak / 2**20,
        }
        method.module.zero_grad(set_to_none=True)
        tick()
    return {'group': group, 'text': text(shape), 'results': results}


def width(shape: Shape) -> int:
    """Channels of the output: MoA's linear layer is wider than its input."""
    return shape.d if shape.name in ('sf-moe', 'gmoe') else shape.hidden


def text(shape: Shape) -> str:
    inner = f'h{shape.hidden}' if width(shape) == shape.d else f'-> {shape.hidden}'
    return f'{shape.images}x{shape.tokens}x{shape.d} {inner} E{shape.experts} k{shape.k}'


def promises(records: list[dict[str, Any]]) -> list[Promise]:
    """MoA twice as fast as computing all; SF-MoE and GMoE no slower than either form."""
    found = []
    for record in records:
        results, group = record['results'], record['group']
        mine = results[OURS]['seconds']
        if group in PEERS:
            for peer in PEERS[group]:
                ratio = results[peer]['seconds'] / mine
                found.append(Promise(
                    f'MoA, {group}: at least 2x faster than {peer!r}', f'{ratio:.2f}x', ratio >= 2
                ))  # fmt: skip
            alone = results['frozen Linear alone']['seconds']
            peer = PEERS[group][-1]
            ratio = (results[peer]['seconds'] - alone) / (mine - alone)
            print(f'{group}: beyond the frozen Linear, gate included, {ratio:.1f}x of {peer!r}')
            continue
        for peer in ('all, summed', 'all, stacked', 'one-hot'):
            ratio = results[peer]['seconds'] / mine
            found.append(Promise(f'{group}: faster than {peer!r}', f'{ratio:.2f}x', ratio >= 1))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true', help='3 rounds instead of 7')
    parser.add_argument('--out', default='work_dirs/benchmarks/domain_generalization.json')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', default=','.join(GROUPS), help='comma-separated groups')
    parser.add_argument('--images', type=int, default=32)
    parser.add_argument('--rounds', type=int, default=0, help='default 3 with --quick, else 7')
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args()
    groups = args.only.split(',')
    unknown = sorted(set(groups) - set(GROUPS))
    if unknown:
        parser.error(f'no group is called {unknown}; there are {list(GROUPS)}')
    torch.set_num_threads(args.threads)
    origin = provenance(args.seed)
    origin['versions'] = {'torch': torch.__version__}
    origin['threads'] = args.threads

    records = []
    for group in groups:
        records.append(run_group(group, args, lambda: None))
        print(group, f'done, load {os.getloadavg()[0]:.1f}', flush=True)
    rows = []
    for record in records:
        own = record['results'][OURS]
        for name, r in record['results'].items():
            rows.append([
                f'{record["group"]} {record["text"]}', name, f'{1e3 * r["seconds"]:.0f}',
                f'{r["seconds"] / own["seconds"]:.2f}', f'{r["peak_mb"]:.0f}',
                f'{r["peak_mb"] / own["peak_mb"]:.2f}',
            ])  # fmt: skip
    print('\n' + table(('layer', 'form', 'ms', 'x ours', 'peak MB', 'x ours'), rows) + '\n')
    kept = promises(records)
    print(verdict(kept))
    write_json(args.out, {**origin, 'promises': kept, 'records': records})
    print(f'\n{args.out}: every run. {origin["command"]}, commit {origin["commit"]}')
    return 0 if all(promise.kept for promise in kept) else 1


if __name__ == '__main__':
    sys.exit(main())
