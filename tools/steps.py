"""What jobs of many steps (``demo.py``, ``mini_uodb.py``, ...) share: steps not done twice.

Each step is one command of this repository, printed before it runs, with its full output in a log.
A step whose inputs have not changed since it was last done is skipped; an interrupted training goes
on from its checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # to run from a clone, uninstalled

from mmdet_moe.jobs.job import last_checkpoint  # noqa: E402

T = TypeVar('T')


class StepError(RuntimeError):
    """A step failed; the message says which and where its output is."""


def write_json(path: Path, content: object) -> None:
    part = path.with_name(f'{path.name}.part')
    part.write_text(json.dumps(content, indent=2) + '\n')
    os.replace(part, path)


class Steps:
    """Runs steps in order and remembers, across calls, which are done.

    A step's key covers the keys of all steps before it, so that one that runs again makes all
    later ones run again. Steps of a :meth:`branch` count for each other only.

    Args:
        out: Folder that holds the memory (``steps.json``) and the log (``steps.log``).
        inputs: Anything that all steps depend on.
        env: Environment variables for all commands.
        label: Stands before every line that is printed, where several jobs run at once.
    """

    def __init__(self, out: Path, inputs: str, env: dict[str, str], label: str = '') -> None:
        self.label = label
        self.process: subprocess.Popen | None = None
        self.stopped = False
        self.memory = out / 'steps.json'
        self.log = out / 'steps.log'
        self.env = {**os.environ, **env}
        self.key = hashlib.sha256(inputs.encode()).hexdigest()
        try:
            self.done: dict[str, str] = json.loads(self.memory.read_text())
        except (OSError, ValueError):
            self.done = {}

    @contextmanager
    def branch(self, inputs: str = '') -> Iterator[None]:
        """Steps within depend on ``inputs`` and on the steps before the branch; those after it do
        not depend on them.
        """
        key = self.key
        self.key = hashlib.sha256(f'{key} {inputs}'.encode()).hexdigest()
        yield
        self.key = key

    def _remember(self, name: str) -> None:
        self.done[name] = self.key
        write_json(self.memory, self.done)

    def say(self, text: str) -> None:
        """Print a line, in one piece."""
        print(f'{self.label}{text}\n', end='', flush=True)

    def stop(self) -> None:
        """End the command that runs, from another thread; none runs afterwards."""
        self.stopped = True
        if self.process is not None:
            self.process.terminate()

    def step(
        self,
        name: str,
        what: str,
        action: Callable[[bool], None],
        inputs: str,
        outputs: list[Path],
    ) -> None:
        """Do one step, unless it is done.

        Args:
            name: Its name in the memory.
            what: What the user reads.
            action: Does it. The argument says whether the same step was begun before and broke off.
            inputs: What it depends on besides all steps before it.
            outputs: Files that exist when it is done.
        """
        self.key = hashlib.sha256(f'{self.key} {name} {inputs}'.encode()).hexdigest()
        if self.done.get(name) == self.key and all(path.exists() for path in outputs):
            self.say(f'== {what}: done already')
            return
        self.say(f'== {what}')
        start = time.monotonic()
        begun_before = self.done.get(f'{name} begun') == self.key
        self._remember(f'{name} begun')
        action(begun_before)
        missing = [str(path) for path in outputs if not path.exists()]
        if missing:
            raise StepError(f'{what}: ended without writing {", ".join(missing)} (see {self.log})')
        self._remember(name)
        self.say(f'   {time.monotonic() - start:.0f} s')

    def run(
        self, *arguments: str, show: Callable[[str], str | None], env: dict[str, str] | None = None
    ) -> None:
        """Run one of our tools.

        Args:
            *arguments: The tool and its arguments.
            show: Turns a line of its output into what the user sees of it, None for nothing.
            env: Environment variables for this command.

        Raises:
            StepError: If it fails, with the end of its output.
        """
        spoken = ' '.join([*(f'{k}={v}' for k, v in (env or {}).items()), 'python', *arguments])
        self.say(f'   $ {spoken}')
        tail: list[str] = []
        if self.stopped:
            raise StepError(f'{arguments[0]} was not begun')
        with self.log.open('a') as log:
            log.write(f'\n$ {spoken}\n')
            process = self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env={**self.env, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors='replace',
            )
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    log.write(line)
                    log.flush()
                    tail = [*tail[-24:], line]
                    shown = show(line.rstrip('\n'))
                    if shown is not None:
                        self.say(f'   {shown}')
                process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise
        if process.returncode:
            raise StepError(
                f'{arguments[0]} failed with exit code {process.returncode}. The end of '
                f'{self.log}:\n{"".join(tail)}'
            )


def everything(line: str) -> str | None:
    """Show a tool's own output, without the libraries' remarks."""
    remark = ' - mmengine - ' in line or line == 'Could not import OneDL'
    return None if remark else line


def progress(line: str) -> str | None:
    """Show what mmengine's log says about progress: iteration, loss, time left."""
    match = re.search(r'(Iter|Epoch)\((\w+)\)\s*(?:\[(\d+)\])?\s*\[\s*(\d+)/(\d+)\s*\](.*)', line)
    if not match:
        return None
    unit, phase, epoch, at, of, rest = match.groups()
    facts = [f'epoch {epoch}' if unit == 'Epoch' and epoch else '', f'{phase} {at}/{of}']
    for name in ('eta', 'loss', 'accuracy/top1'):
        found = re.search(rf'\b{name}: (\S+)', rest)
        if found:
            facts.append(f'{name} {found[1]}')
    return '  '.join(filter(None, facts))


def source_digest() -> str:
    """Hash of all code and configs that a job's result depends on."""
    digest = hashlib.sha256()
    folders = [ROOT / name for name in ('mmdet_moe', 'configs', 'tools')]
    files = [path for folder in folders for path in folder.rglob('*.py')]
    files += (ROOT / 'requirements').glob('pinned*.txt')
    for path in sorted(files):
        if '.mim' not in path.parts:
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def devices() -> dict[str, str]:
    """Environment that hides a GPU from torch where mmcv has no operators for it."""
    import torch

    if torch.cuda.is_available():
        from mmcv.ops import get_compiling_cuda_version

        if get_compiling_cuda_version() == 'not available':
            print('   the GPU stays idle: mmcv was built without CUDA operators')
            return {'CUDA_VISIBLE_DEVICES': ''}
    return {}


def train(
    steps: Steps,
    what: str,
    config: str,
    folder: Path,
    seed: int,
    options: Sequence[str] = (),
    env: dict[str, str] | None = None,
) -> Path:
    """The step that trains a config into ``folder``; returns the checkpoint.

    Args:
        steps: The job's steps.
        what: What the user reads.
        config: The config file.
        folder: The work dir.
        seed: The random seed.
        options: Changes of the config, ``KEY=VALUE``.
        env: Environment variables for this training.

    Raises:
        StepError: If training fails or leaves no checkpoint.
    """

    def action(begun_before: bool) -> None:
        if not begun_before:
            shutil.rmtree(folder, ignore_errors=True)
        last = last_checkpoint(folder)
        resume = [] if last is None else ['--resume', last]
        arguments = ['tools/train.py', config, '--work-dir', str(folder), *resume]
        changes = [f'randomness.seed={seed}', *options]
        steps.run(*arguments, '--cfg-options', *changes, show=progress, env=env)

    done = [folder / 'last_checkpoint']
    inputs = ' '.join([config, str(seed), *options, *map(str, (env or {}).items())])
    steps.step(f'train {folder.name}', what, action, inputs, done)
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        raise StepError(f'training left no checkpoint in {folder}')
    return Path(checkpoint)


def test(
    steps: Steps,
    what: str,
    config: str,
    checkpoint: Path,
    folder: Path,
    options: Sequence[str] = (),
    env: dict[str, str] | None = None,
    domains: Sequence[str] = (),
    flags: Sequence[str] = (),
) -> dict[str, float]:
    """The step that tests a checkpoint; returns its metrics, ``<folder>/metrics.json`` has them.

    Args:
        steps: The job's steps.
        what: What the user reads.
        config: The config file.
        checkpoint: What to test.
        folder: The work dir.
        options: Changes of the config, ``KEY=VALUE``.
        env: Environment variables for this test.
        domains: Those to test; none: all.
        flags: More of ``tools/test.py``, such as ``--both-readings``.
    """
    result = folder / 'metrics.json'

    def action(_: bool) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        arguments = ['tools/test.py', config, str(checkpoint), '--work-dir', str(folder), *flags]
        arguments += ['--domains', *domains] if domains else []
        arguments += ['--cfg-options', *options] if options else []
        steps.run(*arguments, '--out-json', str(result), show=progress, env=env)

    inputs = f'{config} {[*options]} {[*(env or {}).items()]} {[*domains]} {[*flags]}'
    steps.step(f'test {folder.name}', what, action, inputs, [result])
    return json.loads(result.read_text())['metrics']


def run_all(tasks: Sequence[tuple[Steps, Callable[[Steps], T]]], at_once: int) -> list[T]:
    """Do tasks with steps of their own, several at once; their results, in the order of the tasks.

    When one fails, or the user interrupts, the commands of the others are ended.
    """
    failed = threading.Event()

    def run(steps: Steps, task: Callable[[Steps], T]) -> T | None:
        if failed.is_set():
            return None
        try:
            return task(steps)
        except BaseException:
            failed.set()  # before this thread takes the next task
            raise

    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(run, steps, task) for steps, task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for steps, _ in tasks:
                steps.stop()
            raise
    return [future.result() for future in futures]


def threads() -> str:
    """Threads per command: all cores, unless the user has said otherwise."""
    return os.environ.get('OMP_NUM_THREADS', str(os.cpu_count() or 1))


@contextmanager
def claim(out: Path) -> Iterator[None]:
    """Hold the folder of a job, made if need be, against other processes.

    Raises:
        StepError: One of them holds it, or it cannot be made.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(out / '.lock', timeout=0)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise StepError(f'another job is at work in {out}: wait for it, or choose --out') from None
    except NotImplementedError:  # a file system without locks
        pass
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # the same
            raise StepError(f'cannot work in {out}: {error.strerror}') from None
    try:
        yield
    finally:
        lock.release()


def call(name: str, job: Callable[[], int], out: Path) -> int:
    """Run a job in the folder ``out``; its exit code, with one clear line where it fails."""
    # Put back in the end: processes forked later, in tests, would not die of a SIGTERM otherwise.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    start = time.monotonic()
    try:
        with claim(out):
            code = job()
    except StepError as error:
        print(f'{name}: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f'\n{name}: interrupted; the same command goes on from here', file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f'{name}: {time.monotonic() - start:.0f} s')
    return code
