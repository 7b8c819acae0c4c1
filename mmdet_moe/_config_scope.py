"""Make ``_base_ = 'mmdet_moe::...'`` resolve, without importing mmengine to do so.

mmengine resolves ``package::path`` through a closed table, ``MODULE2PACKAGE`` in
``mmengine/config/utils.py``. It has no entry for third parties, so we add ours: at once if that
module is loaded already, otherwise at the moment somebody loads it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

_TABLE_MODULE = 'mmengine.config.utils'
#: What ``a::b`` configs call us -> the importable package whose ``.mim/configs`` holds them.
_ENTRY = ('mmdet_moe', 'mmdet_moe')


def _add_entry(module: ModuleType) -> None:
    table = getattr(module, 'MODULE2PACKAGE', None)
    if isinstance(table, dict):
        table.setdefault(*_ENTRY)


class _Loader(importlib.abc.Loader):
    """Run the module's own loader, then add our entry."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _add_entry(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Catch the one import we wait for, then step aside."""

    def find_spec(self, fullname, path, target=None):
        if fullname != _TABLE_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def register_config_scope() -> None:
    """Add ``mmdet_moe`` to mmengine's table of config packages, now or when mmengine is loaded."""
    if _TABLE_MODULE in sys.modules:
        _add_entry(sys.modules[_TABLE_MODULE])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
