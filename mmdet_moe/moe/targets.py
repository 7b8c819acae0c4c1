"""Which modules can become MoE layers, and how: one adapter per kind of target.

An adapter says what a dense module needs in the place of a MoE layer: where its channels are, which
granularities suit, what its further arguments are. Storeys above register their own kinds:

    @register_target(lambda module: isinstance(module, FFN), first=True)
    def ffn(module: FFN) -> Target:
        residual, module.add_identity = module.add_identity, False
        return Target(module, in_channels=module.embed_dims, channel_dim=-1,
                      default_granularity='token', residual=residual)
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from mmdet_moe.moe.layer import GRANULARITIES, MoELayer


@dataclass
class Target:
    """What an adapter says about a dense module.

    Attributes:
        module: The expert to copy: the module, changed where it must be (an identity it adds).
        in_channels: d of the input; None where unknown, then a learned router needs the spec's.
        channel_dim: Dimension of the channels; None: 1 for 4 dimensions or more, else the last.
        default_granularity, granularities: See ``MoELayer``.
        residual, per_item_args, shared_args: See ``MoELayer``.
        layer: The class to build, ``MoELayer`` or a subclass with the same arguments.
    """

    module: nn.Module
    in_channels: int | None = None
    channel_dim: int | None = None
    default_granularity: str = 'image'
    granularities: Sequence[str] = GRANULARITIES
    residual: bool = False
    per_item_args: Sequence[int | str] = ()
    shared_args: Sequence[int | str] = ()
    layer: type[MoELayer] = field(default=MoELayer)


Predicate = Callable[[nn.Module], bool]
Adapter = Callable[[nn.Module], Target]

#: Tried in this order; the first whose predicate holds is used.
TARGET_ADAPTERS: list[tuple[Predicate, Adapter]] = []
#: ``(pattern of the full name, or predicate(parent, child name), reason)``.
UNSAFE_TARGETS: list[tuple[re.Pattern[str] | Callable[[nn.Module, str], bool], str]] = []


def register_target(predicate: Predicate, *, first: bool = True) -> Callable[[Adapter], Adapter]:
    """Decorate an adapter ``(module) -> Target`` for the modules ``predicate`` holds for.

    Args:
        predicate: Whether the adapter takes a module.
        first: Try it before those registered so far.
    """

    def register(adapter: Adapter) -> Adapter:
        entry = (predicate, adapter)
        if first:
            TARGET_ADAPTERS.insert(0, entry)
        else:
            TARGET_ADAPTERS.append(entry)
        return adapter

    return register


def register_unsafe(what: str | Callable[[nn.Module, str], bool], reason: str) -> None:
    """Name targets that must be refused, beyond those found by reading the parent's source.

    Args:
        what: Regular expression for the whole full name, or ``predicate(parent, child name)``.
        reason: What the message says.
    """
    UNSAFE_TARGETS.append((re.compile(what) if isinstance(what, str) else what, reason))


def describe_target(module: nn.Module, name: str = '') -> Target:
    """The first fitting adapter's word on ``module``.

    Raises:
        TypeError: If nothing takes it.
    """
    for predicate, adapter in TARGET_ADAPTERS:
        if predicate(module):
            return adapter(module)
    raise TypeError(f'{name or "the module"} is a {type(module).__name__}: no adapter takes it')


# Kinds of torch's own. Registered last to first: more special kinds stand before.


@register_target(lambda module: type(module).forward is not nn.Module.forward)
def any_module(module: nn.Module) -> Target:
    """Any module that can be called on (B, ...): a Sequential, a stage, a block."""
    return Target(module, in_channels=_first_channels(module), granularities=GRANULARITIES)


@register_target(lambda module: isinstance(module, nn.Linear))
def linear(module: nn.Module) -> Target:
    """``nn.Linear`` on (..., d)."""
    assert isinstance(module, nn.Linear)
    return Target(module, module.in_features, channel_dim=-1, default_granularity='token')


@register_target(lambda module: isinstance(module, _ConvNd))
def convolution(module: nn.Module) -> Target:
    """Convolutions of any dimension, transposed too, on (B, C, ...)."""
    assert isinstance(module, _ConvNd)
    return Target(module, module.in_channels, channel_dim=1, granularities=('image',))


@register_target(lambda module: isinstance(module, (_NormBase, nn.GroupNorm)))
def channel_norm(module: nn.Module) -> Target:
    """Batch, group and instance norm on (B, C, ...)."""
    channels = module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features
    assert isinstance(channels, int)
    return Target(module, channels, channel_dim=1, granularities=('image',))


@register_target(lambda module: isinstance(module, nn.LayerNorm))
def layer_norm(module: nn.Module) -> Target:
    """``nn.LayerNorm`` on (..., d)."""
    assert isinstance(module, nn.LayerNorm)
    granularities = GRANULARITIES if len(module.normalized_shape) == 1 else ('image',)
    return Target(module, module.normalized_shape[-1], channel_dim=-1, granularities=granularities)


def _first_channels(module: nn.Module) -> int | None:
    """Input channels of the first submodule that says so."""
    for part in module.modules():
        for attribute in ('in_channels', 'in_features', 'num_features', 'embed_dims'):
            value = getattr(part, attribute, None)
            if isinstance(value, int):
                return value
    return None


# What must not be replaced


def why_unsafe(parent: nn.Module, child: str, name: str) -> str | None:
    """Why ``parent.child`` (full name ``name``) must not be replaced, or None.

    Looks in :data:`UNSAFE_TARGETS`, then reads the source of the parent's forward and
    ``init_weights``, and of the methods they call on self: a parent that uses ``self.child.weight``
    or ``self.child[-1]`` needs the one dense module.
    """
    for what, reason in UNSAFE_TARGETS:
        hit = what.fullmatch(name) if isinstance(what, re.Pattern) else what(parent, child)
        if hit:
            return reason
    for attribute, use in _uses_of_children(type(parent)):  # type: ignore[arg-type]
        if attribute == child:
            return f'its parent, a {type(parent).__name__}, uses self.{child}{use}'
    return None


@functools.cache
def _uses_of_children(parent: type[nn.Module]) -> tuple[tuple[str, str], ...]:
    """``(child, '.weight' or '[...]')`` for each ``self.child.weight`` and ``self.child[...]``."""
    harmless = set(dir(nn.Module)) | {'training', 'init_weights'}
    uses: list[tuple[str, str]] = []
    todo, seen = ['forward', 'init_weights'], set()
    while todo:
        method = todo.pop()
        function = getattr(parent, method, None)
        if method in seen or not inspect.isfunction(function):
            continue
        seen.add(method)
        if function is getattr(nn.Module, method, None):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and _is_self(node.value):
                todo.append(node.attr)
            elif isinstance(node, ast.Attribute) and node.attr not in harmless:
                if isinstance(node.value, ast.Attribute) and _is_self(node.value.value):
                    uses.append((node.value.attr, f'.{node.attr}'))
            elif (
                isinstance(node, ast.Subscript)
                and isinstance(node.value, ast.Attribute)
                and _is_self(node.value.value)
            ):
                uses.append((node.value.attr, '[...]'))
    return tuple(uses)


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == 'self'
