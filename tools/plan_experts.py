"""Plan which expert serves which dataset, before training.

From a training config (embeds its datasets; needs torch and mmdet)::

    python tools/plan_experts.py CONFIG [--out plan.json] [--num-experts N] ...

From a problem file (no images, no torch)::

    python tools/plan_experts.py --problem problem.json --out plan.json [--time-limit S] [--exact]

Exit 0: the plan is written, and one line says its value, bound, gap and loads. Exit 2: the input is
bad or no map exists. Exit 3: no map was found within the limit, none proven impossible. Nothing is
written unless the exit is 0.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a clone, uninstalled


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line and exit code 2, as for any other bad input."""
        self.exit(2, f'{self.prog}: {message}\n')


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        description='Plan which expert serves which of the datasets of a training config. Every '
        'option but the files can also stand in the config, planner = dict(num_experts=4, ...). '
        'With --problem problem.json in place of CONFIG: plan a problem file (see --problem x -h).',
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('config', help='training config with a MultiDomainDataset')
    add('--out', help="plan file to write (default: the one the config's PlanRouters read)")
    add('--picture', help="picture of the plan (default: beside it, .png; '' for none)")
    add('--num-experts', type=int, help="number of experts (default: the config's)")
    add(
        '--capacity',
        type=float,
        nargs='+',
        help='what an expert can hold, one number or one per expert, in the unit of the demand '
        '(default: max(even share, largest demand) x 1.10, 1.15 ... until a map exists)',
    )
    add('--demand', choices=['images', 'instances', 'unit'], help='what a dataset takes')
    add('--affinity', help='prototype (default), frechet, or a .csv, .json or .npy file')
    add('--max-images', type=int, help='images embedded per dataset (default 200)')
    add('--copies', type=int, help='experts per dataset (default 1)')
    add('--min-load', type=float, help='least load of every expert (default 0)')
    add('--separate', action='append', metavar='A,B', help='datasets to keep apart; repeatable')
    add('--together', action='append', metavar='A,B', help='datasets to keep together; repeatable')
    add('--previous', help='earlier plan to move away from as little as pays')
    add('--move-penalty', type=float, help='affinity that a move must gain (default 0)')
    add(
        '--held', action='store_true', default=None, help='nothing moves: newcomers join --previous'
    )
    add(
        '--expert', help="of newcomers to a held plan: an expert's name, or new (default: the best)"
    )
    add('--seed', type=int, help='random seed (default 0)')
    add('--embedder', help='config file (.py, .json) with the frozen embedder, embedder = dict(..)')
    add('--device', help='device of the embedder (default: cuda where there is one)')
    add('--cache-dir', help="folder of the embeddings' cache ('' for none)")
    add('--exact', action='store_true', default=None, help='prove optimality or say it could not')
    add('--time-limit', type=float, help="safety net of the planner's search in seconds")
    add('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override settings of the config')
    add('--quiet', action='store_true', help='no progress and no tables')
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if any(word == '--problem' or word.startswith('--problem=') for word in argv):
        from mmdet_moe.planning.cli import main as plan_problem

        return plan_problem(argv)
    args = vars(_parser().parse_args(argv))
    from mmdet_moe.engine.plan_from_config import run

    return run(**args)


if __name__ == '__main__':
    sys.exit(main())
