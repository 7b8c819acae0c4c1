"""Upcycling: experts that start as a dense module.

After :func:`~mmdet_moe.moe.replace.replace_modules` every expert is a copy of the module it
replaced. The model's own ``init_weights`` then initialises each of them differently, and routers
along with them; :func:`upcycle_` puts both right. Loading a dense checkpoint afterwards fills every
expert by itself (:meth:`MoELayer._load_from_state_dict`). Different checkpoints for different
experts: :func:`upcycle_from_checkpoints`.

**Noise.** A number n adds normal noise of n times each parameter's standard deviation to each
expert. ``'independent'`` is for training from scratch: each parameter of each expert becomes a
normal draw with the mean and the standard deviation of the first expert's, so that experts have
nothing in common but the scale. Parameters of norms and constant tensors stay as they are. Either
is drawn by seed, layer, expert and parameter: equal on every rank and machine.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdet_moe.moe.layer import (
    MoELayer,
    disturbed,
    moe_layers,
    noise_key,
    noisy_parameters,
    why_unlike,
)
from mmdet_moe.moe.routers import PlanRouter

Checkpoint = str | PathLike[str] | Mapping[str, Any]


@torch.no_grad()
def upcycle_(
    model: nn.Module, noise: float | str | None = None, seed: int | None = None
) -> list[str]:
    """Make every expert of ``model`` the copy of its layer's first, and reset the routers.

    Call it after the model's ``init_weights``: the first expert is then the initialised dense
    module. Where the router keeps the dense function and there is no noise, the model now computes
    what the dense one would.

    Args:
        model: A model with MoE layers.
        noise: Standard deviation of the noise added to every expert's parameters, as a share of
            each parameter's own; 'independent': experts are fresh draws (see below); None: the
            layer's.
        seed: Seed of noise and routers; None: the layer's ``noise_seed``.

    Returns:
        Names of the layers.
    """
    layers = moe_layers(model)
    spread_first_expert_(model, noise, seed)
    for name, layer in layers.items():
        layer_seed = layer.noise_seed if seed is None else seed
        devices = {p.device for p in layer.parameters() if p.device.type == 'cuda'}
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            torch.manual_seed(zlib.crc32(f'{layer_seed}:router:{name}'.encode()))
            layer.reset_parameters()
    return list(layers)


@torch.no_grad()
def spread_first_expert_(
    model: nn.Module, noise: float | str | None = None, seed: int | None = None
) -> None:
    """Make every expert of ``model`` the copy of its layer's first; routers stay as they are.

    Arguments as :func:`upcycle_`'s.
    """
    for layer in moe_layers(model).values():
        share = layer.noise if noise is None else noise
        layer_seed = layer.noise_seed if seed is None else seed
        source = {key: value.clone() for key, value in _tensors(layer.dense).items()}
        for place, expert in layer.copies().items():
            parameters = noisy_parameters(expert, share)
            for key, value in _tensors(expert).items():
                new = source[key]
                if share and key in parameters:
                    new = disturbed(new, share, layer_seed, noise_key(layer, place, key))
                value.copy_(new)


@torch.no_grad()
def spread_optimizer_state_(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give the parameters of every expert the optimiser's state of the first expert's.

    Experts that were born as copies of the first then go on with its momentum and its step count,
    as the dense module would have.
    """
    for layer in moe_layers(model).values():
        first = dict(layer.dense.named_parameters())
        for expert in list(layer.copies().values())[1:]:
            for key, parameter in expert.named_parameters():
                known = optimizer.state.get(first[key])
                if known and parameter is not first[key]:
                    optimizer.state[parameter] = copy.deepcopy(known)


@torch.no_grad()
def upcycle_from_checkpoints(
    model: nn.Module,
    checkpoints: Mapping[str | int, Checkpoint],
    *,
    average: bool = False,
    loader: Callable[[str], Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, list[str]]]:
    """Load different dense checkpoints into different experts. Nothing else is loaded.

    Args:
        model: A model with MoE layers.
        checkpoints: By expert (number, or name in the layer's plan) or by dataset of the plan (it
            goes to every expert that serves the dataset): a state dict of the whole *dense* model,
            a dict with one under ``state_dict``, or the path of such a file.
        average: Let an expert that several checkpoints reach take their mean (in float32). By
            default that is an error: separately trained weights seldom average well.
        loader: Reads a path; by default ``torch.load(..., weights_only=True)``, which refuses
            checkpoints that hold more than tensors, as mmengine's training checkpoints do.

    Returns:
        ``{layer: {expert: [checkpoint keys]}}``; experts that no checkpoint reached are absent and
        keep their weights.

    Raises:
        KeyError: A key is no expert and no dataset; a checkpoint has not all of a layer's tensors.
        ValueError: Shapes differ; several checkpoints for one expert without ``average``.
    """
    layers = {name: x for name, x in moe_layers(model).items() if x.dense is x.experts[0]}
    if not layers:
        raise ValueError('the model has no MoE layers whose experts start as dense modules')
    states = {key: _read(value, loader) for key, value in checkpoints.items()}
    report: dict[str, dict[str, list[str]]] = {}
    plan: list[tuple[MoELayer, int, dict[str, Tensor]]] = []
    for name, layer in layers.items():
        reached: dict[int, list[str | int]] = {}
        for key in states:
            for e in _experts_of(layer, name, key):
                reached.setdefault(e, []).append(key)
        for e, keys in sorted(reached.items()):
            if len(keys) > 1 and not average:
                raise ValueError(
                    f'{name}: the checkpoints {keys} all reach expert {e}; give one of them, or '
                    f'average=True for their mean'
                )
            sources = [_dense_tensors(layer, name, e, states[key], key) for key in keys]
            plan.append((layer, e, _mean(sources)))
            report.setdefault(name, {})[str(e)] = [str(key) for key in keys]
    # All checked: now write.
    for layer, e, values in plan:
        for key, tensor in _tensors(layer.experts[e]).items():
            tensor.copy_(values[key])
    return report


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by key, alive."""
    return {k: v for k, v in module.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}


def _read(
    checkpoint: Checkpoint, loader: Callable[[str], Mapping[str, Any]] | None
) -> Mapping[str, Any]:
    content: Any = checkpoint
    if not isinstance(checkpoint, Mapping):
        path = Path(checkpoint)
        if not path.is_file():
            raise FileNotFoundError(f'no checkpoint at {path}')
        if loader is not None:
            content = loader(str(path))
        else:
            try:
                content = torch.load(path, map_location='cpu', weights_only=True)
            except Exception as error:
                raise ValueError(
                    f'{path} cannot be read as plain tensors ({type(error).__name__}); give a '
                    f'loader that reads it, or its state dict'
                ) from error
    state = content.get('state_dict', content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping):
        raise TypeError(f'a checkpoint must be a state dict, got a {type(state).__name__}')
    return state


def _experts_of(layer: MoELayer, name: str, key: str | int) -> list[int]:
    if isinstance(key, int):
        if not 0 <= key < layer.num_experts:
            raise KeyError(f'{name} has no expert {key}, it has {layer.num_experts}')
        return [key]
    router = getattr(layer.router, 'plan', layer.router)
    if isinstance(router, PlanRouter):
        if key in router.datasets:
            return router.experts_of(key)
        if key in router.experts:
            return [router.experts.index(key)]
        raise KeyError(
            f'{key!r} is neither an expert nor a dataset of the plan at {name}: experts '
            f'{list(router.experts)}, datasets {list(router.datasets)}'
        )
    raise KeyError(f'{name} has no plan: give experts by number, not {key!r}')


def _dense_tensors(
    layer: MoELayer, name: str, e: int, state: Mapping[str, Any], source: str | int
) -> dict[str, Tensor]:
    """The dense module's tensors in a dense model's state dict."""
    own = tuple(f'{name}.{child}.' for child in layer.own_children)
    if any(key.startswith(own) for key in state):
        raise ValueError(f'checkpoint {source!r} is a MoE model at {name}, a dense one is needed')
    found = {}
    for key, tensor in _tensors(layer.experts[e]).items():
        value = state.get(f'{name}.{key}')
        if value is None:
            raise KeyError(f'checkpoint {source!r} has no {name}.{key}')
        if value.shape != tensor.shape:
            raise ValueError(
                f'checkpoint {source!r}: {name}.{key} has shape {tuple(value.shape)}, the expert '
                f'{tuple(tensor.shape)}{why_unlike(layer)}'
            )
        found[key] = value
    return found


def _mean(sources: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(sources) == 1:
        return sources[0]
    mean = {}
    for key, first in sources[0].items():
        total = torch.stack([source[key].float().cpu() for source in sources]).mean(0)
        mean[key] = total.to(first.dtype)
    return mean
