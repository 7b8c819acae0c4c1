"""One training of a sweep, in a process of its own that does not import everything anew."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mmdet_moe.planning.checks import write_atomically

DONE = 'done.json'
LOG = 'log.txt'
METHOD = 'forkserver' if 'forkserver' in multiprocessing.get_all_start_methods() else 'spawn'


@dataclass(frozen=True)
class Job:
    """A training.

    Attributes:
        name: Its name, and its folder in the sweep's.
        folder: Absolute path of its folder.
        config: Absolute path of its config.
        env: Environment variables, the config's ``{{$NAME:default}}`` among them.
        options: Changes of the config, dotted key -> value.
        seed: Random seed.
        after: Name of the job that must be done before.
        load_from: Folder of the job whose last checkpoint this one starts from.
        content: Digest of the configs' content, this one's and of the jobs before, so that a
            changed config is trained anew.
        threads: Threads of torch.
        inherited: Environment variables that are no input of their own: which GPU, and what the
            config read from the sweep's environment (``content`` has that).
    """

    name: str
    folder: str
    config: str
    env: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    after: str | None = None
    load_from: str | None = None
    content: str = ''
    threads: int = 1
    inherited: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Digest of all that the result depends on."""
        no_input = ('folder', 'load_from', 'threads', 'inherited')
        what = {k: v for k, v in asdict(self).items() if k not in no_input}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    @property
    def records(self) -> Path:
        """The file of the records."""
        return Path(self.folder) / 'train' / 'dg_records.jsonl'

    @property
    def log(self) -> Path:
        """The file of all that the training prints."""
        return Path(self.folder) / LOG

    @property
    def checkpoint(self) -> str | None:
        """The last checkpoint, None if there is none."""
        return last_checkpoint(Path(self.folder) / 'train')

    def is_done(self) -> bool:
        """Whether it was done, with these inputs."""
        try:
            done = json.loads((Path(self.folder) / DONE).read_text())
        except (OSError, ValueError):
            return False
        return done.get('key') == self.key and self.records.is_file()


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint of a work dir, which may have been moved; None if there is none."""
    try:
        path = folder / Path((folder / 'last_checkpoint').read_text().strip()).name
    except OSError:
        return None
    return str(path) if path.is_file() else None


def begin(cfg: Any, job: Job) -> None:
    """Let the config's training start where the job's does: at its own last checkpoint, else at
    the last one of the job before.

    Raises:
        FileNotFoundError: The job before has none.
    """
    start = None if job.load_from is None else last_checkpoint(Path(job.load_from) / 'train')
    if job.load_from is not None and start is None:
        raise FileNotFoundError(f'{job.load_from} has no checkpoint to start from')
    checkpoint = job.checkpoint
    if checkpoint is None:
        cfg.load_from = start or cfg.get('load_from')
        return
    cfg.resume, cfg.load_from = True, checkpoint
    for hook in cfg.get('custom_hooks', []) if start else ():
        if hook['type'].endswith('AdapterCheckpointHook'):
            hook.setdefault('base', start)  # checkpoints of adapters alone lie over these weights


def train(job: Job) -> None:
    """Do a job in this process, or go on with it where it was killed."""
    import torch
    from mmengine.config import Config
    from mmengine.runner import Runner

    class QuietRunner(Runner):
        """Without the description of the machine, which takes seconds for each of many jobs."""

        def _log_env(self, env_cfg: dict) -> None:
            pass

    # The same config without its pretty print, which takes seconds as well.
    Config.pretty_text = property(
        lambda self: ''.join(f'{k} = {v!r}\n' for k, v in self._cfg_dict.to_dict().items())
    )
    folder = Path(job.folder)
    work_dir = folder / 'train'
    begun = folder / 'begun.json'
    try:
        same = json.loads(begun.read_text())['key'] == job.key
    except (OSError, ValueError, KeyError):
        same = False
    (folder / DONE).unlink(missing_ok=True)
    if not same:
        shutil.rmtree(work_dir, ignore_errors=True)
    write_atomically(begun, json.dumps({'key': job.key}) + '\n')

    os.environ.update({**job.inherited, **job.env})
    if not torch.cuda.is_available():
        torch.set_num_threads(job.threads)
    cfg = Config.fromfile(job.config)
    cfg.merge_from_dict(dict(job.options))
    cfg.work_dir = str(work_dir)
    cfg.launcher = 'none'
    cfg.randomness = {**cfg.get('randomness', {}), 'seed': job.seed}
    saving = cfg.get('default_hooks', {}).get('checkpoint', {})
    if saving.get('max_keep_ckpts') == 1:
        # mmengine deletes the old one before it writes the new one: a kill in between costs all.
        saving.max_keep_ckpts = 2
    begin(cfg, job)
    QuietRunner.from_cfg(cfg).train()
    done = {'key': job.key, 'name': job.name, 'config': job.config, 'options': dict(job.options)}
    write_atomically(folder / DONE, json.dumps({**done, 'seed': job.seed}) + '\n')


def _main(job: Job) -> None:
    """The process of a job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep ends its jobs itself
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)  # killed sweeps leave nobody behind who writes into a folder

    threading.Thread(target=watch, daemon=True).start()
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    log = job.log.open('a', buffering=1)
    os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    try:
        train(job)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def start(job: Job) -> BaseProcess:
    """Start a job's process, forked from a server that has imported everything once.

    So a job costs no imports, and none sees what another left in this process's globals.
    """
    context = multiprocessing.get_context(METHOD)
    # The server imports by PYTHONPATH, not by this process's sys.path: it must find this mmdet_moe.
    root = str(Path(__file__).resolve().parents[2])
    paths = os.environ.get('PYTHONPATH', '').split(os.pathsep)
    if paths[0] != root:
        os.environ['PYTHONPATH'] = os.pathsep.join([root, *filter(None, paths)])
    if METHOD == 'forkserver':
        context.set_forkserver_preload(['mmdet_moe.jobs.preload'])
    process = context.Process(target=_main, args=(job,), daemon=False)
    process.start()
    return process
