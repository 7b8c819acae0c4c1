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
import itertools
import json
import os
import signal
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a clone, uninstalled

from steps import StepError, claim

from mmdet_moe import jobs as dg_jobs
from mmdet_moe.jobs import Job

ROOT = Path(__file__).resolve().parents[1]
#: Configs of names that come without one.
ALGORITHMS = {
    'erm': 'configs/dg/erm_resnet50.py',
    'vit': 'configs/dg/vit-s16_dense.py',
    'sf-moe': 'configs/dg/vit-s16_sf-moe-e6-v2.py',
    'gmoe': 'configs/dg/vit-s16_gmoe-e6.py',
    'full': 'configs/dg/vit-b16-clip_full.py',
    'lora': 'configs/dg/vit-b16-clip_lora.py',
    'kadaptation': 'configs/dg/vit-b16-clip_kadaptation.py',
    'lora-moa': 'configs/dg/vit-b16-clip_lora-moa.py',
    'kadaptation-moa': 'configs/dg/vit-b16-clip_kadaptation-moa.py',
}


Unit = tuple[str, ...]  # domains that are held out together


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


def data_of(cfg: Any) -> dict[str, Any]:
    """Which data set a config trains on, and how it is cut."""
    dataset = cfg.train_dataloader.dataset
    return {key: value for key, value in dataset.items() if key not in ('pipeline', '_scope_')}


def units_of(cfg: Any) -> tuple[str, list[Unit]]:
    """The data set's name and what is held out of it at a time; checks that it is complete."""
    from mmengine.registry import init_default_scope
    from mmpretrain.registry import DATASETS

    import mmdet_moe.jobs.preload  # noqa: F401
    from mmdet_moe.datasets.dg_catalog import leave_outs

    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    meta = DATASETS.build(cfg.val_dataloader.dataset).metainfo
    hooks = [hook.get('type') for hook in cfg.get('custom_hooks', [])]
    if 'dataset' not in meta or 'mmdet_moe.DGRecordHook' not in hooks:
        raise SweepError(
            f'{cfg.filename} must evaluate a mmdet_moe.DGDataset and have mmdet_moe.DGRecordHook '
            '(configs/_base_/datasets/dg.py and schedules/dg.py have them)'
        )
    return meta['dataset'], leave_outs(meta['domains'], meta['groups'])


@dataclass(frozen=True)
class Training:
    """A job, and what it is in the table; a stage is no row."""

    job: Job
    algorithm: str
    dataset: str
    held_out: tuple[Unit, ...]
    draw: int
    is_stage: bool


@dataclass
class Plan:
    """All trainings, and of each data set the units that there are and those held out."""

    trainings: list[Training]
    units: dict[str, list[Unit]]
    columns: dict[str, list[Unit]]


def make_plan(args: argparse.Namespace) -> Plan:
    """Everything that the command line asks for, stages before what starts from them."""
    plan = Plan([], {}, {})
    entries = [(name, path, True) for name, path in args.stage]
    entries += [(name, path, False) for name, path in args.algorithms]
    for wanted in args.datasets or [None]:
        env = {}
        if args.data_root is not None:
            env['DG_ROOT'] = f'{Path(args.data_root).resolve()}/'
        if wanted is not None:
            env['DG_DATASET'] = wanted
        configs = {path: read_config(path, env, args.cfg_options) for _, path, _ in entries}
        for path, cfg in configs.items():
            if data_of(cfg) != data_of(configs[entries[0][1]]):
                raise SweepError(f'{path} and {entries[0][1]} are of different data sets')
        dataset, units = units_of(configs[entries[0][1]])
        if dataset in plan.units:
            raise SweepError(f'data set {dataset!r} is there twice')
        plan.units[dataset] = units
        plan.columns[dataset] = columns = chosen_units(dataset, units, args.test_domains)
        held_outs: list[tuple[Unit, ...]] = [(unit,) for unit in columns]
        if 'leave-one-out' in args.selection:
            if len(units) < 3:
                raise SweepError(f'{dataset}: leave-one-out needs 3 domains that can be held out')
            held_outs += [
                pair for pair in itertools.combinations(units, 2) if set(pair) & set(columns)
            ]
        for trial, held_out in itertools.product(range(args.trials), held_outs):
            plan.trainings += trainings_of(args, entries, configs, env, dataset, held_out, trial)
    return plan


def chosen_units(dataset: str, units: Sequence[Unit], names: Sequence[str] | None) -> list[Unit]:
    """The units that have one of the domains; all where None."""
    domains = [domain for unit in units for domain in unit]
    for name in names or ():
        if name not in domains:
            raise SweepError(f'{dataset} has no domain {name!r}; it has {domains}')
    return [unit for unit in units if names is None or set(unit) & set(names)]


def trainings_of(
    args: argparse.Namespace,
    entries: Sequence[tuple[str, str, bool]],
    configs: Mapping[str, Any],
    env: Mapping[str, str],
    dataset: str,
    held_out: tuple[Unit, ...],
    trial: int,
) -> list[Training]:
    """All stages and algorithms on the same sources."""
    place = '__'.join(map('+'.join, held_out)).replace('/', '-')
    found: list[Training] = []
    before: Job | None = None
    stages = 0
    for name, path, is_stage in entries:
        text = json.dumps(configs[path].to_dict(), sort_keys=True, default=str)
        if before is not None:
            text += before.content
        space = list(configs[path].get('dg_space', []))
        if 'dg_dropout' in configs[path]:
            space.append(dict(key=configs[path].dg_dropout, choice=[0.0, 0.1, 0.5]))
        for draw in range(1 if is_stage else args.draws):
            label = f'{dataset}/{name}/{place}/trial{trial}-draw{draw}'
            # The same for all algorithms, which so see the same images in one order. A first stage
            # is what it would be as an algorithm without stages, and done once for both.
            paired = f'{dataset}/{place}/{trial}/{draw}/{stages}'
            seed = zlib.crc32(paired.encode()) % 2**31
            job = Job(
                name=label,
                folder=str(Path(args.out).resolve() / label),
                config=path,
                env={
                    **env,
                    'DG_TEST': ','.join(domain for unit in held_out for domain in unit),
                    'DG_TRIAL': str(trial),
                },
                options={**args.cfg_options, **draw_of(space, draw, trial)},
                seed=seed,
                after=None if before is None else before.name,
                load_from=None if before is None else before.folder,
                content=hashlib.sha256(text.encode()).hexdigest(),
                threads=args.threads,
                # Jobs of another machine, or of a Ray that was there before, do not have them.
                inherited=configs[path].env_variables,
            )
            found.append(Training(job, name, dataset, held_out, draw, is_stage))
        if is_stage:
            before, stages = job, stages + 1
    return found


# --------------------------------------------------------------------------------------------------
# Running them
# --------------------------------------------------------------------------------------------------


def with_gpus(job: Job, visible: str) -> Job:
    """The job on these GPUs (``CUDA_VISIBLE_DEVICES``)."""
    return replace(job, inherited={**job.inherited, 'CUDA_VISIBLE_DEVICES': visible})


class Processes:
    """Jobs as processes of this machine."""

    def __init__(self, at_once: int, gpus: int = 0) -> None:
        self.at_once = at_once
        self.gpus = gpus
        self.running: dict[str, tuple[Any, int]] = {}

    def start(self, job: Job) -> None:
        slot = min(set(range(self.at_once)) - {slot for _, slot in self.running.values()})
        if self.gpus:
            job = with_gpus(job, str(slot % self.gpus))
        self.running[job.name] = (dg_jobs.start(job), slot)

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

    def __init__(
        self, at_once: int, address: str | None, cpus: float, gpus: float | None = None
    ) -> None:
        os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
        import ray

        self.ray = ray
        options: dict[str, Any] = dict(log_to_driver=False, logging_level='ERROR')
        if address is None:
            options.update(
                num_cpus=max(1, round(at_once * cpus)),
                include_dashboard=False,
                object_store_memory=100 * 2**20,  # jobs talk through files
            )
        else:
            options.update(address=address)
        try:
            ray.init(**options)
        except Exception as error:  # Ray raises errors of many kinds
            where = 'on this machine' if address is None else f'at {address}'
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise SweepError(f'Ray does not start {where}: {reason[0]}') from error
        if gpus is None:  # Ray hides the GPUs from whom has asked for none
            gpus = 1 if ray.cluster_resources().get('GPU') else 0
        root = str(ROOT)

        # Of built-in types, which a worker reads before it knows where mmdet_moe is.
        def task(content: dict[str, Any]) -> int:
            import os
            import sys

            if root not in sys.path:
                sys.path.insert(0, root)
            from mmdet_moe.jobs import Job, start

            job = Job(**content)
            if gpus:  # a worker's jobs are forked from a process that has seen its first GPU only
                visible = os.environ.get('CUDA_VISIBLE_DEVICES', '')
                inherited = {**job.inherited, 'CUDA_VISIBLE_DEVICES': visible}
                job = Job(**{**content, 'inherited': inherited})
            process = start(job)
            process.join()
            return process.exitcode

        # One try: a job that fails is reported; a machine that is lost, too.
        self.remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(task)
        self.at_once = at_once if address is None else None
        self.running: dict[Any, str] = {}

    def start(self, job: Job) -> None:
        self.running[self.remote.remote(vars(job))] = job.name

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


def done_of(jobs: Sequence[Job]) -> set[str]:
    """Names of the jobs that need not be done, a stage only while its checkpoint is there for those
    that start from it."""
    done = {job.name for job in jobs if job.is_done()}
    needed = {job.after for job in jobs if job.name not in done}
    for job in reversed(jobs):  # stages stand before what needs them
        if job.name in done and job.name in needed and job.checkpoint is None:
            done.remove(job.name)
            needed.add(job.after)
    return done


def is_seen(job: Job, patience: float = 60) -> bool:
    """Whether a job that says it is done is so here; a shared file system may lag behind."""
    until = time.monotonic() + patience
    while not job.is_done():
        if time.monotonic() > until:
            return False
        time.sleep(1)
    return True


def run_jobs(jobs: Sequence[Job], backend: Any, clean: bool = False) -> dict[str, str]:
    """Do the jobs that are not done, each after the one it needs; why some are not, by name."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    done = done_of(jobs)
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
                if code == 0 and is_seen(by_name[name]):
                    done.add(name)
                    if clean and all(other.load_from != by_name[name].folder for other in jobs):
                        for file in (Path(by_name[name].folder) / 'train').glob('*.pth'):
                            file.unlink()
                    console.print(f'{name}: {seconds:.0f} s')
                else:
                    failed[name] = f'failed ({code}) after {seconds:.0f} s, see {by_name[name].log}'
                    if code == 0:
                        failed[name] = 'done elsewhere, but not in --out here: is it shared?'
                    console.print(f'{name}: {failed[name]}')
    return failed


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


def tabulate(plan: Plan, args: argparse.Namespace) -> str:
    """Write the tables of what is done; their text."""
    from mmdet_moe.evaluation import dg_selection as dg
    from mmdet_moe.planning.checks import write_atomically

    runs = [
        dg.read_run(t.job.records, t.algorithm, t.held_out, t.draw)
        for t in plan.trainings
        if not t.is_stage and t.job.is_done()
    ]
    blocks, chosen = dg.results_table(runs, plan.units, args.selection, plan.columns)
    out = Path(args.out)
    text = dg.to_text(blocks)
    write_atomically(out / 'table.txt', text)
    write_atomically(out / 'table.md', dg.to_markdown(blocks))
    content = {'tables': dg.to_dict(blocks), 'chosen': chosen}
    write_atomically(out / 'results.json', json.dumps(content, indent=2) + '\n')
    return text


def run(args: argparse.Namespace) -> int:
    """The sweep; its exit code."""
    plan = make_plan(args)
    jobs = [training.job for training in plan.trainings]
    if args.dry_run:
        done = done_of(jobs)
        for job in jobs:
            print(f'{"done" if job.name in done else "to do"}  {job.name}')
        return 0
    if len(done_of(jobs)) < len(jobs):
        with claim(Path(args.out).resolve()):
            backend = make_backend(args)
            try:
                failed = run_jobs(jobs, backend, args.no_checkpoints)
            finally:
                backend.stop()
    else:
        failed = {}
    print(f'\n{tabulate(plan, args)}\nruns  {Path(args.out).resolve()}')
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
    add(
        '--gpus-per-job',
        type=float,
        help='under Ray; may be a fraction (default: 1 where there are GPUs)',
    )
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
    except (SweepError, StepError, ValueError) as error:
        print(f'dg_sweep: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('\ndg_sweep: interrupted; the same command goes on from here', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main())
