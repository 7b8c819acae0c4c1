"""A registry of a few lines: routers and losses build from config dicts without mmengine."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar('T', bound=type)


class Registry:
    """Names to classes.

    Args:
        kind: What is registered, for messages ('router', 'balance loss').
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.classes: dict[str, type] = {}

    def register(self, cls: T) -> T:
        """Class decorator; the class name is the key.

        Raises:
            KeyError: If another class has the name already.
        """
        known = self.classes.setdefault(cls.__name__, cls)
        if known is not cls:
            raise KeyError(f'{self.kind} {cls.__name__!r} is registered already, as {known!r}')
        return cls

    def get(self, name: str | type) -> type:
        """The class called ``name``; a scope in front ('mmdet_moe.PlanRouter') is allowed.

        Raises:
            KeyError: If there is none; the message lists the known names.
        """
        if isinstance(name, type):
            return name
        cls = self.classes.get(str(name).rpartition('.')[2])
        if cls is None:
            near = difflib.get_close_matches(str(name), self.classes, n=1)
            hint = f', did you mean {near[0]!r}?' if near else ''
            raise KeyError(f'no {self.kind} is called {name!r}{hint} Known: {sorted(self.classes)}')
        return cls

    def build(self, cfg: Any, **defaults: Any) -> Any:
        """Build ``cfg`` (a dict with ``type``, or a ready object, which is returned).

        Args:
            cfg: ``dict(type='PlanRouter', ...)``; mmengine's ``_scope_`` is ignored.
            defaults: Arguments the caller knows (``num_experts``, ``in_channels``); used where the
                class takes them and ``cfg`` does not give them.

        Raises:
            TypeError: If ``cfg`` is neither, or has an argument the class does not take.
            KeyError: If the type is missing or unknown.
        """
        if not isinstance(cfg, Mapping):
            if isinstance(cfg, tuple(self.classes.values())):
                return cfg
            raise TypeError(f'a {self.kind} must be a dict with a type, got {cfg!r}')
        arguments = {k: v for k, v in cfg.items() if k != '_scope_'}
        if 'type' not in arguments:
            raise KeyError(
                f'this {self.kind} has no type: {dict(cfg)}. Known: {sorted(self.classes)}'
            )
        cls = self.get(arguments.pop('type'))
        taken = _parameters(cls)
        unknown = sorted(set(arguments) - set(taken))
        if unknown:
            raise TypeError(f'{cls.__name__} takes no {unknown}; it takes {sorted(taken)}')
        for key, value in defaults.items():
            if key in taken:
                arguments.setdefault(key, value)
        return cls(**arguments)


def _parameters(cls: type) -> list[str]:
    """Names of the arguments ``cls`` takes; where it hands ``**options`` on, its bases' too."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if '__init__' not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)['__init__']).parameters.values())[1:]
        names.update((p.name, None) for p in parameters if p.kind in kinds)
        if not any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return list(names)


#: Every router, one file each in :mod:`mmdet_moe.moe.routers`.
ROUTERS = Registry('router')
#: Experts of low rank beside a frozen linear layer, in :mod:`mmdet_moe.moe.adapters`.
ADAPTERS = Registry('adapter')
#: What may stand in a layer's ``balance`` list.
BALANCE = Registry('balance loss')


def build_router(cfg: Any, **defaults: Any) -> Any:
    """Build a router from its dict, see :meth:`Registry.build`."""
    return ROUTERS.build(cfg, **defaults)
