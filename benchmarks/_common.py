"""What the benchmarks share: where and on what they ran, tables, JSON, promises kept or not."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Promise:
    """A figure that was promised, what was measured, and whether it holds."""

    text: str
    measured: str
    kept: bool


class Stopwatch:
    """Seconds of this process's processor time (``cpu``) and of the clock on the wall."""

    def __init__(self) -> None:
        self.start = time.process_time(), time.perf_counter()

    def read(self) -> tuple[float, float]:
        """(cpu, wall) since the start."""
        return time.process_time() - self.start[0], time.perf_counter() - self.start[1]


def peak_megabytes() -> float:
    """Largest resident memory of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def provenance(seed: int) -> dict[str, Any]:
    """Command, commit, hardware, versions and seed of this run."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return 'absent'

    try:
        commit = subprocess.run(
            ['git', 'describe', '--always', '--dirty', '--abbrev=12'],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = 'unknown'
    return {
        'command': ' '.join(['python', *sys.argv]),
        'commit': commit,
        'date': time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime()),
        'hardware': f'{_processor()}, {os.cpu_count()} cores; load {os.getloadavg()[0]:.1f}',
        'python': platform.python_version(),
        'versions': {name: installed(name) for name in ('numpy', 'scipy', 'pulp', 'highspy')},
        'seed': seed,
    }


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return next(line.split(':', 1)[1].strip() for line in lines if 'model name' in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns aligned; all but the first to the right."""
    cells = [list(head), *[list(row) for row in rows]]
    width = [max(len(row[k]) for row in cells) for k in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first, *rest = (
            cell.rjust(w) if k else cell.ljust(w)
            for k, (cell, w) in enumerate(zip(row, width, strict=True))
        )
        return '| ' + ' | '.join([first, *rest]) + ' |'

    rule = '|' + '|'.join('-' * (w + 1) + (':' if k else '-') for k, w in enumerate(width)) + '|'
    return '\n'.join([line(cells[0]), rule, *map(line, cells[1:])])


def verdict(promises: Sequence[Promise]) -> str:
    """One line per promise: PASS or FAIL, the text, what was measured."""
    return '\n'.join(f'{"PASS" if p.kept else "FAIL"}  {p.text}: {p.measured}' for p in promises)


def write_json(path: str | os.PathLike, data: Any) -> None:
    """Writes JSON atomically; promises become dicts."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix='.tmp')
    with os.fdopen(handle, 'w') as file:
        json.dump(data, file, indent=1, default=lambda value: asdict(value))
        file.write('\n')
    os.replace(name, path)
