"""The certificate: what is known about a plan, in the user's own units.

``value`` is the affinity of the map, less ``move_cost`` where it moves away from a previous plan;
``upper_bound`` and ``lp_bound`` bound the same quantity over all maps.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mmdet_moe.planning.instance import penalties
from mmdet_moe.planning.problem import PlanningProblem


def gaps(problem: PlanningProblem, upper_bound: float, value: float) -> tuple[float, float]:
    """The two relative gaps of a plan.

    Returns:
        (upper_bound - value) / |upper_bound|, which means little where affinities are offset or
        negative, and (upper_bound - value) / (sum_i max_j w_ij - sum_i mean_j w_ij) (the best
        ``copies`` against as many mean ones), which does not change with the offset. A zero
        denominator leaves the difference as it is.
    """
    difference = max(upper_bound - value, 0.0)
    ordered = -np.sort(-problem.affinity, axis=1)
    taken = np.arange(ordered.shape[1]) < problem.copies[:, None]
    best = math.fsum(np.where(taken, ordered, 0.0).ravel())
    mean = math.fsum(problem.copies * problem.affinity.mean(axis=1))
    spread = best - mean
    relative = difference / abs(upper_bound) if upper_bound else difference
    return relative, difference / spread if spread > 0 else difference


def worth_of(problem: PlanningProblem, chosen: np.ndarray) -> tuple[float, float]:
    """Affinity of a 0/1 map (m, n) less its move cost, and the move cost, summed exactly."""
    cost = math.fsum(penalties(problem)[chosen])
    return math.fsum([math.fsum(problem.affinity[chosen]), -cost]), cost


def moves_of(problem: PlanningProblem, chosen: np.ndarray) -> list[dict[str, Any]]:
    """Every dataset whose experts differ from the previous plan's, and what that gained.

    Returns:
        One entry per moved dataset, in the order of ``datasets``: ``dataset``, ``from`` and ``to``
        (expert names), ``gain``: affinity of the new experts less that of the old ones, before
        the penalty (None where an old expert no longer exists or the number of copies changed), and
        ``cost``, the penalty paid.
    """
    if problem.previous is None:
        return []
    column = {expert: j for j, expert in enumerate(problem.experts)}
    cost = penalties(problem)
    moves = []
    for i, name in enumerate(problem.datasets):
        old = problem.previous.assignment.get(name)
        if old is None:
            continue
        before = sorted(old)
        new = sorted(problem.experts[j] for j in np.flatnonzero(chosen[i]))
        if before == new:
            continue
        gain = None
        if len(before) == len(new) and all(expert in column for expert in before):
            worth = problem.affinity[i]
            gain = math.fsum([worth[column[e]] for e in new] + [-worth[column[e]] for e in before])
        moves.append(
            {
                'dataset': name,
                'from': before,
                'to': new,
                'gain': gain,
                'cost': math.fsum(cost[i][chosen[i]]),
            }
        )
    return moves
