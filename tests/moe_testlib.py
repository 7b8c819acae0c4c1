"""What the tests of mmdet_moe.moe, and of the models that hold its layers, share."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmdet_moe.moe import MoELayer, RoutingState, replace_modules

#: Three datasets, three experts, one each; 'mixed' is served by two experts.
ONE_EACH = {'a': 'e0', 'b': 'e1', 'c': 'e2'}
MIXED = {'a': 'e0', 'b': 'e1', 'mixed': {'e0': 0.25, 'e2': 0.75}}


def plan_router(plan: Any = None, **kwargs: Any) -> dict[str, Any]:
    return dict(type='PlanRouter', plan=ONE_EACH if plan is None else plan, **kwargs)


def topk_router(**kwargs: Any) -> dict[str, Any]:
    return dict(type='TopKRouter', **kwargs)


def learned_routers(plan: Any) -> dict[str, dict[str, Any]]:
    """Every learned router by a short name, with options that make a small test tell something.

    Args:
        plan: For those that take one; with prototypes.
    """
    return {
        'noisy': dict(type='TopKRouter', k=2, z_loss=0.1, jitter=0.1),
        'cosine': dict(type='CosineRouter', projection=8),
        'switch': dict(type='SwitchRouter', capacity_factor=1.0, prioritised=True),
        'gshard': dict(type='GShardRouter', capacity_factor=1.0),
        'expert-choice': dict(type='ExpertChoiceRouter'),
        'sinkhorn': dict(type='SinkhornRouter'),
        'sinkhorn-2': dict(type='SinkhornRouter', k=2, renormalize=True),
        'base': dict(type='BASERouter', group_size=7),
        'remoe': dict(type='ReMoERouter', coefficient=1.0),
        'damex': dict(type='DAMEXRouter', plan=plan, router=dict(type='TopKRouter', k=2)),
        'plan-prior': dict(type='PlanPriorRouter', plan=plan),
        'plan-prior-1': dict(type='PlanPriorRouter', plan=plan, k=1),
        'moe++': dict(type='MoEPPRouter', capacity_factor=2.0),
        'soft': dict(type='SoftMoERouter', slots=2),
    }


def moe_of(
    module: nn.Module, state: RoutingState | None = None, **spec: Any
) -> tuple[MoELayer, RoutingState]:
    """A MoE layer whose experts are copies of ``module``, which is left alone."""
    holder = nn.ModuleDict({'target': copy.deepcopy(module)})
    state = RoutingState() if state is None else state
    spec.setdefault('router', plan_router())
    replace_modules(holder, [dict(targets='target', **spec)], state)
    return holder['target'], state


def scatter_experts(layer: MoELayer, seed: int = 0) -> None:
    """Give every expert weights of its own, so that it matters which one ran."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.experts.parameters():
            p += 0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def item_by_item(layer: MoELayer, x: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    """The definition: each item through each of its experts, alone, times the weight."""
    rows = []
    for b, row in enumerate(weights):
        terms = [w * layer.experts[e](x[b : b + 1]) for e, w in enumerate(row) if w]
        rows.append(sum(terms[1:], terms[0]))
    return torch.cat(rows)


class ToyFFN(nn.Module):
    """A feed-forward block that adds its identity, as mmcv's FFN does."""

    def __init__(self, d: int = 6, hidden: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, d))
        self.scale = nn.Parameter(torch.full((d,), 0.5))
        self.embed_dims = d
        self.add_identity = True

    def forward(self, x: Tensor, identity: Tensor | None = None) -> Tensor:
        out = self.layers(x) * self.scale
        if not self.add_identity:
            return out
        return (x if identity is None else identity) + out


def two_processes(worker: Callable[[int, int, str], None], folder: Path) -> list[Any]:
    """Run ``worker(rank, port, folder)`` on two gloo ranks; what each saved as ``<rank>.pth``."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip('this torch has no gloo')
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    # Forked from a server that has imported torch once, for all tests of the session.
    torch.multiprocessing.get_context('forkserver').set_forkserver_preload(
        ['mmdet_moe.moe', 'pytest']
    )
    torch.multiprocessing.start_processes(
        worker, (port, str(folder)), nprocs=2, start_method='forkserver'
    )
    return [torch.load(folder / f'{rank}.pth') for rank in range(2)]
