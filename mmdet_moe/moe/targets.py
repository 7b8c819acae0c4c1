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

from mmdet_moe.moe.layer import GRANULARITIES, MAP_GRANULARITIES, MoELayer


@dataclass
class Target:
    """What an adapter says about a dense module.

    Attributes:
        module: The expert to copy: the module, changed where it must be (an identity it adds).
        in_channels: d of the input; None where unknown, then a learned router needs the spec's.
        channel_dim: Dimension of the channels; None: 1 for 4 dimensions or more, else the last.
        default_granularity, granularities: See ``MoELayer``.
        residual, per_item_args, shared_args, drop: See ``MoELayer``.
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
    drop: nn.Module | None = None


Predicate = Callable[[nn.Module], bool]
Adapter = Callable[[nn.Module], Target]

#: Tried in this order; the first whose predicate holds is used.
TARGET_ADAPTERS: list[tuple[Predicate, Adapter]] = []
#: ``(pattern of the full name, reason)``.
UNSAFE_TARGETS: list[tuple[re.Pattern[str], str]] = []


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


def register_unsafe(pattern: str, reason: str) -> None:
    """Name targets that must be refused, beyond those found by reading the code around them.

    Args:
        pattern: Regular expression for the whole full name.
        reason: What the message says, after "cannot be a MoE target: ".
    """
    UNSAFE_TARGETS.append((re.compile(pattern), reason))


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
    granularities = tuple(dict.fromkeys((*GRANULARITIES, *MAP_GRANULARITIES)))
    return Target(module, in_channels=_first_channels(module), granularities=granularities)


@register_target(lambda module: isinstance(module, nn.Linear))
def linear(module: nn.Module) -> Target:
    """``nn.Linear`` on (..., d)."""
    assert isinstance(module, nn.Linear)
    return Target(module, module.in_features, channel_dim=-1, default_granularity='token')


@register_target(lambda module: isinstance(module, _ConvNd))
def convolution(module: nn.Module) -> Target:
    """Convolutions of any dimension, transposed too, on (B, C, ...)."""
    assert isinstance(module, _ConvNd)
    granularities = MAP_GRANULARITIES if isinstance(module, nn.Conv2d) else ('image',)
    return Target(module, module.in_channels, channel_dim=1, granularities=granularities)


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

#: Methods others call on a module; those they call on self are read too.
_ENTRIES = ('forward', 'init_weights', 'loss', 'predict')
#: What a MoE layer offers as any module does.
_HARMLESS = frozenset(dir(nn.Module)) | {'training', 'init_weights'}


def why_unsafe(model: nn.Module, name: str) -> str | None:
    """Why the module called ``name`` must not be replaced, or None.

    Looks in :data:`UNSAFE_TARGETS`, then reads the source of every module around the target: one
    that uses ``self.<target>.weight`` or ``self.<target>[-1]`` (also through lists, ``for`` loops
    and local names) needs the one dense module. Source that cannot be read is passed over; what is
    missed here is an error in plain words at the first use (``MoELayer.__getattr__``).

    Args:
        model: The whole model.
        name: Full name of the target in it.
    """
    for pattern, reason in UNSAFE_TARGETS:
        if pattern.fullmatch(name):
            return reason
    path = name.split('.')
    for depth in range(len(path)):
        owner = model.get_submodule('.'.join(path[:depth]))
        below = path[depth:]
        for use in _uses(type(owner)):  # type: ignore[arg-type]
            if len(use) <= len(below):
                continue
            if any(a not in (b, '*') for a, b in zip(use, below, strict=False)):
                continue
            rest = use[len(below)]
            if rest in _HARMLESS:
                continue
            where = 'the model' if not depth else '.'.join(path[:depth])
            what = 'indexes it' if rest == '*' else f'uses its .{rest}'
            return f'{where}, a {type(owner).__name__}, {what}'
    return None


@functools.cache
def _uses(owner: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """Every ``self.a.b[i].c`` in the code of a class, as ``('a', 'b', '*', 'c')``."""
    uses: set[tuple[str, ...]] = set()
    todo, seen = list(_ENTRIES), set()
    while todo:
        method = todo.pop()
        if method in seen:
            continue
        seen.add(method)
        for base in owner.__mro__:
            function = vars(base).get(method)
            if base is nn.Module or not inspect.isfunction(function):
                continue
            try:
                source = textwrap.dedent(inspect.getsource(function))
                found = _Uses()
                found.visit(ast.parse(source))
            except (OSError, TypeError, SyntaxError):
                break
            uses |= found.paths
            todo += [path[0] for path in found.paths]
            if 'super(' not in source:
                break
    return tuple(sorted(uses))


class _Uses(ast.NodeVisitor):
    """Collects the paths below ``self`` that a function reads."""

    def __init__(self) -> None:
        self.names: dict[str, tuple[str, ...]] = {'self': ()}
        self.paths: set[tuple[str, ...]] = set()

    def path(self, node: ast.AST) -> tuple[str, ...] | None:
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            inner = self.path(node.value)
            if inner is None:
                return None
            return (*inner, node.attr if isinstance(node, ast.Attribute) else '*')
        return None

    def loop(self, target: ast.AST, source: ast.AST) -> None:
        """``for target in source``, also through enumerate and zip."""
        if isinstance(source, ast.Call) and isinstance(source.func, ast.Name):
            parts = target.elts if isinstance(target, ast.Tuple) else []
            if source.func.id == 'enumerate' and len(parts) == 2 and source.args:
                self.loop(parts[1], source.args[0])
            elif source.func.id == 'zip':
                for part, argument in zip(parts, source.args, strict=False):
                    self.loop(part, argument)
            return
        inner = self.path(source)
        if isinstance(target, ast.Name) and inner:
            self.names[target.id] = (*inner, '*')

    def visit_For(self, node: ast.For) -> None:
        self.loop(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.loop(node.target, node.iter)
        self.generic_visit(node)

    def _visit_comprehension_of(self, node: ast.AST) -> None:
        for generator in node.generators:  # type: ignore[attr-defined]
            self.visit(generator)
        self.generic_visit(node)

    visit_ListComp = visit_GeneratorExp = visit_SetComp = visit_DictComp = _visit_comprehension_of

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        inner = self.path(node.value)
        if len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            if inner:
                self.names[node.targets[0].id] = inner
            else:
                self.names.pop(node.targets[0].id, None)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._note(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self._note(node)

    def _note(self, node: ast.Attribute | ast.Subscript) -> None:
        found = self.path(node)
        if found:
            self.paths.add(found)
        self.generic_visit(node)
