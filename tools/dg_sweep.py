"""A whole table of domain generalisation: algorithms x data sets x held-out domains x trials.

    python tools/dg_sweep.py --algorithms erm=configs/dg/erm_vit_digits.py --trials 3 --jobs 2

trains each algorithm once per held-out domain, trial and draw of hyper-parameters, and prints
accuracies on the held-out domains by DomainBed's model selections, mean ± standard error over the
trials. The same command goes on after a kill: trainings that are done are not done again, and
others continue from their last checkpoint.

Jobs run under Ray where it is installed: on this machine, or on all machines of a cluster with
``--address``. ``--backend processes`` does without.

In ``--out``: ``<dataset>/<algorithm>/<held out>/trial<t>-draw<d>/`` with the records, checkpoints
and the log of each training, and ``table.txt``, ``table.md``, ``results.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # to run from a clone, uninstalled

import mmdet_moe  # noqa: F401  isort: skip
from mmdet_moe.engine.dg_job import Job, start  # isort: skip

ALGORITHMS = {'erm': 'configs/dg/erm_resnet50_dg.py'}


class SweepError(RuntimeError):
    """The sweep cannot be done; the message says why."""


# --------------------------------------------------------------------------------------------------
# The jobs
# --------------------------------------------------------------------------------------------------


def draw_of(space: Sequence[Mapping[str, Any]], draw: int, trial: int) -> dict[str, Any]:
    """Hyper-parameters of a draw: those of the config for draw 0, random ones for all others.

    Args:
        space: Dicts of ``key`` and one of ``log10=(a, b)``, ``log2=(a, b)`` (10 or 2 to the power
            of a uniform number; whole numbers for 2) and ``choice=[...]``.
        draw: Number of the draw.
        trial: Number of the trial; it has draws of its own.
    """
    import numpy as np

    found: dict[str, Any] = {}
    for entry in space if draw else ():
        rng = np.random.default_rng([draw, trial, zlib.crc32(entry['key'].encode())])
        if 'choice' in entry:
            found[entry['key']] = entry['choice'][int(rng.integers(len(entry['choice'])))]
        elif 'log2' in entry:
            found[entry['key']] = int(2 ** rng.uniform(*entry['log2']))
        else:
            found[entry['key']] = float(10 ** rng.uniform(*entry['log10']))
    return found


@contextmanager
def environment(env: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def read_config(path: str, env: Mapping[str, str], options: Mapping[str, Any]) -> Any:
    """The config as a job with this environment reads it."""
    from mmengine.config import Config

    with environment(env):
        cfg = Config.fromfile(path)
    cfg.merge_from_dict(dict(options))
    return cfg


def units_of(cfg: Any) -> tuple[str, list[tuple[str, ...]]]:
    """The data set's name and what is held out of it at a time; checks that it is complete."""
    from mmengine.registry import init_default_scope

    import mmdet_moe.engine.dg_preload  # noqa: F401
    from mmdet_moe.datasets.dg_catalog import leave_outs
    from mmpretrain.registry import DATASETS

    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    meta = DATASETS.build(cfg.val_dataloader.dataset).metainfo
    return meta['dataset'], leave_outs(meta['domains'], meta['groups'])


def plan(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, list[tuple[str, ...]]]]:
    """All trainings, stages first, and the held-out units of each data set.

    A training is a dict of ``job``, and of what it is in the table (``algorithm``, ``dataset``,
    ``held_out``, ``draw``; ``algorithm`` None for a stage).
    """
    from mmdet_moe.evaluation.dg_selection import name_of

    out = Path(args.out).resolve()
    trainings: list[dict[str, Any]] = []
    units: dict[str, list[tuple[str, ...]]] = {}
    for wanted in args.datasets or [None]:
        data_env = {} if args.data_root is None else {'DG_ROOT': f'{Path(args.data_root).resolve()}/'}
        if wanted is not None:
            data_env['DG_DATASET'] = wanted
        entries = [(name, path, True) for name, path in args.stage]
        entries += [(name, path, False) for name, path in args.algorithms]
        configs = {path: read_config(path, data_env, args.cfg_options) for _, path, _ in entries}
        dataset, found = units_of(configs[args.algorithms[0][1]])
        if dataset in units:
            raise SweepError(f'data set {dataset!r} is there twice')
        units[dataset] = found
        if args.test_domains:
            units[dataset] = [unit for unit in found if set(unit) & set(args.test_domains)]
            unknown = set(args.test_domains) - {d for unit in found for d in unit}
            if unknown:
                raise SweepError(
                    f'{dataset} has no domain {sorted(unknown)[0]!r}; it has '
                    f'{[d for unit in found for d in unit]}'
                )
        held_outs = [(unit,) for unit in units[dataset]]
        if 'leave-one-out' in args.selection:
            pairs = {
                tuple(sorted((unit, other), key=found.index))
                for unit in units[dataset]
                for other in found
                if other != unit
            }
            held_outs += sorted(pairs, key=lambda pair: [found.index(unit) for unit in pair])
        for trial in range(args.trials):
            for held_out in held_outs:
                place = '__'.join(map(name_of, held_out)).replace('/', '-')
                before = None
                for name, path, is_stage in entries:
                    cfg = configs[path]
                    for draw in range(1 if is_stage else args.draws):
                        label = f'{dataset}/{name}/{place}/trial{trial}-draw{draw}'
                        options = {**args.cfg_options, **draw_of(cfg.get('dg_space', []), draw, trial)}
                        text = json.dumps(cfg.to_dict(), sort_keys=True, default=str)
                        paired = f'{dataset}/{place}/{trial}/{draw}/{is_stage}'
                        job = Job(
                            name=label,
                            folder=str(out / label),
                            config=path,
                            env={
                                **data_env,
                                'DG_TEST': ','.join(d for unit in held_out for d in unit),
                                'DG_TRIAL': str(trial),
                            },
                            options=options,
                            # The same for all algorithms: they see the same images in one order.
                            seed=zlib.crc32(paired.encode()) % 2**31,
                            after=before,
                            load_from=None if before is None else str(out / before),
                            content=hashlib.sha256(text.encode()).hexdigest(),
                            threads=args.threads,
                        )
                        trainings.append(
                            dict(
                                job=job,
                                algorithm=None if is_stage else name,
                                dataset=dataset,
                                held_out=held_out,
                                draw=draw,
                            )
                        )
                    if is_stage:
                        before = label
    return trainings, units


# --------------------------------------------------------------------------------------------------
# Running them
# --------------------------------------------------------------------------------------------------


class Processes:
    """Jobs as processes of this machine."""

    def __init__(self, at_once: int, gpus: int = 0) -> None:
        self.at_once = at_once
        self.gpus = gpus
        self.running: dict[str, tuple[Any, int]] = {}

    def start(self, job: Job) -> None:
        slot = min(set(range(self.at_once)) - {slot for _, slot in self.running.values()})
        if self.gpus:
            env = {**job.env, 'CUDA_VISIBLE_DEVICES': str(slot % self.gpus)}
            job = Job(**{**vars(job), 'env': env})
        self.running[job.name] = (start(job), slot)

    def has_room(self) -> bool:
        return len(self.running) < self.at_once

    def wait(self, seconds: float) -> dict[str, int | str]:
        """The exit codes of the jobs that ended meanwhile, by name."""
        from multiprocessing.connection import wait

        by_sentinel = {process.sentinel: name for name, (process, _) in self.running.items()}
        ended: dict[str, int | str] = {}
        for sentinel in wait(list(by_sentinel), seconds):
            name = by_sentinel[sentinel]
            process = self.running.pop(name)[0]
            process.join()
            ended[name] = process.exitcode
        return ended

    def stop(self) -> None:
        for process, _ in self.running.values():
            process.kill()
        for process, _ in self.running.values():
            process.join()
        self.running.clear()


class RayTasks:
    """Jobs as tasks of Ray, on this machine or on those of the cluster at ``address``."""

    def __init__(self, at_once: int, address: str | None, cpus: float, gpus: float) -> None:
        os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
        import ray

        self.ray = ray
        options: dict[str, Any] = dict(log_to_driver=False, logging_level='ERROR')
        if address is None:
            options.update(num_cpus=max(1, round(at_once * cpus)), include_dashboard=False)
        else:
            options.update(address=address)
        ray.init(**options)
        root = str(ROOT)

        def task(job: Job) -> int:
            import sys

            if root not in sys.path:
                sys.path.insert(0, root)
            from mmdet_moe.engine.dg_job import start

            process = start(job)
            process.join()
            return process.exitcode

        # One try: a job that fails is reported; a machine that is lost, too.
        self.remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(task)
        self.at_once = at_once if address is None else None
        self.running: dict[Any, str] = {}

    def start(self, job: Job) -> None:
        self.running[self.remote.remote(job)] = job.name

    def has_room(self) -> bool:
        return self.at_once is None or len(self.running) < self.at_once

    def wait(self, seconds: float) -> dict[str, int | str]:
        done, _ = self.ray.wait(list(self.running), num_returns=1, timeout=seconds)
        ended: dict[str, int | str] = {}
        for reference in done:
            name = self.running.pop(reference)
            try:
                ended[name] = self.ray.get(reference)
            except Exception as error:
                ended[name] = str(error).splitlines()[0]
        return ended

    def stop(self) -> None:
        for reference in self.running:
            self.ray.cancel(reference, force=True)
        self.running.clear()
        self.ray.shutdown()


def run_jobs(jobs: Sequence[Job], backend: Any, clean: bool = False) -> dict[str, str]:
    """Do the jobs that are not done, each after the one it needs; why some are not, by name."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn, TimeRemainingColumn

    done = {job.name for job in jobs if job.is_done()}
    left = [job for job in jobs if job.name not in done]
    by_name = {job.name: job for job in jobs}
    failed: dict[str, str] = {}
    begun: dict[str, float] = {}
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn())
    console = Console(soft_wrap=True, highlight=False)
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console
    ) as progress:
        bar = progress.add_task('trainings', total=len(jobs), completed=len(done))
        if done:
            console.print(f'{len(done)} of {len(jobs)} trainings are done already')
        while left or backend.running:
            for job in list(left):
                if job.after in failed:
                    left.remove(job)
                    failed[job.name] = f'not begun, since {job.after} failed'
                    progress.advance(bar)
                elif backend.has_room() and (job.after is None or job.after in done):
                    left.remove(job)
                    begun[job.name] = time.monotonic()
                    backend.start(job)
            for name, code in backend.wait(1.0).items() if backend.running else ():
                progress.advance(bar)
                seconds = time.monotonic() - begun[name]
                if code == 0 and by_name[name].is_done():
                    done.add(name)
                    if clean and all(other.load_from != by_name[name].folder for other in jobs):
                        for file in (Path(by_name[name].folder) / 'train').glob('*.pth'):
                            file.unlink()
                    console.print(f'{name}: {seconds:.0f} s')
                else:
                    failed[name] = f'failed ({code}) after {seconds:.0f} s, see {by_name[name].log}'
                    console.print(f'{name}: {failed[name]}')
    return failed


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


def tabulate(
    trainings: Sequence[Mapping[str, Any]],
    units: Mapping[str, Sequence[tuple[str, ...]]],
    args: argparse.Namespace,
) -> str:
    """Write the tables of what is done; their text."""
    from mmdet_moe.evaluation import dg_selection as dg
    from mmdet_moe.planning.checks import write_atomically

    runs = [
        dg.read_run(t['job'].records, t['algorithm'], t['held_out'], t['draw'], t['dataset'])
        for t in trainings
        if t['algorithm'] is not None and t['job'].is_done()
    ]
    blocks, chosen = dg.results_table(runs, units, args.selection)
    out = Path(args.out)
    text = dg.to_text(blocks)
    write_atomically(out / 'table.txt', text)
    write_atomically(out / 'table.md', dg.to_markdown(blocks))
    content = {'tables': dg.to_dict(blocks), 'chosen': chosen}
    write_atomically(out / 'results.json', json.dumps(content, indent=2) + '\n')
    return text


def run(args: argparse.Namespace) -> int:
    """The sweep; its exit code."""
    trainings, units = plan(args)
    jobs = [training['job'] for training in trainings]
    if args.dry_run:
        for job in jobs:
            print(f'{"done" if job.is_done() else "to do"}  {job.name}')
        return 0
    if any(not job.is_done() for job in jobs):
        backend = make_backend(args)
        try:
            failed = run_jobs(jobs, backend, args.no_checkpoints)
        finally:
            backend.stop()
    else:
        failed = {}
    print(f'\n{tabulate(trainings, units, args)}\nruns  {Path(args.out).resolve()}')
    for name, why in failed.items():
        print(f'{name}: {why}', file=sys.stderr)
    if failed:
        print(f'dg_sweep: {len(failed)} of {len(jobs)} trainings are missing', file=sys.stderr)
    return 1 if failed else 0


def make_backend(args: argparse.Namespace) -> Any:
    """What runs the jobs."""
    from importlib.util import find_spec

    backend = args.backend
    has_ray = find_spec('ray') is not None
    if not has_ray and (backend == 'ray' or args.address is not None):
        raise SweepError('Ray is not installed: pip install ray, or take --backend processes')
    if backend is None:
        backend = 'ray' if has_ray else 'processes'
        if not has_ray:
            print('dg_sweep: Ray is not installed; jobs run as processes of this machine')
    if backend == 'ray':
        return RayTasks(args.jobs, args.address, args.threads, args.gpus_per_job)
    return Processes(args.jobs, args.gpus)


def _named(text: str) -> tuple[str, str]:
    name, equals, path = text.partition('=')
    if not equals:
        if name not in ALGORITHMS:
            raise argparse.ArgumentTypeError(f'{name!r}: want NAME=CONFIG, or of {[*ALGORITHMS]}')
        path = str(ROOT / ALGORITHMS[name])
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f'{path} is not a file')
    return name, str(Path(path).resolve())


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        '--algorithms',
        nargs='+',
        type=_named,
        required=True,
        metavar='NAME[=CONFIG]',
        help=f'the rows; without CONFIG: {", ".join(ALGORITHMS)}',
    )
    add(
        '--stage',
        nargs='+',
        type=_named,
        default=[],
        metavar='NAME=CONFIG',
        help='trained first on the same sources; the next stage and the algorithms start from it',
    )
    add('--datasets', nargs='+', help="$DG_DATASET of the configs; default: the configs' own")
    add('--data-root', help='$DG_ROOT of the configs')
    add('--test-domains', nargs='+', help='hold out these only; default: each in turn')
    add('--trials', type=_positive, default=3, help='default: 3')
    add('--draws', type=_positive, default=1, help="draws; the first is the config's (default: 1)")
    add(
        '--selection',
        nargs='+',
        choices=['training-domain', 'oracle', 'leave-one-out'],
        default=['training-domain', 'oracle'],
        help='leave-one-out adds trainings (default: training-domain oracle)',
    )
    add('--out', default='work_dirs/dg', help='default: %(default)s')
    add('--jobs', type=_positive, default=1, help='trainings at once (default: 1)')
    add('--threads', type=_positive, default=1, help='threads of each (default: 1)')
    add('--backend', choices=['ray', 'processes'], help='default: ray, where it is installed')
    add('--address', help="a Ray cluster's address: auto, or ray://HOST:10001")
    add('--gpus', type=int, default=0, help='GPUs that --backend processes deals out')
    add('--gpus-per-job', type=float, default=0, help='under Ray; may be a fraction')
    add('--no-checkpoints', action='store_true', help='delete those of trainings that are done')
    add('--dry-run', action='store_true', help='list the trainings')
    add('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE')
    args = parser.parse_args(argv)
    names = [name for name, _ in [*args.stage, *args.algorithms]]
    if len(set(names)) < len(names):
        parser.error(f'names must differ: {names}')
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if __name__ == '__main__':
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run(args)
    except (SweepError, ValueError) as error:
        print(f'dg_sweep: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('\ndg_sweep: interrupted; the same command goes on from here', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main())
