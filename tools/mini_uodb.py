"""Experiments on the five real domains of mini_uodb: plan, train, test per domain, table.

``make mini-uodb`` (suite ``gem``): GEM-RetinaNet against its dense twin, same budget and seed.
Suite ``routers``: every router in DINO, all from one dense start, with the same budget::

    python tools/mini_uodb.py --data ../shared/data/mini_uodb --seed 0
    python tools/mini_uodb.py --data ../shared/data/mini_uodb --seed 0 --suite routers

A dense DINO is trained first; every model of the suite, the dense one too, then goes on from it
with a fresh optimiser, its experts copies of the dense modules. ``--size``, ``--start-steps`` and
``--steps`` set the budget, ``--models`` chooses among the routers.

Everything is left in ``work_dirs/mini_uodb/<suite>-seed<N>``: ``plan.json``, a folder for each
model, its metrics in ``test-<model>/``, the table in ``results.json``, all output in ``steps.log``.
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

#: Model -> config. The first one's planner section makes the plan; 'dense' is what all are
#: compared with.
SUITES = {
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


@dataclass(frozen=True)
class Budget:
    """What each model of the suite ``routers`` gets.

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


def run(data: Path, out: Path, seed: int, suite: str, models: Sequence[str], budget: Budget) -> int:
    """All steps; the exit code."""
    if not data.is_dir():
        raise job.StepError(f'{data} is not a folder: give DATA=... (--data)')
    out.mkdir(parents=True, exist_ok=True)
    configs = SUITES[suite]
    plan = out / 'plan.json'
    env = {'MINI_UODB': f'{data}/', 'MINI_UODB_PLAN': str(plan)}
    env |= {'OMP_NUM_THREADS': job.threads(), **job.devices()}
    files = [f'{path.relative_to(data)} {path.stat().st_size}' for path in sorted(data.rglob('*'))]
    inputs = f'{job.source_digest()} {sys.version_info[:2]} {data} {files} {seed}'
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
    if suite == 'routers':
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
    for name in models:
        config, folder = configs[name], out / f'test-{name}'
        what = f'train {name} (seed {seed})'
        checkpoint = job.train(steps, what, config, out / name, seed, train_options)
        job.test(steps, f'test {name} per domain', config, checkpoint, folder, test_options)
        tests.append(f'{name}={folder / "metrics.json"}')
    arguments = ['tools/analysis_tools/compare_runs.py', *tests]
    arguments += ['--baseline', 'dense'] if 'dense' in models else []
    table = out / 'results.json'
    steps.run(*arguments, '--out-json', str(table), show=job.everything)
    print(f'plan  {plan}\nruns  {out}')
    return 0


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
    parser.add_argument('--size', type=int, default=budget.size, help='routers: longer side, px')
    parser.add_argument(
        '--start-steps', type=int, default=budget.start_steps, help='routers: of the dense start'
    )
    parser.add_argument('--steps', type=int, default=budget.steps, help='routers: of every model')
    args = parser.parse_args(argv)
    configs = SUITES[args.suite]
    models = args.models or list(configs)
    unknown = [name for name in models if name not in configs]
    if unknown:
        parser.error(f'suite {args.suite} has no model {unknown[0]!r}; it has {list(configs)}')
    budget = Budget(args.size, args.start_steps, args.steps)
    if min(budget.size, budget.start_steps, budget.steps) < 1:
        parser.error('--size, --start-steps and --steps must be at least 1')
    out = Path(args.out or f'work_dirs/mini_uodb/{args.suite}-seed{args.seed}').resolve()
    data = Path(os.path.expanduser(args.data)).resolve()
    return job.call('mini_uodb', lambda: run(data, out, args.seed, args.suite, models, budget))


if __name__ == '__main__':
    sys.exit(main())
