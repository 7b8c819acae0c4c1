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
        content: Digest of the config's content, so that a changed config is trained anew.
        threads: Threads of torch.
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

    @property
    def key(self) -> str:
        """Digest of all that the result depends on."""
        what = {k: v for k, v in asdict(self).items() if k not in ('folder', 'threads')}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    @property
    def records(self) -> Path:
        """The file of the records."""
        return Path(self.folder) / 'train' / 'dg_records.jsonl'

    @property
    def log(self) -> Path:
        """The file of all that the training prints."""
        return Path(self.folder) / LOG

    def is_done(self) -> bool:
        """Whether it was done, with these inputs."""
        try:
            done = json.loads((Path(self.folder) / DONE).read_text())
        except (OSError, ValueError):
            return False
        return done.get('key') == self.key and self.records.is_file()


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint of a work dir, None if there is none."""
    try:
        path = Path((folder / 'last_checkpoint').read_text().strip())
    except OSError:
        return None
    return str(path) if path.is_file() else None


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

    os.environ.update(job.env)
    if not torch.cuda.is_available():
        torch.set_num_threads(job.threads)
    cfg = Config.fromfile(job.config)
    cfg.merge_from_dict(dict(job.options))
    cfg.work_dir = str(work_dir)
    cfg.launcher = 'none'
    cfg.randomness = {**cfg.get('randomness', {}), 'seed': job.seed}
    checkpoint = last_checkpoint(work_dir)
    if checkpoint is not None:
        cfg.resume, cfg.load_from = True, checkpoint
    elif job.load_from is not None:
        cfg.load_from = last_checkpoint(Path(job.load_from) / 'train')
        if cfg.load_from is None:
            raise FileNotFoundError(f'{job.load_from} has no checkpoint to start from')
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
    with job.log.open('a') as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    try:
        train(job)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        sys.exit(1)


def start(job: Job) -> BaseProcess:
    """Start a job's process, forked from a server that has imported everything once."""
    method = 'forkserver' if 'forkserver' in multiprocessing.get_all_start_methods() else 'spawn'
    context = multiprocessing.get_context(method)
    # The server imports by PYTHONPATH, not by this process's sys.path: it must find this mmdet_moe.
    root = str(Path(__file__).resolve().parents[2])
    paths = os.environ.get('PYTHONPATH', '').split(os.pathsep)
    if paths[0] != root:
        os.environ['PYTHONPATH'] = os.pathsep.join([root, *filter(None, paths)])
    if method == 'forkserver':
        context.set_forkserver_preload(['mmdet_moe.engine.dg_preload'])
    process = context.Process(target=_main, args=(job,), daemon=False)
    process.start()
    return process
