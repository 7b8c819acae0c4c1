"""The command behind ``tools/plan_experts.py --problem``: a problem file in, a plan file out.

Exit codes: 0 and one line with value, bound, gap and loads; 2 and one line where the input is bad
or no map exists; 3 and one line where none was found within the limit and none proven impossible.
Nothing is written at ``--out`` unless the exit code is 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from mmdet_moe.planning.errors import NoPlanFoundError, PlanError
from mmdet_moe.planning.planner import ROUNDINGS, TIME_LIMIT, plan_experts
from mmdet_moe.planning.problem import PlanningProblem
from mmdet_moe.planning.table import plan_table, summary_line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line and exit code 2, as for any other bad input."""
        self.exit(2, f'{self.prog}: error: {message}\n')


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = _Parser(prog='plan_experts.py', description='Plan which experts serve which dataset.')
    result.add_argument('--problem', required=True, help='problem file (JSON)')
    result.add_argument('--out', required=True, help='plan file to write (JSON)')
    result.add_argument(
        '--time-limit',
        type=float,
        default=TIME_LIMIT,
        metavar='S',
        help='seconds, a safety net (default: %(default)g)',
    )
    result.add_argument(
        '--exact', action='store_true', help='prove optimality, or say that it could not be'
    )
    result.add_argument('--seed', type=int, default=0, metavar='N', help='random seed')
    result.add_argument(
        '--rounding',
        choices=ROUNDINGS,
        default=ROUNDINGS[0],
        help="'printed': the paper's Algorithm 1 as printed, a baseline",
    )
    result.add_argument('--table', action='store_true', help='print the whole map as a table too')
    result.add_argument('--verbose', action='store_true', help='say each step on stderr')
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as stop:  # --help exits 0, bad arguments 2
        return int(stop.code or 0)
    say = (lambda text: print(text, file=sys.stderr)) if arguments.verbose else None
    try:
        problem = PlanningProblem.from_file(arguments.problem)
        plan = plan_experts(
            problem,
            time_limit=arguments.time_limit,
            exact=arguments.exact,
            seed=arguments.seed,
            rounding=arguments.rounding,
            progress=say,
        )
        plan.save(arguments.out)
    except PlanError as error:
        return _fail(2, error)
    except NoPlanFoundError as error:
        return _fail(3, error)
    except OSError as error:
        return _fail(2, f'cannot write {arguments.out!r}: {error.strerror}')
    line = summary_line(plan) if not arguments.table else plan_table(plan)
    if arguments.exact and not plan.certificate['optimal']:
        line += '  (--exact: optimality could NOT be proven within the limit)'
    print(line)
    return 0


def _fail(code: int, message: object) -> int:
    print('plan_experts.py: ' + ' '.join(str(message).split()), file=sys.stderr)
    return code


if __name__ == '__main__':
    sys.exit(main())
