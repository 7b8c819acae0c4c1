"""Checks shared by the problem file and the plan file: names, numbers, arrays, files.

Every check raises :class:`PlanError` with one line that names the culprit and what would be right.
"""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from mmdet_moe.planning.errors import PlanError


def number(value: float) -> str:
    """A number as a message shows it: ten digits, no trailing zeros."""
    return f'{float(value):.10g}'


def names_of(values: Any, what: str) -> tuple[str, ...]:
    """Checks a list of unique, non-empty names (``what`` is 'datasets' or 'experts')."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise PlanError(f'{what} must be a list of names, got {values!r}')
    names = tuple(values)
    if not names:
        raise PlanError(f'{what} is empty: at least one name is needed')
    seen = set()
    for name in names:
        if not isinstance(name, str) or not name:
            raise PlanError(f'{what} must be non-empty strings, got {name!r}')
        if name in seen:
            raise PlanError(f'{what} lists {name!r} twice; names must be unique')
        seen.add(name)
    return names


def unknown_name(name: Any, known: Sequence[str], what: str) -> str:
    """The message about a name that is not among the known ones, with near ones suggested."""
    near = difflib.get_close_matches(str(name), known, n=3)
    hint = f'did you mean {" or ".join(map(repr, near))}?' if near else f'known: {short(known)}'
    return f'{what} {name!r} is unknown; {hint}'


def short(names: Iterable[str], limit: int = 12) -> str:
    """A list of names for a message, cut after ``limit``."""
    names = list(names)
    tail = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + tail


def check_keys(
    data: Mapping[str, Any], required: Sequence[str], optional: Sequence[str], what: str
) -> None:
    """Refuses missing and unknown keys of a JSON object."""
    if not isinstance(data, Mapping):
        raise PlanError(f'{what} must be a JSON object, got {type(data).__name__}')
    missing = [key for key in required if key not in data]
    if missing:
        raise PlanError(f'{what} lacks {", ".join(map(repr, missing))}')
    known = [*required, *optional]
    for key in data:
        if key not in known:
            raise PlanError(unknown_name(key, known, f'{what}: key'))


def scalar(value: Any, what: str, minimum: float | None = None) -> float:
    """A finite real number, not below ``minimum``."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise PlanError(f'{what} must be a number, got {value!r}')
    try:
        result = float(value)
    except OverflowError:
        raise PlanError(f'{what} is too large for a float') from None
    if not np.isfinite(result):
        raise PlanError(f'{what} must be finite, got {result}')
    if minimum is not None and result < minimum:
        raise PlanError(f'{what} must be at least {number(minimum)}, got {number(result)}')
    return result


def is_scalar(value: Any) -> bool:
    """Whether a value is one number rather than a list of them."""
    return isinstance(value, Real) or (isinstance(value, np.ndarray) and value.ndim == 0)


def vector(
    values: Any, names: Sequence[str], what: str, per: str, minimum: float | None = None
) -> np.ndarray:
    """A float array with one finite entry per name; one number is repeated for every name.

    Args:
        values: A number, or a sequence of numbers, one per name.
        names: The datasets or experts the entries belong to.
        what: The field's name, for messages.
        per: 'dataset' or 'expert', for messages.
        minimum: Smallest value allowed.

    Returns:
        Array of shape (len(names),).
    """
    if is_scalar(values):
        return np.full(len(names), scalar(np.asarray(values).item(), what, minimum))
    if isinstance(values, (str, Mapping)) or not isinstance(values, (Sequence, np.ndarray)):
        raise PlanError(f'{what} must be a number or a list with one per {per}, got {values!r}')
    if len(values) != len(names):
        raise PlanError(
            f'{what} has {len(values)} entries for {len(names)} {per}s; one per {per} is needed'
        )
    array = _numeric(values)
    good = array is not None and array.ndim == 1 and np.isfinite(array).all()
    if array is not None and good and (minimum is None or (array >= minimum).all()):
        return array
    return np.array(
        [scalar(v, f'{what} of {name!r}', minimum) for v, name in zip(values, names, strict=True)]
    )


def matrix(
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    what: str,
    minimum: float | None = None,
) -> np.ndarray:
    """A float array of shape (len(rows), len(columns)) of finite numbers, at least ``minimum``."""
    if isinstance(values, (str, Mapping)) or not isinstance(values, (Sequence, np.ndarray)):
        raise PlanError(f'{what} must be a list of rows, got {type(values).__name__}')
    if len(values) != len(rows):
        raise PlanError(
            f'{what} has {len(values)} rows for {len(rows)} datasets; one per dataset is needed'
        )
    for row, name in zip(values, rows, strict=True):
        if isinstance(row, (str, Mapping)) or not isinstance(row, (Sequence, np.ndarray)):
            raise PlanError(f'{what} of {name!r} must be a list of numbers, got {row!r}')
        if len(row) != len(columns):
            raise PlanError(
                f'{what} of {name!r} has {len(row)} entries for {len(columns)} experts '
                '(ragged or mis-shaped)'
            )
    array = _numeric(values)
    if array is None or array.ndim != 2:  # something that is not a number: find it
        array = np.array(
            [
                [scalar(v, _entry(what, r, c)) for v, c in zip(row, columns, strict=True)]
                for row, r in zip(values, rows, strict=True)
            ]
        )
    bad = ~np.isfinite(array)
    if minimum is not None:
        bad |= array < minimum
    if bad.any():
        i, j = np.argwhere(bad)[0]
        scalar(float(array[i, j]), _entry(what, rows[i], columns[j]), minimum)
    return array


def _entry(what: str, row: str, column: str) -> str:
    return f'{what} of {row!r} at {column!r}'


def _numeric(values: Any) -> np.ndarray | None:
    """A fresh float64 array of the values, or None when some are not plain numbers."""
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):
        return None
    return array.astype(np.float64) if array.dtype.kind in 'iuf' else None


def integers(values: np.ndarray, names: Sequence[str], what: str) -> np.ndarray:
    """The same numbers as int64, refusing fractions."""
    for value, name in zip(values.tolist(), names, strict=True):
        if value != int(value):
            raise PlanError(f'{what} of {name!r} must be a whole number, got {number(value)}')
    return values.astype(np.int64)


def integer(value: Any, what: str, minimum: int) -> int:
    """A whole number, not below ``minimum``."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Integral):
        raise PlanError(f'{what} must be a whole number, got {value!r}')
    if value < minimum:
        raise PlanError(f'{what} must be at least {minimum}, got {value}')
    return int(value)


def read_json(path: str | os.PathLike, what: str) -> Any:
    """Reads a JSON file; an unreadable one is a :class:`PlanError` naming it."""
    try:
        with open(path, encoding='utf-8') as file:
            return json.load(file)
    except OSError as error:
        raise PlanError(f'cannot read {what} {os.fspath(path)!r}: {error.strerror}') from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError
        raise PlanError(f'{what} {os.fspath(path)!r} is not JSON: {error}') from None


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Writes a text file so that readers see the old one or the new one, never a part."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f'.{target.name}.', suffix='.tmp')
    try:
        with os.fdopen(handle, 'w', encoding='utf-8') as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes 0600; a plan is an ordinary file
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
