"""GEM against its dense twin on the five real domains of mini_uodb: ``make mini-uodb``.

Plans (5 datasets, the experts and capacities of the config), trains GEM-RetinaNet and the dense
twin with the same budget and seed, tests both per domain, and prints the table::

    python tools/mini_uodb.py --data ../shared/data/mini_uodb --seed 0

Everything is left in ``work_dirs/mini_uodb/seed<N>``: ``plan.json``, ``gem/``, ``dense/``, the
metrics in ``test-gem/`` and ``test-dense/``, the table in ``results.json``, all output in
``steps.log``. Steps whose inputs have not changed are not done again, so that several seeds, or a
run that was interrupted, cost what is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import steps as job

CONFIGS = {
    'gem': 'configs/gem/gem-retinanet_effnet-lite0_mini-uodb.py',
    'dense': 'configs/gem/dense-retinanet_effnet-lite0_mini-uodb.py',
}


def run(data: Path, out: Path, seed: int) -> int:
    """All steps; the exit code."""
    if not data.is_dir():
        raise job.StepError(f'{data} is not a folder: give DATA=... (--data)')
    out.mkdir(parents=True, exist_ok=True)
    plan = out / 'plan.json'
    env = {'MINI_UODB': f'{data}/', 'MINI_UODB_PLAN': str(plan)}
    env |= {'OMP_NUM_THREADS': job.threads(), **job.devices()}
    files = [f'{path.relative_to(data)} {path.stat().st_size}' for path in sorted(data.rglob('*'))]
    inputs = f'{job.source_digest()} {sys.version_info[:2]} {data} {files} {seed}'
    steps = job.Steps(out, inputs, env)

    arguments = ['tools/plan_experts.py', CONFIGS['gem'], '--out', str(plan)]
    steps.step(
        'plan',
        'plan: which expert serves which domain',
        lambda _: steps.run(*arguments, show=job.everything),
        '',
        [plan],
    )
    tests = []
    for name, config in CONFIGS.items():
        checkpoint = job.train(steps, f'train {name} (seed {seed})', config, out / name, seed)
        folder = out / f'test-{name}'
        job.test(steps, f'test {name} per domain', config, checkpoint, folder)
        tests.append(f'{name}={folder / "metrics.json"}')
    arguments = ['tools/analysis_tools/compare_runs.py', *tests, '--baseline', 'dense']
    table = out / 'results.json'
    steps.run(*arguments, '--out-json', str(table), show=job.everything)
    print(f'plan  {plan}\nruns  {out}')
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data', required=True, help='the folder mini_uodb')
    parser.add_argument('--out', help='default: work_dirs/mini_uodb/seed<N>')
    parser.add_argument('--seed', type=int, default=0, help='of both trainings (default: 0)')
    args = parser.parse_args(argv)
    out = Path(args.out or f'work_dirs/mini_uodb/seed{args.seed}').resolve()
    data = Path(os.path.expanduser(args.data)).resolve()
    return job.call('mini_uodb', lambda: run(data, out, args.seed))


if __name__ == '__main__':
    sys.exit(main())
