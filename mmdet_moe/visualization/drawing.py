"""What the pictures share: short numbers, short names, files that are never there in part."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def short(value: float) -> str:
    """A number of at most five characters or so, without noise."""
    if abs(value) < 5e-7:
        return '0'
    text = f'{value:.2f}' if 0.005 <= abs(value) < 100 else f'{value:.2g}'
    return text.replace('0.', '.', 1) if text.lstrip('-').startswith('0.') else text


def clip(name: str, limit: int = 30) -> str:
    """A name of at most ``limit`` characters."""
    return name if len(name) <= limit else name[: limit - 1] + '…'


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure atomically; the suffix says as what.

    Raises:
        ValueError: There is no suffix, or matplotlib does not know it.
    """
    target = Path(path)
    if not target.suffix:
        raise ValueError(f'picture {str(target)!r}: the name needs a suffix, say .png')
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        dir=target.parent, prefix=f'.{target.stem}.', suffix=target.suffix
    )
    os.close(handle)
    try:
        # Without the date in it, the same plan gives the same bytes.
        metadata = {'.pdf': {'CreationDate': None}, '.svg': {'Date': None}}
        figure.savefig(name, dpi=150, metadata=metadata.get(target.suffix.lower()))
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
