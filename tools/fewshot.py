"""Few-shot adaptation on mini_uodb: a domain that was held out joins trained models.

After ``python tools/mini_uodb.py --data DATA --suite retinanet --hold-out bccd``::

    python tools/fewshot.py --data DATA --base work_dirs/mini_uodb/retinanet-without-bccd-seed0

Draw the shots (``tools/fewshot_split.py``), let the newcomer join the plan by the fewest of them,
the old map held. For each number of shots per class adapt GEM (a new expert and the newcomer's
class rows, all else frozen), DAMEX (experts, router and those rows) and the dense twin
(everything), and test the newcomer and the domains before it; these only after the last number of
shots with ``--old last``. Shots are numbers, or ``all`` for the whole training set.

Everything is left in ``work_dirs/fewshot/<detector>-seed<N>``: the shots, the plan, the models,
their metrics, the table ``results.json`` and ``results.md``, the curves ``shots.png``, all output
in ``steps.log``. Steps whose inputs have not changed are not done again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import steps as job
from mini_uodb import Budget

sys.path.insert(0, str(job.ROOT / 'tools/analysis_tools'))

from compare_runs import AVERAGES, markdown_table
from fewshot_split import OTHERS, split_path

from mmdet_moe.jobs.job import last_checkpoint
from mmdet_moe.planning.checks import write_atomically
from mmdet_moe.planning.table import text_table
from mmdet_moe.visualization.shot_figure import ALL, Adapted, draw_shots

#: What the configs hold out.
NEWCOMER = 'bccd'
DETECTORS = ('retinanet', 'dino')
MODELS = ('gem', 'damex', 'dense')
CONFIG = 'configs/fewshot/{}-{}_effnet-lite0_mini-uodb-bccd.py'
METRIC = 'coco/bbox_mAP'


def run(
    data: Path,
    base: Path,
    out: Path,
    detector: str,
    models: Sequence[str],
    shots: Sequence[str],
    budget: Budget,
    seed: int,
    others: str,
    old: str,
) -> int:
    """All steps; the exit code."""
    source = data / NEWCOMER / 'train.json'
    if not source.is_file():
        raise job.StepError(f'there is no {source}: give the folder mini_uodb with --data')
    before = {name: base_metrics(base, name) for name in models}
    checkpoints = {name: base_checkpoint(base, name) for name in models}
    plan = base / 'plan.json'
    env = {'MINI_UODB': f'{data}/', 'BASE_PLAN': str(plan), 'OMP_NUM_THREADS': job.threads()}
    env |= job.devices()
    images = hashlib.sha256(source.read_bytes()).hexdigest()
    inputs = (
        f'{job.source_digest()} {sys.version_info[:2]} {data} {images} {seed} {others} {detector}'
    )
    job_steps = job.Steps(out, f'{inputs} {plan.read_text()}', env)

    drawn = {k: draw(job_steps, out, source, k, seed, others) for k in shots}
    runs: dict[str, dict[str, Adapted]] = {name: {} for name in models}
    own = {'MINI_UODB_PLAN': str(out / 'plan.json')}
    fewest = min(shots, key=lambda k: float('inf') if k == ALL else int(k))
    make_plan(job_steps, CONFIG.format('gem', detector), {**own, 'SHOTS': str(drawn[fewest])})
    for k in shots:
        own['SHOTS'] = str(drawn[k])
        for name in models:
            config, folder = CONFIG.format(name, detector), out / f'{name}-{k}'
            env = {**own, 'BASE_CHECKPOINT': str(checkpoints[name])}
            options = budget.train_options(budget.steps)
            with job_steps.branch(f'{checkpoints[name]} {checkpoints[name].stat().st_mtime_ns}'):
                what = f'adapt {name} to {k} shots'
                checkpoint = job.train(job_steps, what, config, folder, seed, options, env)
                what = f'test {name} after {k} shots'
                folder = out / f'test-{name}-{k}'
                options = budget.test_options()
                domains = [NEWCOMER] if old == 'last' and k != shots[-1] else []
                metrics = job.test(
                    job_steps, what, config, checkpoint, folder, options, env, domains
                )
            found = domain_aps(metrics)
            runs[name][k] = Adapted(found.pop(NEWCOMER), found)
    report(out, runs, before)
    return 0


def draw(steps: job.Steps, out: Path, source: Path, k: str, seed: int, others: str) -> Path:
    """The step that draws ``k`` shots; on them nothing depends but what is given their file."""
    if k == ALL:
        return source
    path = split_path(out, source, int(k), seed)
    arguments = ['tools/fewshot_split.py', str(source), '--out', str(out), '--shots', k]
    arguments += ['--seed', str(seed), '--others', others]
    with steps.branch():
        steps.step(
            f'draw {k}',
            f'draw {k} shots per class',
            lambda _: steps.run(*arguments, show=job.everything),
            ' '.join(arguments),
            [path],
        )
    return path


def make_plan(steps: job.Steps, config: str, env: Mapping[str, str]) -> None:
    """The step that lets the newcomer join the held plan."""
    path = Path(env['MINI_UODB_PLAN'])
    steps.step(
        'plan',
        'plan with the old map held',
        lambda _: steps.run(
            'tools/plan_experts.py', config, '--out', str(path), show=job.everything, env=dict(env)
        ),
        f'{config} {env["SHOTS"]}',
        [path],
    )


def base_checkpoint(base: Path, name: str) -> Path:
    """The checkpoint of the model trained without the newcomer."""
    checkpoint = last_checkpoint(base / name)
    if checkpoint is None:
        raise job.StepError(
            f'{base} has no trained {name!r}: run tools/mini_uodb.py --hold-out {NEWCOMER} first'
        )
    return Path(checkpoint)


def base_metrics(base: Path, name: str) -> dict[str, float]:
    """AP of each domain before the newcomer came."""
    path = base / f'test-{name}' / 'metrics.json'
    try:
        return domain_aps(json.loads(path.read_text())['metrics'])
    except OSError as error:
        raise job.StepError(
            f'cannot read {path} ({error.strerror}): run tools/mini_uodb.py --hold-out {NEWCOMER} '
            'first'
        ) from None


def domain_aps(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """AP by domain, without the averages; one without a detection counts 0."""
    end = f'/{METRIC}'
    found = {key.removesuffix(end): value for key, value in metrics.items() if key.endswith(end)}
    return {
        name: max(value or 0.0, 0.0)
        for name, value in found.items()
        if name not in AVERAGES and '/' not in name
    }


def report(
    out: Path,
    runs: Mapping[str, Mapping[str, Adapted]],
    before: Mapping[str, Mapping[str, float]],
) -> None:
    """Print the table; write it as JSON and Markdown, and the picture."""
    head = ('model', 'shots', f'{NEWCOMER} AP', 'others before', 'after', 'change', 'worst')
    rows: list[Sequence[str]] = []
    content = []
    for name, of in runs.items():
        mean = sum(before[name].values()) / len(before[name])
        for k, found in of.items():
            row = [name, k, f'{100 * found.new:.1f}', f'{100 * mean:.1f}']
            if found.mean_old is None:
                row += ['', '', '']
            else:
                change = {d: found.old[d] - ap for d, ap in before[name].items()}
                worst = min(change, key=lambda d: change[d])
                row += [f'{100 * found.mean_old:.1f}', f'{100 * (found.mean_old - mean):+.1f}']
                moved = any(change.values())
                row.append(f'{worst} {100 * change[worst]:+.1f}' if moved else 'none moved')
            rows.append(row)
            content.append(
                dict(
                    model=name,
                    shots=k,
                    new=found.new,
                    old=dict(found.old),
                    before=dict(before[name]),
                )
            )
    print(text_table(head, rows))
    write_atomically(out / 'results.md', '\n'.join(markdown_table(head, rows)) + '\n')
    job.write_json(out / 'results.json', dict(newcomer=NEWCOMER, metric=METRIC, runs=content))
    draw_shots(runs, before, NEWCOMER, out / 'shots.png')
    print(f'table  {out / "results.md"}\ncurves {out / "shots.png"}')


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data', required=True, help='the folder mini_uodb')
    parser.add_argument('--base', required=True, help='the run that held the newcomer out')
    parser.add_argument('--detector', choices=DETECTORS, default='retinanet')
    parser.add_argument('--models', nargs='+', choices=MODELS, default=MODELS, help='default: all')
    parser.add_argument('--shots', nargs='+', default=['1', '5', '10'], help='default: 1 5 10')
    parser.add_argument('--steps', type=int, default=60, help='of each adaptation (default: 60)')
    parser.add_argument('--size', type=int, default=Budget().size, help="as the base run's, px")
    parser.add_argument('--seed', type=int, default=0, help='of shots and training (default: 0)')
    parser.add_argument('--others', choices=OTHERS, default='ignore', help='see fewshot_split.py')
    parser.add_argument('--old', choices=('last', 'each'), default='each', help='see above')
    parser.add_argument('--out', help='default: work_dirs/fewshot/<detector>-seed<N>')
    args = parser.parse_args(argv)
    bad = [k for k in args.shots if k != ALL and not (k.isdigit() and int(k) > 0)]
    if bad:
        parser.error(f'--shots must be numbers of 1 or more, or {ALL}, got {bad[0]!r}')
    if min(args.size, args.steps) < 1:
        parser.error('--size and --steps must be at least 1')
    out = Path(args.out or f'work_dirs/fewshot/{args.detector}-seed{args.seed}').resolve()
    data, base = (Path(os.path.expanduser(x)).resolve() for x in (args.data, args.base))
    budget = Budget(args.size, steps=args.steps)
    return job.call(
        'fewshot',
        lambda: run(
            data,
            base,
            out,
            args.detector,
            args.models,
            args.shots,
            budget,
            args.seed,
            args.others,
            args.old,
        ),
        out,
    )


if __name__ == '__main__':
    sys.exit(main())
