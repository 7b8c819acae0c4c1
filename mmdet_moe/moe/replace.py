"""Put MoE layers into an existing model, by name."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmdet_moe.moe.adapters import (
    DEFAULT_TARGETS,
    AdapterLayer,
    KroneckerFactors,
    build_adapters,
)
from mmdet_moe.moe.experts import FROZEN, change_norms, geometry, make_bypass, narrow_, norm_groups
from mmdet_moe.moe.layer import MoELayer, moe_layers
from mmdet_moe.moe.patches import Patches
from mmdet_moe.moe.registry import ROUTERS
from mmdet_moe.moe.routers import Router
from mmdet_moe.moe.state import RoutingState
from mmdet_moe.moe.targets import Target, describe_target, why_unsafe

#: What a spec may say, besides ``targets`` and ``router``, which it must.
OPTIONS = (
    'num_experts',
    'adapters',
    'granularity',
    'grid',
    'halo',
    'share_router',
    'image_size',
    'width',
    'bypass',
    'expert_norm',
    'balance',
    'noise',
    'noise_seed',
    'shared_experts',
    'shared_weight',
    'in_channels',
    'channel_dim',
    'per_item_args',
    'shared_args',
    'check_parent',
)

#: What of it goes with adapters.
ADAPTER_OPTIONS = (
    'targets',
    'router',
    'adapters',
    'granularity',
    'share_router',
    'image_size',
    'balance',
    'noise_seed',
    'check_parent',
)


class TargetError(ValueError):
    """A spec names no module, or one that cannot be replaced."""


@dataclass
class _Place:
    """One module to replace: every (parent, child name) it stands at."""

    name: str
    module: nn.Module
    parents: list[tuple[nn.Module, str]]
    spec: dict[str, Any]


def replace_modules(
    model: nn.Module, specs: Sequence[Mapping[str, Any]], state: RoutingState
) -> list[str]:
    """Replace modules of ``model`` by MoE layers whose experts are copies of them, in place.

    The first expert keeps the module's own parameters, so nothing loaded or initialised is lost. A
    module that stands in several places is replaced in all, by one layer. Everything is checked
    before anything is changed.

    Args:
        model: Any model.
        specs: Each a dict with

            * ``targets``: regular expression, or a list of them, for the *whole* module name;
            * ``router``: dict of a router, e.g. ``dict(type='PlanRouter', plan='plan.json')``;
            * ``num_experts``: E (with a PlanRouter the plan's, unless given to be checked);
            * ``adapters``: in the place of ``num_experts``, for linear layers: the layer itself is
              frozen and runs on every item, the experts are adapters beside it, e.g.
              ``dict(type='LoRA', ranks=[1, 2, 4, 8])``, see :mod:`mmdet_moe.moe.adapters`. The
              ``targets`` default to the query, key and value projection of every second block of a
              ViT, and with one rank there need be no ``router``;
            * ``granularity``: 'token', 'image' or 'patch'; by default the router's or the target's
              own; ``grid``: g of 'patch', and ``halo``: the places around a patch that its experts
              see, by default all that its outputs depend on;
            * ``share_router``: 'call' or 'image': all layers of the spec have one router, see
              :mod:`mmdet_moe.moe.sharing`; with 'image' the sides of what it sees are at most
              ``image_size`` (64);
            * ``width``: 'iso', a number or a share: narrow experts of residual blocks or FFNs, see
              :func:`~mmdet_moe.moe.experts.narrow_`;
            * ``bypass``: True for the residual form, see
              :func:`~mmdet_moe.moe.experts.make_bypass`;
            * ``expert_norm``: 'frozen' keeps the experts' batch norms in evaluation mode and their
              parameters fixed, ``dict(type='GN', num_groups=n)`` puts group norms in their places;
            * ``balance``: list of balance losses;
            * ``shared_experts``: number of experts beside the routed ones that every item takes,
              and ``shared_weight``, the weight of their mean (0.5; the routed ones get the rest);
            * ``noise``, ``noise_seed``: of upcycling, see :mod:`mmdet_moe.moe.upcycle`;
            * ``in_channels``, ``channel_dim``, ``per_item_args``, ``shared_args``: where a generic
              module does not tell, see :class:`~mmdet_moe.moe.layer.MoELayer`;
            * ``check_parent``: False replaces although the parent seems to read the module's
              attributes.
        state: The routing state the layers share.

    Returns:
        Full names of the layers, in the order of the model.

    Raises:
        TargetError: No match (near names are listed), a module matched twice or inside another,
            one that cannot be called, or whose parent reads its attributes or indexes it.
        TypeError, KeyError, ValueError: A spec that says something impossible.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> state = RoutingState()
        >>> spec = dict(targets=r'[02]', num_experts=3, router=dict(type='TopKRouter', k=1))
        >>> replace_modules(model, [spec], state)
        ['0', '2']
    """
    checked = [_checked_spec(spec, i) for i, spec in enumerate(specs)]
    places = _find_places(model, checked)
    # Build all before touching the model, so that an error leaves it as it was.
    layers: list[MoELayer] = []
    leaders: dict[int, MoELayer] = {}
    kronecker = _kronecker_factors(model)
    for place in places:
        build = _build if place.spec.get('adapters') is None else _build_with_adapters
        layer = build(place, state, leaders.get(id(place.spec)), kronecker)
        layers.append(layer)
        if layer.share is not None:
            leaders.setdefault(id(place.spec), layer)
    for place, layer in zip(places, layers, strict=True):
        for parent, child in place.parents:
            setattr(parent, child, layer)
    return [place.name for place in places]


def check_datasets(model: nn.Module, domains: Sequence[str], held_out: bool = False) -> None:
    """Let every router of ``model`` refuse data it was not made for.

    Args:
        model: A model with MoE layers.
        domains: The data's domains.
        held_out: Let the data have domains that a plan has not: those that are held out.

    Raises:
        ValueError: A plan's datasets are not ``domains``; both sides are listed.
    """
    for name, layer in moe_layers(model).items():
        try:
            layer.router.check_datasets(domains, held_out)
        except ValueError as error:
            raise ValueError(f'{name}: {error}') from None


def _checked_spec(spec: Mapping[str, Any], index: int) -> dict[str, Any]:
    if not isinstance(spec, Mapping):
        raise TypeError(f'MoE spec {index} must be a dict, got {spec!r}')
    known = ('targets', 'router', *OPTIONS)
    given = {key: value for key, value in spec.items() if key != '_scope_'}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise TypeError(f'MoE spec {index} has unknown keys {unknown}; known: {list(known)}')
    if given.get('adapters') is not None:
        _complete_adapter_spec(given, index)
    for key in ('targets', 'router'):
        if key not in given:
            raise KeyError(f'MoE spec {index} has no {key!r}: {given}')
    targets = given['targets']
    given['targets'] = [targets] if isinstance(targets, str) else list(targets)
    if not given['targets']:
        raise ValueError(f'MoE spec {index} has an empty list of targets')
    for pattern in given['targets']:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f'MoE spec {index}: {pattern!r} is not a regular expression: {error}'
            ) from None
    return given


def _find_places(model: nn.Module, specs: Sequence[dict[str, Any]]) -> list[_Place]:
    parents_of: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        # Not named_children(), which leaves out a module's second name in the same parent.
        for child, module in parent._modules.items():
            if module is not None:
                parents_of.setdefault(id(module), []).append((parent, child))

    names = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    inside = [f'{name}.' for name, module in names if isinstance(module, MoELayer)]
    names = [(n, m) for n, m in names if not n.startswith(tuple(inside))]
    places: dict[int, _Place] = {}
    for index, spec in enumerate(specs):
        for pattern in spec['targets']:
            matched = [(n, m) for n, m in names if re.fullmatch(pattern, n)]
            if not matched:
                raise TargetError(_no_match(pattern, [n for n, _ in names], index))
            for name, module in matched:
                known = places.get(id(module))
                if known is None:
                    places[id(module)] = _Place(name, module, parents_of[id(module)], spec)
                elif known.spec is not spec:
                    raise TargetError(f'{name!r} is matched by two MoE specs')
    order = {name: i for i, (name, _) in enumerate(names)}
    found = sorted(places.values(), key=lambda place: order[place.name])
    by_name = {place.name for place in found}
    for place in found:
        _refuse_unsafe(model, place, by_name)
    return found


def _refuse_unsafe(model: nn.Module, place: _Place, targets: set[str]) -> None:
    name = place.name
    parts = name.split('.')
    outer = next((n for i in range(1, len(parts)) if (n := '.'.join(parts[:i])) in targets), None)
    if outer is not None:
        raise TargetError(f'MoE target {name!r} is inside MoE target {outer!r}')
    if isinstance(place.module, MoELayer):
        raise TargetError(f'MoE target {name!r} is a MoE layer already')
    if isinstance(place.module, (nn.ModuleList, nn.ModuleDict)):
        kind = type(place.module).__name__
        inner = [f'{name}.{child}' for child, _ in place.module.named_children()]
        raise TargetError(
            f'MoE target {name!r} is a {kind}, which holds modules and computes nothing itself; '
            f'it holds {inner[:5]}'
        )
    if not place.spec.get('check_parent', True):
        return
    for other in (n for n, m in model.named_modules(remove_duplicate=False) if m is place.module):
        reason = why_unsafe(model, other)
        if reason is not None:
            raise TargetError(
                f'{other!r} cannot be a MoE target: {reason}, and a MoE layer has no such thing '
                f'(each expert has its own). Choose the module around it or another one'
            )


def _no_match(pattern: str, names: Sequence[str], index: int) -> str:
    plain = re.sub(r'\\(.)', r'\1', pattern)
    close = difflib.get_close_matches(plain, names, n=6, cutoff=0.5)
    if not close:
        last = re.findall(r'\w+', plain)[-1:]
        close = [name for name in names if last and last[0] in name.split('.')][:6]
    near = f'near names: {close}' if close else f'names begin like {list(names)[:6]}'
    inner = [n for n in names if re.search(pattern, n)]
    partly = f'; it matches a part of {inner[:3]}, the whole name is needed' if inner else ''
    return f'MoE spec {index}: no module is called {pattern!r}{partly}; {near}'


def _complete_adapter_spec(spec: dict[str, Any], index: int) -> None:
    """Defaults of a spec with adapters; refuse what goes with copies of the dense module only."""
    wrong = sorted(set(spec) - set(ADAPTER_OPTIONS))
    if wrong:
        raise ValueError(
            f'MoE spec {index} has adapters, with which {wrong} do not go; known: '
            f'{list(ADAPTER_OPTIONS)}'
        )
    spec.setdefault('targets', DEFAULT_TARGETS)
    ranks = spec['adapters'].get('ranks') if isinstance(spec['adapters'], Mapping) else None
    if isinstance(ranks, int) or (isinstance(ranks, Sequence) and len(ranks) == 1):
        spec.setdefault('router', {'type': 'SingleRouter'})


def _kronecker_factors(model: nn.Module) -> dict[tuple[int, int], KroneckerFactors]:
    """Those that layers of ``model`` own already, by (size, terms)."""
    found = (m for m in model.modules() if isinstance(m, KroneckerFactors))
    return {(m.u.shape[1], m.u.shape[0]): m for m in found}


def _build_with_adapters(
    place: _Place,
    state: RoutingState,
    leader: MoELayer | None,
    kronecker: dict[tuple[int, int], KroneckerFactors],
) -> MoELayer:
    spec = place.spec
    base = _sharing_copy(place.module)
    adapters, bias, owned = build_adapters(spec['adapters'], base, place.name, kronecker)
    assert isinstance(base, nn.Linear)
    target = describe_target(base, place.name)
    if leader is None:
        spec = {**spec, 'num_experts': len(adapters)}
        router = _build_router(dataclasses.replace(place, spec=spec), base.in_features)
    else:
        router = leader.router
    return AdapterLayer(
        base,
        adapters,
        router,
        state,
        bias=bias,
        kronecker=owned,
        granularity=spec.get('granularity'),
        default_granularity=target.default_granularity,
        granularities=target.granularities,
        balance=spec.get('balance') or (),
        name=place.name,
        in_channels=base.in_features,
        channel_dim=-1,
        noise_seed=spec.get('noise_seed', 0),
        dense_type=type(place.module).__name__,
        share=spec.get('share_router'),
        leader=leader,
        image_size=spec.get('image_size', 64),
    )


def _build(
    place: _Place, state: RoutingState, leader: MoELayer | None, kronecker: object = None
) -> MoELayer:
    spec, kind = place.spec, type(place.module).__name__
    # An adapter may change the module it is given: it gets a copy, and the original's tensors.
    target = describe_target(_sharing_copy(place.module), place.name)
    in_channels = spec.get('in_channels', target.in_channels)
    router = leader.router if leader is not None else _build_router(place, in_channels)
    shared = spec.get('shared_experts', 0)
    if not isinstance(shared, int) or shared < 0:
        raise ValueError(
            f'MoE target {place.name!r}: shared_experts must be a number >= 0, got {shared!r}'
        )
    # Of the dense module: what changes below keeps its shape.
    bypass = make_bypass(target.module, in_channels, place.name) if spec.get('bypass') else None
    patches = _patches(place, target, in_channels)
    expert, altered = _alter(place, target.module, in_channels, router, shared)
    experts = [expert]
    experts += [copy.deepcopy(expert) for _ in range(router.num_experts - 1 + shared)]
    return target.layer(
        experts[: router.num_experts],
        router,
        state,
        granularity=spec.get('granularity'),
        default_granularity=target.default_granularity,
        granularities=target.granularities,
        balance=spec.get('balance') or (),
        name=place.name,
        in_channels=in_channels,
        channel_dim=spec.get('channel_dim', target.channel_dim),
        per_item_args=spec.get('per_item_args', target.per_item_args),
        shared_args=spec.get('shared_args', target.shared_args),
        residual=target.residual,
        noise=spec.get('noise', 0.0),
        noise_seed=spec.get('noise_seed', 0),
        dense_type=kind,
        shared=experts[router.num_experts :],
        shared_weight=spec.get('shared_weight', 0.5),
        patches=patches,
        bypass=bypass,
        frozen_norms=spec.get('expert_norm') == FROZEN,
        altered=altered,
        share=spec.get('share_router'),
        leader=leader,
        image_size=spec.get('image_size', 64),
        drop=target.drop,
    )


def _build_router(place: _Place, in_channels: int | None) -> Router:
    spec = place.spec
    num_experts = spec.get('num_experts')
    if spec.get('share_router') == 'image':
        in_channels = 3
    router_cfg = dict(spec['router']) if isinstance(spec['router'], Mapping) else spec['router']
    defaults = {'num_experts': num_experts, 'in_channels': in_channels}
    defaults = {key: value for key, value in defaults.items() if value is not None}
    try:
        router = ROUTERS.build(router_cfg, **defaults)
    except TypeError as error:
        missing = [key for key in ('num_experts', 'in_channels') if f"'{key}'" in str(error)]
        if missing and 'missing' in str(error):
            raise TypeError(f'MoE target {place.name!r}: give {missing} in the spec') from None
        raise
    if isinstance(spec['router'], nn.Module):
        router = copy.deepcopy(router)
    if num_experts is not None and router.num_experts != num_experts:
        raise ValueError(
            f'MoE target {place.name!r}: num_experts={num_experts}, but its router has '
            f'{router.num_experts}'
        )
    return router


def _patches(place: _Place, target: Target, in_channels: int | None) -> Patches | None:
    """How the maps are cut, where the spec says so."""
    spec = place.spec
    grid, halo = spec.get('grid'), spec.get('halo')
    if spec.get('granularity') != 'patch':
        if grid is not None or halo is not None:
            raise ValueError(
                f"MoE target {place.name!r}: grid and halo are for granularity='patch'"
            )
        return None
    if 'patch' not in target.granularities:  # the layer says what is possible
        return None
    if not isinstance(grid, int) or isinstance(grid, bool) or grid < 1:
        raise ValueError(
            f"MoE target {place.name!r}: granularity='patch' needs grid=g, 1 or more, got {grid!r}"
        )
    if halo is not None and (not isinstance(halo, int) or halo < 0):
        raise ValueError(f'MoE target {place.name!r}: halo must be a number >= 0, got {halo!r}')
    found = geometry(target.module, in_channels, place.name)
    return Patches(grid, found.reach if halo is None else halo, found.stride)


def _alter(
    place: _Place, module: nn.Module, in_channels: int | None, router: Router, shared: int
) -> tuple[nn.Module, str]:
    """The expert, and in what it differs from the dense module, in words."""
    spec, name = place.spec, place.name
    width, norm = spec.get('width'), spec.get('expert_norm')
    groups = norm_groups(norm, name)
    altered = []
    if width is not None:
        k = getattr(router, 'k', None)
        runs = None if k is None else k + shared
        altered.append(narrow_(module, width, runs, in_channels, name, groups or 1))
    if norm is not None:
        module = change_norms(module, groups, name)
        altered.append('' if groups is None else 'they have group norms')
    return module, ' and '.join(part for part in altered if part)


def _sharing_copy(module: nn.Module) -> nn.Module:
    """A deep copy of ``module`` that shares its parameters and buffers."""
    memo: dict[int, Any] = {id(p): p for p in module.parameters()}
    memo.update({id(b): b for b in module.buffers()})
    return copy.deepcopy(module, memo)


__all__ = ['OPTIONS', 'Target', 'TargetError', 'check_datasets', 'replace_modules']
