"""Make the environment that mmdet-moe runs in, once; do nothing where that is done.

``make setup`` (and with it ``make demo`` and ``make test``) calls this with any Python >= 3.10 and
needs nothing else than a C++ compiler and a package registry::

    python3 tools/setup_env.py --venv .venv

What it does, each step only where its work is missing:

1. a virtual environment,
2. the pinned packages of ``requirements/pinned.txt`` (torch with its CUDA libraries is 4.7 GB),
3. the mmcv wheel. mmcv is published as source only and takes 11 to 13 minutes on two cores, so its
   wheel is kept in the user's cache (``$XDG_CACHE_HOME`` or ``~/.cache``, then
   ``mmdet-moe/wheels/torch<version>-cp<version>``). pip's own cache does not know which torch a
   wheel was built against, hence a folder of our own that says so in its name,
4. the other mm packages, and mmdet-moe itself as an editable install,
5. a check that all of it imports, then a stamp. A stamp that matches the requirements ends the next
   call at once.

An environment that exists already and was not made by this script is the user's: it is checked,
and used as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINNED = ROOT / 'requirements' / 'pinned.txt'
PINNED_MM = ROOT / 'requirements' / 'pinned_mm.txt'
#: Written first into an environment, so that an interrupted one is known as ours.
MARK = 'made-by-mmdet-moe'
#: Written last.
STAMP = 'mmdet-moe-stamp.json'
#: Seconds between two lines of a long step where the output is not a terminal.
HEARTBEAT = 20.0

_IMPORTS = """
import cv2, torch, torchvision
import mmengine, mmcv, mmcv.ops, mmdet.models, mmdet.datasets, mmdet.evaluation, mmpretrain.models
import pulp, highspy, scipy, sklearn, matplotlib, rich, faster_coco_eval
import pytest, hypothesis
import mmdet_moe
"""


class SetupError(RuntimeError):
    """A step failed; the message says which, why, and what to do."""


def say(text: str) -> None:
    """One line about what is going on, at once."""
    print(f'setup: {text}', flush=True)


def _clock(seconds: float) -> str:
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


def _end_group(process: subprocess.Popen) -> None:
    """End a process and all it started, and return when none of them is left.

    The compilers outlive pip by a moment and would write into a folder that is being removed.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        start = time.monotonic()
        # Not for ever: where nobody reaps them, zombies count as alive.
        while time.monotonic() < start + 12:
            process.poll()
            os.killpg(process.pid, signal.SIGKILL if time.monotonic() > start + 10 else 0)
            time.sleep(0.1)
    process.wait()


class Runner:
    """Runs commands with their output in a log file and a line about the time they take.

    Args:
        log: File that receives all output.
    """

    def __init__(self, log: Path) -> None:
        self.log = log

    def run(self, command: list[str], what: str, env: dict[str, str] | None = None) -> None:
        """Run one command.

        Args:
            command: Program and arguments.
            what: What the user reads while it runs.
            env: Environment variables on top of the present ones.

        Raises:
            SetupError: If it fails, with the end of its output.
        """
        start = time.monotonic()
        with self.log.open('a') as sink:
            sink.write(f'\n$ {" ".join(command)}\n')
            sink.flush()
            offset = sink.tell()
            # A group of its own: a compiler farm is ended with its parent, not left running.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
            try:
                self._watch(process, what, start, offset)
            except BaseException:
                _end_group(process)
                raise
        if process.returncode:
            tail = ''.join(self.log.read_text(errors='replace')[offset:].splitlines(True)[-25:])
            raise SetupError(f'{what}: failed. The end of {self.log}:\n{tail}')
        say(f'{what}: done in {_clock(time.monotonic() - start)}')

    def _watch(self, process: subprocess.Popen, what: str, start: float, offset: int) -> None:
        """Print the elapsed time until the process ends."""
        live = sys.stdout.isatty()
        shown = start - HEARTBEAT
        while process.poll() is None:
            now = time.monotonic()
            if live or now - shown >= HEARTBEAT:
                shown = now
                line = f'{what}: {_clock(now - start)} so far{self._compiled(offset)}'
                print(f'\r\033[Ksetup: {line}' if live else f'setup: {line}', flush=True, end='')
                print('' if live else '\n', flush=True, end='')
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
        if live:
            print('\r\033[K', end='', flush=True)

    def _compiled(self, offset: int) -> str:
        """Ninja's last ``[files/of]`` in the log, if there is one."""
        with self.log.open('rb') as log:
            log.seek(max(offset, self.log.stat().st_size - 20_000))
            counts = re.findall(rb'\[(\d+)/(\d+)\]', log.read())
        return f', {int(counts[-1][0])} of {int(counts[-1][1])} files compiled' if counts else ''


def _pins(path: Path) -> dict[str, str]:
    """Package -> version of a pinned requirements file (markers left aside)."""
    pins = {}
    for line in path.read_text().splitlines():
        match = re.match(r'([\w.-]+)==([^\s;#]+)', line)
        if match:
            pins[match[1]] = match[2]
    return pins


def _fingerprint() -> str:
    """What the stamp must say: requirements, recipe, Python and the place of this checkout."""
    digest = hashlib.sha256()
    for path in (PINNED, PINNED_MM, ROOT / 'setup.py', Path(__file__).resolve()):
        digest.update(path.read_bytes())
    digest.update(f'{sys.version_info[:2]} {ROOT}'.encode())
    return digest.hexdigest()


def wheel_folder(torch_version: str, cuda: bool) -> Path:
    """Where the mmcv wheel for this torch, Python and machine is kept."""
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    python = f'cp{sys.version_info[0]}{sys.version_info[1]}'
    return cache / 'mmdet-moe' / 'wheels' / f'torch{torch_version}-{python}{"-cuda" * cuda}'


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold a lock on a folder (the folder itself, no file in it), saying so if another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f'another process is at {what}: waiting for it')
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def make_venv(venv: Path, runner: Runner) -> None:
    """An environment with a working pip at ``venv``; a broken one of ours is made again."""
    python = venv / 'bin' / 'python'
    works = (
        python.exists()
        and not subprocess.run(
            [str(python), '-m', 'pip', '--version'], capture_output=True, check=False
        ).returncode
    )
    if works:
        return
    try:
        # --clear also removes our mark and the log, so they are written again.
        runner.run([sys.executable, '-m', 'venv', '--clear', str(venv)], f'environment {venv}')
    except SetupError as error:
        raise SetupError(
            f'{error}\nIf it is about ensurepip: Debian keeps it apart (apt install python3-venv).'
        ) from None
    finally:
        venv.mkdir(exist_ok=True)
        (venv / MARK).touch()


def build_mmcv(venv: Path, runner: Runner) -> Path:
    """The mmcv wheel, from the cache or built into it.

    Raises:
        SetupError: If there is no compiler, or the build fails.
    """
    version = _pins(PINNED_MM)['onedl-mmcv']
    python = str(venv / 'bin' / 'python')
    cuda = os.environ.get('FORCE_CUDA') == '1'
    if not cuda and shutil.which('nvcc'):
        probe = 'import torch; raise SystemExit(not torch.cuda.is_available())'
        cuda = not subprocess.run(
            [python, '-c', probe], capture_output=True, check=False
        ).returncode
    folder = wheel_folder(_pins(PINNED)['torch'], cuda)
    tag = sysconfig.get_platform().replace('-', '_').replace('.', '_')
    pattern = f'onedl_mmcv-{version}-*{tag}.whl'
    with locked(folder, 'the mmcv wheel'):
        found = sorted(folder.glob(pattern))
        if found:
            say(f'mmcv {version}: taken from {found[0]}')
            return found[0]
        if not (shutil.which('c++') or shutil.which('g++') or os.environ.get('CXX')):
            raise SetupError(
                'mmcv is built from source, but there is no C++ compiler (install g++)'
            )
        if not (Path(sysconfig.get_path('include')) / 'Python.h').exists():
            raise SetupError(
                "mmcv is built from source, but Python's headers are missing (install python3-dev, "
                'or give another PYTHON=...)'
            )
        say(f'mmcv {version} has no wheel for this torch and Python in {folder}:')
        say('building it once, 11 to 13 minutes on two cores')
        for left_over in folder.glob('build-*'):  # of a process that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix='build-', dir=folder) as scratch:
            command = [python, '-m', 'pip', 'wheel', '-v', '--no-cache-dir', '--no-build-isolation']
            command += ['--no-deps', '--wheel-dir', scratch, f'onedl-mmcv=={version}']
            # mmcv asks for CUDA sources where torch sees a GPU, and then fails where there is no
            # nvcc: without one, the GPU is kept out of its sight.
            env = {'MMCV_WITH_OPS': '1', 'TMPDIR': scratch}
            env |= {'FORCE_CUDA': '1'} if cuda else {'CUDA_VISIBLE_DEVICES': ''}
            env.setdefault('MAX_JOBS', os.environ.get('MAX_JOBS', str(_jobs())))
            env['PATH'] = f'{venv / "bin"}{os.pathsep}{os.environ.get("PATH", "")}'
            runner.run(command, 'building mmcv', env)
            (built,) = Path(scratch).glob('*.whl')
            os.replace(built, folder / built.name)
        return folder / built.name


def _jobs() -> int:
    """Compilers at a time: one per core, and 1.5 GB of memory for each."""
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return max(1, min(os.cpu_count() or 1, int(memory / 1.5e9)))


def check_imports(venv: Path) -> str | None:
    """What fails when everything is imported: the last line of the traceback, None if nothing."""
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'MPLBACKEND': 'Agg'}
    result = subprocess.run(
        [str(venv / 'bin' / 'python'), '-W', 'ignore', '-c', _IMPORTS],
        capture_output=True,
        text=True,
        check=False,
        env=env,
        cwd=tempfile.gettempdir(),
    )
    return None if not result.returncode else (result.stderr.strip().splitlines() or ['?'])[-1]


def set_up(venv: Path) -> None:
    """Bring the environment at ``venv`` to what the requirements say.

    Raises:
        SetupError: If a step fails.
    """
    python = str(venv / 'bin' / 'python')
    (venv / STAMP).unlink(missing_ok=True)
    with tempfile.NamedTemporaryFile(prefix='mmdet-moe-venv-', suffix='.log', delete=False) as log:
        runner = Runner(Path(log.name))
    make_venv(venv, runner)
    # The log belongs into the environment, which exists only now.
    runner.log = Path(shutil.move(runner.log, venv / 'setup.log'))
    pip = [python, '-m', 'pip', 'install', '--disable-pip-version-check']
    runner.run(
        [*pip, '-r', str(PINNED)],
        'packages of requirements/pinned.txt (torch alone is 4.7 GB, a few minutes)',
    )
    # Building mmcv needs mmengine, so the packages without sources come first.
    others = [f'{name}=={v}' for name, v in _pins(PINNED_MM).items() if name != 'onedl-mmcv']
    runner.run([*pip, '--no-deps', *others], 'packages of requirements/pinned_mm.txt')
    wheel = build_mmcv(venv, runner)
    runner.run([*pip, '--no-deps', '--no-index', str(wheel)], 'mmcv')
    runner.run(
        [*pip, '--no-deps', '--no-index', '--no-build-isolation', '-e', str(ROOT)], 'mmdet-moe'
    )
    say('checking that everything imports')
    failure = check_imports(venv)
    if failure is not None and 'undefined symbol' in failure:
        wheel.unlink()
        raise SetupError(
            f'the mmcv wheel {wheel} was built against another torch ({failure}); '
            'it is removed now: run the same command again to build it anew'
        )
    if failure is not None:
        raise SetupError(f'the environment at {venv} is set up, but does not work: {failure}')
    part = venv / f'{STAMP}.part'
    part.write_text(json.dumps({'fingerprint': _fingerprint()}) + '\n')
    os.replace(part, venv / STAMP)


def is_set_up(venv: Path) -> bool:
    """Whether the stamp of ``venv`` matches the requirements."""
    try:
        stamp = json.loads((venv / STAMP).read_text())
    except (OSError, ValueError):
        return False
    # `git clean -x` removes the links of the editable install, but not the environment around it.
    linked = (ROOT / 'mmdet_moe' / '.mim' / 'configs').exists()
    return linked and stamp == {'fingerprint': _fingerprint()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--venv', default='.venv', help='the environment (default: .venv)')
    venv = Path(parser.parse_args(argv).venv).expanduser().absolute()
    if is_set_up(venv):
        return 0
    # Ending the process by signal must unwind like Ctrl-C: end the compilers, remove the scratch.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    foreign = venv.exists() and any(venv.iterdir()) and not (venv / MARK).exists()
    try:
        if foreign:
            if not (venv / 'bin' / 'python').exists():
                raise SetupError(
                    f'{venv} exists and is no Python environment: choose another VENV='
                )
            failure = check_imports(venv)
            if failure is not None:
                raise SetupError(
                    f'{venv} was not made by this script and is used as it is, but: {failure}. '
                    'Install what is missing, or choose another VENV='
                )
            return 0
        say(f'environment {venv} (log: {venv / "setup.log"})')
        start = time.monotonic()
        with locked(venv.parent, str(venv)):
            if not is_set_up(venv):
                set_up(venv)
        say(f'ready in {_clock(time.monotonic() - start)}')
    except SetupError as error:
        print(f'setup: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\nsetup: interrupted; the same command goes on from here', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    if sys.version_info < (3, 10):  # noqa: UP036 - the one place that must speak to older ones
        sys.exit(
            f'setup: needs Python 3.10 or later, this is {sys.version.split()[0]} (PYTHON=...)'
        )
    sys.exit(main())
