"""Fit an ordinary checkpoint to a model with other classes and with experts.

mmengine loads what fits and *warns* about what does not: a checkpoint of another architecture
trains from scratch without a word that stops anyone. Here shapes must agree, with one exception
that is meant: class rows go by name.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdet_moe.moe import MoELayer, moe_layers
from mmdet_moe.moe.layer import why_unlike
from mmdet_moe.structures import LabelSpace


class CheckpointError(ValueError):
    """A checkpoint that does not fit the model."""


@dataclass
class FitReport:
    """What :func:`fit_checkpoint` did.

    Attributes:
        rows: Parameters with class rows that were rearranged, by their key in the dense model.
        copied: Unified classes whose rows the checkpoint had, by name.
        reinitialised: Unified classes that keep the model's own initialisation.
        upcycled: MoE layers that the checkpoint holds as dense modules.
        grown: New expert -> the checkpoint's experts that it starts as the mean of, by name.
    """

    rows: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)
    upcycled: list[str] = field(default_factory=list)
    grown: dict[str, list[str]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """What went well, for a log."""
        lines = []
        if self.upcycled:
            lines.append(f'upcycled {len(self.upcycled)} dense modules into experts')
        for expert, sources in self.grown.items():
            lines.append(f'new expert {expert} starts as {" + ".join(sources)}')
        if self.rows:
            lines.append(f'class rows copied by name: {self.copied}')
        return lines


def fit_checkpoint(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    classes: Sequence[str] | None = None,
    domains: Sequence[str] | None = None,
) -> tuple[dict[str, Tensor], FitReport]:
    """A state dict that loads into ``model``, from that of a dense or MoE model.

    Keys of dense modules stay as they are, but for modules that name their parts otherwise than
    mmdet (``rename_dense_keys``): MoE layers spread them over their experts when they load. Rows of
    class parameters (``model.class_rows()``) go to the unified class of the same name; rows of
    classes that the checkpoint lacks, or all where it names no classes and has another number of
    them, are the model's own.

    Args:
        model: A model of :class:`~mmdet_moe.models.moe_mixin.MoEMixin`.
        state_dict: The checkpoint's weights.
        classes: The checkpoint's class names in the order of its rows, if known.
        domains: Its domains in the order of its label space, if known: prototypes of
            ``domain_features`` go by their names. Those of unknown owners, or of a layer with
            another number of features, are left out.

    Returns:
        The new state dict and what was done to make it.

    Raises:
        CheckpointError: Shapes differ elsewhere; all such keys are listed.
    """
    own = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    layers = moe_layers(model)
    patterns = model.class_rows() if hasattr(model, 'class_rows') else {}
    space = getattr(model, 'label_space', None)
    sources = _row_sources(space, classes) if space is not None and classes is not None else None
    report = FitReport()
    fitted: dict[str, Tensor] = {}
    wrong = []
    matched = False
    renamed = _renamed(model, state_dict)
    _grow(model, layers, renamed, own, report)
    _place_prototypes(model, renamed, domains)
    for key, value in renamed.items():
        fitted[key] = value
        layer, target_key = _locate(layers, key)
        target = own.get(target_key)
        if target is None or not isinstance(value, Tensor):
            continue
        matched = True
        if layer is not None and layer not in report.upcycled:
            report.upcycled.append(layer)
        names = _channels(patterns, target_key)
        if names is None or space is None:
            if target.shape != value.shape:
                wrong.append(
                    f'{key}: {tuple(value.shape)} in the checkpoint, {tuple(target.shape)}'
                    + ('' if layer is None else why_unlike(layers[layer]))
                )
            continue
        own_names = tuple(name for name in names if name is not None)
        cut = _is_cut(renamed, key)
        same = target.shape == value.shape and (
            classes is None or cut or tuple(classes) == own_names
        )
        if same:
            continue
        if cut:
            wrong.append(
                f'{key}: {tuple(value.shape)} in the checkpoint, {tuple(target.shape)}; newcomers '
                "have rows of their own there: give the model newcomers=[...], the checkpoint's "
                'first and in its order'
            )
            continue
        try:
            fitted[key] = _copy_rows(value, target, classes, names, sources)
        except CheckpointError as error:
            wrong.append(f'{key}: {error}')
            continue
        report.rows.append(key)
    if state_dict and not matched:
        raise CheckpointError(
            f'the checkpoint has no parameter of the model; it has {list(state_dict)[:3]}, the '
            f'model {list(own)[:3]}'
        )
    if wrong:
        raise CheckpointError(
            'the checkpoint does not fit the model (shapes in the model come second): '
            + '; '.join(wrong[:10])
            + (f'; and {len(wrong) - 10} more' if len(wrong) > 10 else '')
        )
    absent = _absent_blocks(patterns, fitted) if space is not None else ()
    if report.rows or absent:
        known = {name for name in space.classes if sources and sources[name] is not None}
        known -= set(absent)
        report.copied = [name for name in space.classes if name in known]
        report.reinitialised = [name for name in space.classes if name not in known]
    return fitted, report


def _is_cut(state_dict: Mapping[str, Tensor], key: str) -> bool:
    """Whether the checkpoint's rows at ``key`` are a block, or stand beside blocks."""
    module = key.rpartition('.')[0]
    if '.newcomers.' in key:
        return True
    return any(other.startswith(f'{module}.newcomers.') for other in state_dict)


def _absent_blocks(
    patterns: Mapping[str, Sequence[str | None]], fitted: Mapping[str, Tensor]
) -> list[str]:
    """Classes of newcomers whose rows the checkpoint does not have."""
    modules = {_without_expert(key).rpartition('.')[0] for key in fitted}
    return [
        name
        for pattern, names in patterns.items()
        if 'newcomers' in pattern and not any(re.fullmatch(pattern, m) for m in modules)
        for name in names
        if name is not None
    ]


def _grow(
    model: nn.Module,
    layers: Mapping[str, MoELayer],
    state_dict: dict[str, Tensor],
    own: Mapping[str, Tensor],
    report: FitReport,
) -> None:
    """Turn E experts into the model's E + n, where it says what the new ones start as, in place.

    A router's old rows are kept as well; the new ones are the model's own.
    """
    start = getattr(model, 'expert_start', None)
    if start is None:
        return
    for name, layer in layers.items():
        prefix = f'{name}.experts.'
        keys = [key for key in state_dict if key.startswith(prefix)]
        found = {key[len(prefix) :].partition('.')[0] for key in keys}
        if not found or len(found) == layer.num_experts or len(found) != start.num_old:
            continue
        for e, (expert, sources) in enumerate(start.new.items(), start.num_old):
            report.grown[expert] = [start.names[s] for s in sources]
            for key in [key for key in keys if key.startswith(f'{prefix}{sources[0]}.')]:
                rest = key[len(f'{prefix}{sources[0]}.') :]
                values = [state_dict[f'{prefix}{s}.{rest}'] for s in sources]
                mean = values[0].clone()
                if len(values) > 1 and mean.is_floating_point():
                    mean = torch.stack([v.float() for v in values]).mean(0).to(mean.dtype)
                state_dict[f'{prefix}{e}.{rest}'] = mean
        for key in [key for key in state_dict if key.startswith(f'{name}.router.')]:
            value, target = state_dict[key], own.get(key)
            if target is None or target.ndim != value.ndim or target.shape == value.shape:
                continue
            sizes = zip(value.shape, target.shape, strict=True)
            grows = [(a, b) == (start.num_old, layer.num_experts) or a == b for a, b in sizes]
            if all(grows):
                whole = target.clone()
                whole[tuple(slice(size) for size in value.shape)] = value.to(whole)
                state_dict[key] = whole


def _place_prototypes(
    model: nn.Module, state_dict: dict[str, Tensor], domains: Sequence[str] | None
) -> None:
    """Put the prototypes of the checkpoint's domains into the model's rows, in place."""
    features = getattr(model, 'domain_features', None)
    rows = state_dict.get('domain_features.mean')
    if features is None or rows is None:
        return
    if domains is None and rows.shape == features.mean.shape:
        domains = features.domains
    if domains is None or rows.shape != (len(domains), features.mean.shape[1]):
        for key in features.state_dict():
            state_dict.pop(f'domain_features.{key}', None)
        return
    placed = rows.new_zeros(features.mean.shape)
    for name, row in zip(domains, rows, strict=True):
        if name in features.domains:
            placed[features.domains.index(name)] = row
    state_dict['domain_features.mean'] = placed


def checkpoint_weights(checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The weights of a checkpoint, which may be nothing but weights."""
    weights = checkpoint.get('state_dict', checkpoint)
    if not isinstance(weights, Mapping):
        raise CheckpointError(f'a checkpoint holds a state dict, got {type(weights).__name__}')
    return weights


def checkpoint_classes(checkpoint: Mapping[str, Any]) -> list[str] | None:
    """The class names that a checkpoint of mmdet (any version) was trained with, if it says so."""
    meta = checkpoint.get('meta') or {}
    for holder in (meta.get('dataset_meta') or {}, meta):
        for key in ('classes', 'CLASSES'):
            names = holder.get(key)
            if isinstance(names, str):
                names = [names]
            if names:
                return list(names)
    return None


def checkpoint_domains(checkpoint: Mapping[str, Any]) -> list[str] | None:
    """The domains of the label space that a checkpoint was trained with, if it says so."""
    meta = (checkpoint.get('meta') or {}).get('dataset_meta') or {}
    space = meta.get('label_space')
    return None if space is None else list(LabelSpace.from_config(space).domains)


def _renamed(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with the model's own names: without DDP's prefix, and with what a module that
    is built otherwise than its base (``rename_dense_keys``) calls its parts."""
    renamed = {key.removeprefix('module.'): value for key, value in state_dict.items()}
    for name, module in model.named_modules():
        if hasattr(module, 'rename_dense_keys'):
            module.rename_dense_keys(renamed, f'{name}.')
    return renamed


def _locate(layers: Mapping[str, MoELayer], key: str) -> tuple[str | None, str]:
    """The MoE layer that a dense key belongs to, and the model's (first) key for it."""
    for name, layer in layers.items():
        if key.startswith(f'{name}.'):
            rest = key[len(name) + 1 :]
            if rest.partition('.')[0] in layer.own_children:
                return None, key
            return name, f'{name}.{next(iter(layer.copies()))}.{rest}'
    return None, key


def _channels(
    patterns: Mapping[str, Sequence[str | None]], key: str
) -> Sequence[str | None] | None:
    """Channels of one anchor where ``key`` (of the model) is a parameter with class rows."""
    module = _without_expert(key).rpartition('.')[0]
    for pattern, names in patterns.items():
        if re.fullmatch(pattern, module):
            return names
    return None


def _row_sources(space: Any, classes: Sequence[str]) -> dict[str, int | None]:
    """For each unified class its row in the checkpoint, or None.

    A class is found by its unified name or by what its domains call it.
    """
    position = {name: row for row, name in reversed(list(enumerate(classes)))}
    aliases: dict[str, list[str]] = {name: [name] for name in space.classes}
    for domain in space.domains:
        for name in space.local_classes(domain):
            aliases[space.unified_name(domain, name)].append(name)
    return {
        name: next((position[alias] for alias in aliases[name] if alias in position), None)
        for name in space.classes
    }


def _copy_rows(
    value: Tensor,
    target: Tensor,
    classes: Sequence[str] | None,
    names: Sequence[str | None],
    sources: Mapping[str, int | None] | None,
) -> Tensor:
    """``target`` with the rows ``value`` has by name; both are laid out (anchors, channels).

    ``names`` are the classes of the target's channels, background (None) last.
    """
    shapes = f'{tuple(value.shape)} in the checkpoint, {tuple(target.shape)}'
    if value.shape[1:] != target.shape[1:]:
        raise CheckpointError(shapes)
    if sources is None or classes is None:
        return target.clone()
    channels, background = len(names), sum(name is None for name in names)
    anchors = target.shape[0] // channels
    theirs = len(classes) + background
    if value.shape[0] != anchors * theirs:
        raise CheckpointError(
            f'{shapes}: not {anchors} anchors x {theirs} channels, as its '
            f'{len(classes)} class names would have it'
        )
    new = target.clone().reshape(anchors, channels, *target.shape[1:])
    old = value.detach().cpu().to(new.dtype).reshape(anchors, theirs, *target.shape[1:])
    for i, name in enumerate(names):
        row = None if name is None else sources[name]
        if row is not None:
            new[:, i] = old[:, row]
    if background:
        new[:, channels - background :] = old[:, len(classes) :]
    return new.reshape(target.shape)


@torch.no_grad()
def copy_class_rows(
    model: nn.Module, state_dict: Mapping[str, Tensor], classes: Sequence[str], names: Sequence[str]
) -> list[str]:
    """Copy the rows of the classes ``names`` into the model's class parameters, in every expert.

    Args:
        model: As for :func:`fit_checkpoint`.
        state_dict: A dense checkpoint's weights.
        classes: Its class names.
        names: Unified classes whose rows are to be taken from it.

    Returns:
        The parameters that were written to.
    """
    fitted, _ = fit_checkpoint(model, state_dict, classes)
    patterns = model.class_rows()
    for name in names:
        model.label_space.unified_id(name)
    written = []
    for key, parameter in model.named_parameters():
        channels = _channels(patterns, key)
        dense_key = _without_expert(key)
        if channels is None or dense_key not in fitted:
            continue
        view = parameter.view(-1, len(channels), *parameter.shape[1:])
        index = [i for i, name in enumerate(channels) if name in names]
        source = fitted[dense_key].to(parameter).reshape(view.shape)
        view[:, index] = source[:, index]
        written.append(key)
    return written


def _without_expert(key: str) -> str:
    return re.sub(r'\.experts\.\d+', '', key)


def save_tensors(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Write a checkpoint so that readers see the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        torch.save(dict(content), part)
        os.replace(part, path)
