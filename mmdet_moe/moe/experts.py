"""What a dense module is made into before it is copied: narrow, with other norms, with a bypass.

Everything here is decided by running a copy of the module on the meta device, which computes shapes
and nothing else.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

ISO = 'iso'
FROZEN = 'frozen'
#: Side of the map that modules are tried on, and one that no stride divides.
SIDE, ODD_SIDE = 64, 61


@dataclass(frozen=True)
class Trace:
    """A module's run on one map.

    Attributes:
        convs: For each call of a convolution or pooling: the module, the side of its input, and the
            places (height times width) of its output.
        channels: Of the output.
        side: Of the output.
    """

    convs: list[tuple[nn.Module, int, int]]
    channels: int
    side: int


@dataclass(frozen=True)
class Geometry:
    """How a module moves over maps.

    Attributes:
        stride: n input places become ceil(n / stride) outputs.
        reach: Input places to each side that an output depends on, at most.
        channels: Of the output.
    """

    stride: int
    reach: int
    channels: int


_SPATIAL = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def trace(module: nn.Module, in_channels: int | None, name: str, side: int = SIDE) -> Trace:
    """Run a copy of ``module`` on a map of ``side`` x ``side``, shapes only.

    Raises:
        ValueError: If it is no module from maps (B, C, H, W) to maps.
    """
    if in_channels is None:
        raise ValueError(f'MoE target {name!r}: give its in_channels in the spec')
    tensors = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {
        id(t): nn.Parameter(torch.empty_like(t, device='meta'), requires_grad=False)
        if isinstance(t, nn.Parameter)
        else torch.empty_like(t, device='meta')
        for t in tensors
    }
    twin = copy.deepcopy(module, memo).eval()
    convs: list[tuple[nn.Module, int, int]] = []
    for original, part in zip(module.modules(), twin.modules(), strict=True):
        if isinstance(part, _SPATIAL):

            def note(
                _: nn.Module, inputs: tuple[Tensor], out: Tensor, own: nn.Module = original
            ) -> None:
                convs.append((own, inputs[0].shape[-1], out.shape[-2:].numel()))

            part.register_forward_hook(note)
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    try:
        with torch.no_grad():
            out = twin(torch.empty(1, in_channels, side, side, device='meta', dtype=dtype))
    except Exception as error:
        raise _no_maps(module, name, f'{type(error).__name__}: {error}') from error
    if not isinstance(out, Tensor) or out.ndim != 4:
        raise _no_maps(module, name, 'it gives something else')
    return Trace(convs, out.shape[1], out.shape[-1])


def geometry(module: nn.Module, in_channels: int | None, name: str) -> Geometry:
    """Stride and reach of ``module``. The reach adds up over all convolutions and poolings, as if
    they stood one behind the other; for residual blocks that is exact.

    Raises:
        ValueError: If it is no module on maps, or one that does not keep or evenly stride sizes.
    """
    run = trace(module, in_channels, name)
    odd = trace(module, in_channels, name, ODD_SIDE)
    stride = max(1, round(SIDE / max(run.side, 1)))
    if (run.side, odd.side) != (-(-SIDE // stride), -(-ODD_SIDE // stride)):
        raise ValueError(
            f'MoE target {name!r}, a {type(module).__name__}, makes {run.side} of {SIDE} places '
            f'and {odd.side} of {ODD_SIDE}: patches and a bypass need one that keeps the size or '
            f'divides it by its stride, rounded up'
        )
    reach = 0
    for conv, side, _ in run.convs:
        reach += _reach(conv) * round(SIDE / side)
    return Geometry(stride, reach, run.channels)


def make_bypass(module: nn.Module, in_channels: int | None, name: str) -> nn.Module:
    """D of the residual form: the identity where ``module`` keeps the shape, else a 1x1 convolution
    with its stride and batch norm.

    Source: Pavlitska et al. (arXiv 2204.10598), residual MoE layers.
    """
    found = geometry(module, in_channels, name)
    assert in_channels is not None
    if found.stride == 1 and found.channels == in_channels:
        return nn.Identity()
    bypass = nn.Sequential(
        nn.Conv2d(in_channels, found.channels, 1, stride=found.stride, bias=False),
        nn.BatchNorm2d(found.channels),
    )
    like = next(module.parameters(), None)
    return bypass if like is None else bypass.to(like.device, like.dtype)


# Width


def narrow_(
    module: nn.Module,
    width: str | int | float,
    runs: int | None,
    in_channels: int | None,
    name: str,
    multiple: int = 1,
) -> str:
    r"""Make the residual blocks or the feed-forward network of ``module`` narrow inside, in place.

    A feed-forward network is two linear layers, the second on what the first gives; fewer of the
    hidden channels between them are left. A block's convolutions ``conv1``, ``conv2`` (and
    ``conv3``) lead from its input over inner channels to its output; the inner ones become fewer,
    its input, output and shortcut stay. What is left of weights and norms are the first channels of
    the dense ones.

    With 'iso' the inner width w is the one at which ``runs`` experts cost what the dense module
    does,

    .. math:: w = \arg\min_w \Big|\, \frac{n\, C(w)}{C(\text{dense})} - 1 \Big|

    C being the multiply-adds of all convolutions on one map, shortcuts included (of a feed-forward
    network of hidden width h: w = round(h / n)); gates, norms and a bypass are not counted.

    What is left of a trained module is a part of it and computes something else. Cutting it into
    parts whose *sum* is the module would not help: experts chosen per item are not always the parts
    that belong together, and their weights sum to 1, not each to 1.

    Args:
        module: A residual block, a stage of them, or a feed-forward network. Others may share its
            tensors: they stay.
        width: 'iso'; a whole number, the inner width of every block; or a share in (0, 1] of each
            block's own.
        runs: n, experts that run for each item, where that is fixed.
        in_channels: C of its input.
        name: Full name, for messages.
        multiple: What w must be a multiple of, where a share or 'iso' leaves the choice.

    Returns:
        What has changed, for messages; empty where nothing has.

    Raises:
        ValueError: If it is none of these, or the width is impossible.
    """
    pair = _hidden_pair(module)
    if pair is not None:
        return _narrow_pair(pair, width, runs, name)
    blocks = [_Block(part, name) for part in module.modules() if _Block.fits(part)]
    if not blocks:
        raise ValueError(
            f'MoE target {name!r}, a {type(module).__name__}, has no residual blocks (modules with '
            f'conv1 and conv2) that width could make narrow, and is no feed-forward network of two '
            f'linear layers'
        )
    dense = trace(module, in_channels, name)
    multiple = math.lcm(multiple, *(block.multiple for block in blocks))
    widths = _widths(blocks, width, runs, dense, multiple, name)
    changes = []
    for block, new in zip(blocks, widths, strict=True):
        if new != block.width:
            changes.append(f'{new} and not {block.width}')
            block.narrow(new)
    after = trace(module, in_channels, name)
    if (after.channels, after.side) != (dense.channels, dense.side):
        raise ValueError(f'MoE target {name!r}: its shape changes with its inner width')
    return f'their inner width is {", ".join(dict.fromkeys(changes))}' if changes else ''


def _hidden_pair(module: nn.Module) -> tuple[nn.Linear, nn.Linear] | None:
    """The two linear layers of a feed-forward network, the only modules with parameters of several
    dimensions in it; None where ``module`` is something else."""
    large = [m for m in module.modules() if any(p.ndim > 1 for p in m.parameters(recurse=False))]
    if len(large) != 2:
        return None
    first, second = large
    if not (isinstance(first, nn.Linear) and isinstance(second, nn.Linear)):
        return None
    return (first, second) if first.out_features == second.in_features else None


def _narrow_pair(
    pair: tuple[nn.Linear, nn.Linear], width: str | int | float, runs: int | None, name: str
) -> str:
    """:func:`narrow_` of a feed-forward network."""
    first, second = pair
    hidden = first.out_features
    if width == ISO:
        _need_runs(runs, name)
        new = max(1, round(hidden / (runs or 1)))
    elif isinstance(width, float) and 0 < width <= 1:
        new = max(1, round(width * hidden))
    elif isinstance(width, int) and not isinstance(width, bool) and 1 <= width <= hidden:
        new = width
    else:
        raise _no_width(width, hidden, name)
    if new == hidden:
        return ''
    first.out_features = second.in_features = new
    _keep(first, 'weight', (new,))
    _keep(first, 'bias', (new,))
    _keep(second, 'weight', (second.out_features, new))
    return f'their inner width is {new} and not {hidden}'


def _need_runs(runs: int | None, name: str) -> None:
    if not runs:
        raise ValueError(
            f"MoE target {name!r}: width='iso' needs a router with a fixed number of experts "
            f'per item (k)'
        )


def _no_width(width: Any, narrowest: int, name: str) -> ValueError:
    return ValueError(
        f"MoE target {name!r}: width must be 'iso', a whole number of 1 to {narrowest} inner "
        f'channels, or a share of them in (0, 1], got {width!r}'
    )


def _widths(
    blocks: Sequence[_Block],
    width: str | int | float,
    runs: int | None,
    dense: Trace,
    multiple: int,
    name: str,
) -> list[int]:
    def at(share: float) -> list[int]:
        return [max(multiple, round(share * b.width / multiple) * multiple) for b in blocks]

    largest = max(block.width for block in blocks)
    if width == ISO:
        _need_runs(runs, name)
        full = _multiply_adds(dense, blocks, [b.width for b in blocks])
        choices = [at(w / largest) for w in range(multiple, largest + 1, multiple)]
        costs = [(runs or 1) * _multiply_adds(dense, blocks, choice) / full for choice in choices]
        if not costs or costs[0] > 1.05:
            raise ValueError(
                f"MoE target {name!r}: width='iso' finds no inner width at which {runs} experts "
                f'cost what the dense module does: their shortcuts alone cost too much'
            )
        best = min(range(len(costs)), key=lambda i: abs(costs[i] - 1))
        return choices[best]
    if isinstance(width, float) and 0 < width <= 1:
        return at(width)
    narrowest = min(block.width for block in blocks)
    if isinstance(width, int) and not isinstance(width, bool) and 1 <= width <= narrowest:
        return [width] * len(blocks)
    raise _no_width(width, narrowest, name)


def _multiply_adds(run: Trace, blocks: Sequence[_Block], widths: Sequence[int]) -> int:
    """Of all convolutions, with other inner widths."""
    inner: dict[nn.Module, tuple[int | None, int | None]] = {}
    for block, width in zip(blocks, widths, strict=True):
        last = len(block.convs) - 1
        for i, conv in enumerate(block.convs):
            inner[conv] = (width if i else None, width if i < last else None)
    total = 0
    for called, _, places in run.convs:
        if isinstance(called, nn.Conv2d):
            taken, given = inner.get(called, (None, None))
            taken = called.in_channels if taken is None else taken
            given = called.out_channels if given is None else given
            total += places * taken * given * math.prod(called.kernel_size) // called.groups
    return total


class _Block:
    """A residual block's main path."""

    def __init__(self, block: nn.Module, name: str) -> None:
        self.convs: list[nn.Conv2d] = []
        self.norms: list[nn.Module | None] = []
        for i in (1, 2, 3):
            conv = getattr(block, f'conv{i}', None)
            if conv is None:
                break
            plain = isinstance(conv, nn.Conv2d) and conv.groups == 1
            if not plain or {key for key, _ in conv.named_parameters()} - {'weight', 'bias'}:
                raise ValueError(
                    f'MoE target {name!r}: conv{i} of a {type(block).__name__} is a '
                    f'{type(conv).__name__}; width takes plain convolutions without groups'
                )
            keys = [getattr(block, f'norm{i}_name', ''), f'norm{i}', f'bn{i}']
            norm = next((m for key in keys if (m := block._modules.get(key)) is not None), None)
            self.convs.append(conv)
            self.norms.append(norm)
        self.width = self.convs[0].out_channels
        for before, after in itertools.pairwise(self.convs):
            if before.out_channels != self.width or after.in_channels != self.width:
                raise ValueError(
                    f'MoE target {name!r}: the convolutions of a {type(block).__name__} have no '
                    f'one inner width'
                )
        self.inner_norms = [norm for norm in self.norms[:-1] if norm is not None]
        for norm in self.inner_norms:
            if not isinstance(norm, (_NormBase, nn.GroupNorm)):
                raise ValueError(
                    f'MoE target {name!r}: width knows batch, instance and group norms, not a '
                    f'{type(norm).__name__}'
                )
        groups = [norm.num_groups for norm in self.inner_norms if isinstance(norm, nn.GroupNorm)]
        self.multiple = math.lcm(1, *groups)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return all(isinstance(module._modules.get(key), nn.Module) for key in ('conv1', 'conv2'))

    def narrow(self, width: int) -> None:
        last = len(self.convs) - 1
        for i, conv in enumerate(self.convs):
            conv.in_channels = width if i else conv.in_channels
            conv.out_channels = width if i < last else conv.out_channels
            _keep(conv, 'weight', (conv.out_channels, conv.in_channels))
            _keep(conv, 'bias', (conv.out_channels,))
        for norm in self.inner_norms:
            if isinstance(norm, nn.GroupNorm):
                norm.num_channels = width
            else:
                norm.num_features = width  # type: ignore[assignment]
            for key in ('weight', 'bias', 'running_mean', 'running_var'):
                _keep(norm, key, (width,))


def _keep(module: nn.Module, key: str, sizes: Sequence[int]) -> None:
    """Cut a tensor of ``module`` down to its first entries."""
    tensor = getattr(module, key, None)
    if tensor is None:
        return
    new = tensor.detach()[tuple(slice(size) for size in sizes)].clone()
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
    setattr(module, key, new)


# Norms


def norm_groups(expert_norm: str | Mapping[str, Any] | None, name: str) -> int | None:
    """Number of groups of the norms that ``expert_norm`` asks for; None where it asks for none.

    Raises:
        ValueError: If it says something else.
    """
    if expert_norm is None or expert_norm == FROZEN:
        return None
    if isinstance(expert_norm, Mapping) and set(expert_norm) == {'type', 'num_groups'}:
        groups = expert_norm['num_groups']
        if expert_norm['type'] == 'GN' and isinstance(groups, int) and groups > 0:
            return groups
    raise ValueError(
        f"MoE target {name!r}: expert_norm must be 'frozen' or dict(type='GN', num_groups=n), got "
        f'{expert_norm!r}'
    )


def change_norms(module: nn.Module, groups: int | None, name: str) -> nn.Module:
    """``module`` with group norms in the places of its batch norms; or, without ``groups``, with
    the parameters of its batch norms frozen.

    The affine parameters are kept. Whoever shares the tensors of ``module`` keeps his own flags.

    Raises:
        ValueError: If there is no batch norm, or its channels do not make so many groups.
    """
    found = [(key, m) for key, m in module.named_modules() if isinstance(m, _BatchNorm)]
    if not found:
        raise ValueError(
            f'MoE target {name!r}, a {type(module).__name__}, has no batch norm for expert_norm'
        )
    for key, norm in found:
        if groups is None:
            for part, parameter in list(norm.named_parameters()):
                frozen = nn.Parameter(parameter.detach(), requires_grad=False)
                setattr(norm, part, frozen)
            continue
        if norm.num_features % groups:
            raise ValueError(
                f'MoE target {name!r}: the {norm.num_features} channels of its {key or "norm"} do '
                f'not make {groups} groups'
            )
        new = nn.GroupNorm(groups, norm.num_features, eps=norm.eps, affine=norm.affine)
        new.train(norm.training)
        if norm.affine:
            new.weight, new.bias = norm.weight, norm.bias
        else:
            new.to(getattr(norm.running_mean, 'device', 'cpu'))
        if not key:
            return new
        parent, _, child = key.rpartition('.')
        setattr(module.get_submodule(parent), child, new)
    return module


# Helpers


def _reach(module: nn.Module) -> int:
    """Places to the farther side that one output of a convolution or pooling depends on."""

    def pair(value: Any) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else tuple(value)

    farthest = 0
    kernels, dilations = pair(module.kernel_size), pair(getattr(module, 'dilation', 1))
    if getattr(module, 'padding_mode', 'zeros') == 'circular':
        raise ValueError('circular padding reaches over the whole map, which cannot be cut')
    padding = module.padding
    for axis in (0, 1):
        extent = dilations[axis] * (kernels[axis] - 1)
        left = extent // 2 if isinstance(padding, str) else pair(padding)[axis]
        farthest = max(farthest, left, extent - left)
    return farthest


def _no_maps(module: nn.Module, name: str, why: str) -> ValueError:
    return ValueError(
        f'MoE target {name!r}, a {type(module).__name__}, does not take maps (B, C, H, W) to maps, '
        f"which width, bypass and granularity='patch' are for: {why}"
    )
