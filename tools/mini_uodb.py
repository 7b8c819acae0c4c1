"""Experiments on the five real domains of mini_uodb: plan, train, test per domain, table.

``make mini-uodb`` (suite ``gem``): GEM-RetinaNet against its dense twin, same budget and seed.
Suite ``routers``: every router in DINO, all from one dense start, with the same budget::

    python tools/mini_uodb.py --data ../shared/data/mini_uodb --seed 0
    python tools/mini_uodb.py --data ../shared/data/mini_uodb --seed 0 --suite routers

A dense DINO is trained first; every model of the suite, the dense one too, then goes on from it
with a fresh optimiser, its experts copies of the dense modules. ``--size``, ``--start-steps`` and
``--steps`` set the budget, ``--models`` chooses among the routers. Suites ``retinanet`` and
``dino`` compare GEM, DAMEX, the dense twin and one dense model per domain (``single``, together
with the steps of the others) in the same way. ``--hold-out`` leaves one domain out of everything.

Everything is left in ``work_dirs/mini_uodb/<suite>-seed<N>``: ``plan.json``, a folder for each
model, its metrics in ``test-<model>/``, the table in ``results.json``, for ``retinanet`` and
``dino`` also one in the papers' layout in ``papers.json``, all output in ``steps.log``.
Steps whose inputs have not changed are not done again, so that several seeds, or a run that was
interrupted, cost what is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import steps as job

#: Suites whose tests also score where all classes compete, for the papers' table.
DETECTORS = ('retinanet', 'dino')
READINGS = ['--both-readings']
PAPERS_METRICS = (
    *('coco/bbox_mAP', 'coco/bbox_mAP_50', 'pascal_voc/mAP'),
    *('unrestricted/coco/bbox_mAP', 'unrestricted/pascal_voc/mAP'),
)
#: Model -> config. The first one's planner section makes the plan; 'dense' is what all are
#: compared with.
GEM = 'configs/gem/{}-{}_effnet-lite0_mini-uodb.py'
DAMEX = 'configs/routers/damex-{}_effnet-lite0_mini-uodb.py'
SUITES = {
    **{
        detector: {
            'gem': GEM.format('gem', detector),
            'dense': GEM.format('dense', detector),
            'damex': DAMEX.format(detector),
            'single': GEM.format('single', detector),
        }
        for detector in DETECTORS
    },
    'gem': {
        'gem': 'configs/gem/gem-retinanet_effnet-lite0_mini-uodb.py',
        'dense': 'configs/gem/dense-retinanet_effnet-lite0_mini-uodb.py',
    },
    'routers': {
        'gem': 'configs/gem/gem-dino_effnet-lite0_mini-uodb.py',
        'dense': 'configs/gem/dense-dino_effnet-lite0_mini-uodb.py',
        **{
            path.stem.partition('-dino')[0]: f'configs/routers/{path.name}'
            for path in sorted((job.ROOT / 'configs/routers').glob('*-dino_*_mini-uodb.py'))
        },
    },
}
#: Validation during training would only repeat the test.
NO_VALIDATION = (
    'val_cfg=None',
    'val_dataloader=None',
    'val_evaluator=None',
    'default_hooks.checkpoint.save_best=None',
)


#: The dense start was the dense half: experts part at once.
NO_DENSE_HALF = ('custom_hooks.3.share=1e-9',)


@dataclass(frozen=True)
class Budget:
    """What each model gets, but for those of suite ``gem``, whose configs say it.

    Attributes:
        size: Longer side of the images, px.
        start_steps: Steps of the dense start.
        steps: Steps of every model after it.
    """

    size: int = 256
    start_steps: int = 1000
    steps: int = 500

    def test_options(self) -> list[str]:
        """Of ``tools/test.py``."""
        return [f'test_dataloader.dataset.pipeline.1.scale=({self.size},{self.size})']

    def train_options(self, steps: int, load_from: Path | None = None) -> list[str]:
        """Of ``tools/train.py``: a tenth of the steps to warm up, the rest a cosine."""
        warm = max(1, steps // 10)
        options = [
            f'train_dataloader.dataset.pipeline.2.scale=({self.size},{self.size})',
            f'train_cfg.max_iters={steps}',
            f'param_scheduler.0.end={warm}',
            f'param_scheduler.1.begin={warm}',
            f'param_scheduler.1.end={steps}',
            f'param_scheduler.1.T_max={steps - warm}',
            *NO_VALIDATION,
        ]
        return options if load_from is None else [*options, f'load_from={load_from}']


def domains_of(data: Path, held_out: str | None) -> list[str]:
    """The domains in the folder ``data``, but one."""
    found = sorted(path.parent.name for path in data.glob('*/train.json'))
    if not found:
        raise job.StepError(f'{data} has no <domain>/train.json: give DATA=... (--data)')
    if held_out is not None and held_out not in found:
        raise job.StepError(f'--hold-out: there is no domain {held_out!r} in {found}')
    return [name for name in found if name != held_out]


def run(
    data: Path,
    out: Path,
    seed: int,
    suite: str,
    models: Sequence[str],
    budget: Budget,
    held_out: str | None = None,
) -> int:
    """All steps; the exit code."""
    domains = domains_of(data, held_out)
    configs = SUITES[suite]
    plan = out / 'plan.json'
    env = {'MINI_UODB': f'{data}/', 'MINI_UODB_PLAN': str(plan)}
    if held_out is not None:
        env['MINI_UODB_HELD_OUT'] = held_out
    env |= {'OMP_NUM_THREADS': job.threads(), **job.devices()}
    files = [f'{path.relative_to(data)} {path.stat().st_size}' for path in sorted(data.rglob('*'))]
    inputs = f'{job.source_digest()} {sys.version_info[:2]} {data} {files} {seed} {held_out}'
    steps = job.Steps(out, inputs, env)

    arguments = ['tools/plan_experts.py', configs['gem'], '--out', str(plan)]
    steps.step(
        'plan',
        'plan: which expert serves which domain',
        lambda _: steps.run(*arguments, show=job.everything),
        '',
        [plan],
    )
    train_options: list[str] = []
    test_options: list[str] = []
    if suite != 'gem':
        start = job.train(
            steps,
            f'train the dense start (seed {seed})',
            configs['dense'],
            out / 'start',
            seed,
            budget.train_options(budget.start_steps),
        )
        train_options = budget.train_options(budget.steps, load_from=start)
        test_options = budget.test_options()
    tests = []
    flags = READINGS if suite in DETECTORS else []
    for name in models:
        if name == 'single':
            tests += singles(steps, configs[name], out, seed, domains, budget)
            continue
        config, folder = configs[name], out / f'test-{name}'
        options = [
            *train_options,
            *(NO_DENSE_HALF if suite == 'retinanet' and name != 'dense' else ()),
        ]
        with steps.branch():
            what = f'train {name} (seed {seed})'
            checkpoint = job.train(steps, what, config, out / name, seed, options)
            what = f'test {name} per domain'
            job.test(steps, what, config, checkpoint, folder, test_options, flags=flags)
        tests.append(f'{name}={folder / "metrics.json"}')
    compare = ['tools/analysis_tools/compare_runs.py', *tests]
    arguments = [*compare, *(('--baseline', 'dense') if 'dense' in models else ())]
    steps.run(*arguments, '--out-json', str(out / 'results.json'), show=job.everything)
    if suite in DETECTORS:
        arguments = [*compare, '--layout', 'papers', '--metrics', *PAPERS_METRICS]
        steps.run(*arguments, '--out-json', str(out / 'papers.json'), show=job.everything)
    print(f'plan  {plan}\nruns  {out}')
    return 0


def singles(
    steps: job.Steps, config: str, out: Path, seed: int, domains: Sequence[str], budget: Budget
) -> list[str]:
    """A dense model for every domain alone; together they have the steps of one of the others."""
    options = budget.train_options((budget.start_steps + budget.steps) // len(domains))
    test_options = budget.test_options()
    tests = []
    for domain in domains:
        env, folder = {'SINGLE_DOMAIN': domain}, out / f'test-single-{domain}'
        with steps.branch():
            what, to = f'train dense {domain} (seed {seed})', out / f'single-{domain}'
            checkpoint = job.train(steps, what, config, to, seed, options, env)
            what = f'test dense {domain}'
            job.test(steps, what, config, checkpoint, folder, test_options, env, flags=READINGS)
        tests.append(f'single={folder / "metrics.json"}')
    return tests


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data', required=True, help='the folder mini_uodb')
    parser.add_argument('--suite', choices=list(SUITES), default='gem')
    parser.add_argument('--out', help='default: work_dirs/mini_uodb/<suite>-seed<N>')
    parser.add_argument('--seed', type=int, default=0, help='of all trainings (default: 0)')
    parser.add_argument('--models', nargs='+', help='of the suite, in this order; default: all')
    budget = Budget()
    parser.add_argument('--hold-out', metavar='DOMAIN', help='leave this domain out of everything')
    parser.add_argument('--size', type=int, default=budget.size, help='longer side, px')
    parser.add_argument(
        '--start-steps', type=int, default=budget.start_steps, help='of the dense start'
    )
    parser.add_argument('--steps', type=int, default=budget.steps, help='of every model after it')
    args = parser.parse_args(argv)
    configs = SUITES[args.suite]
    models = args.models or list(configs)
    unknown = [name for name in models if name not in configs]
    if unknown:
        parser.error(f'suite {args.suite} has no model {unknown[0]!r}; it has {list(configs)}')
    budget = Budget(args.size, args.start_steps, args.steps)
    if min(budget.size, budget.start_steps, budget.steps) < 1:
        parser.error('--size, --start-steps and --steps must be at least 1')
    without = f'-without-{args.hold_out}' if args.hold_out else ''
    out = Path(args.out or f'work_dirs/mini_uodb/{args.suite}{without}-seed{args.seed}').resolve()
    data = Path(os.path.expanduser(args.data)).resolve()
    return job.call(
        'mini_uodb',
        lambda: run(data, out, args.seed, args.suite, models, budget, args.hold_out),
        out,
    )


if __name__ == '__main__':
    sys.exit(main())
