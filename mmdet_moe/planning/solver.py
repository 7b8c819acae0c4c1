"""HiGHS on sparse arrays: one linear or integer programme in, an honest status out.

Always one thread (HiGHS returns no solution when ``threads`` changes within a process), a fixed
seed, and limits in nodes, so that the same input gives the same answer; the clock is a safety net.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
from scipy import sparse

#: Costs are multiplied by this before HiGHS sees them, so that its absolute tolerances (1e-6 on
#: objectives) lie far below any difference between two maps that a float64 input can mean.
COST_SCALE = 1e4


@dataclass
class Programme:
    """min cost @ x  subject to  low <= matrix @ x <= high,  0 <= x <= 1.

    Attributes:
        cost: (k,).
        matrix: (rows, k) sparse.
        low: (rows,) and ``high`` (rows,), infinite where there is no bound.
    """

    cost: np.ndarray
    matrix: sparse.csc_matrix
    low: np.ndarray
    high: np.ndarray


@dataclass
class Solution:
    """What HiGHS found.

    Attributes:
        status: 'optimal', 'infeasible', 'nodes', 'time' or 'failed'.
        x: (k,) best point found, or None.
        duals: (rows,) row duals of a linear programme (sign of a minimisation), or None.
        bound: Proven lower bound on the minimum (-inf if none).
        nodes: Branch-and-bound nodes used.
    """

    status: str
    x: np.ndarray | None
    duals: np.ndarray | None
    bound: float
    nodes: int


class Clock:
    """The safety net: how much of the time limit is left, and whether anything ran into it."""

    def __init__(self, limit: float) -> None:
        self.start = time.monotonic()
        self.limit = limit
        self.struck = False

    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def left(self) -> float:
        """Seconds left, never negative; notes when there are none."""
        left = self.limit - self.spent()
        if left <= 0:
            self.struck = True
        return max(left, 0.0)


def solver_name() -> str:
    """'HiGHS x.y.z' of the installed solver."""
    import highspy

    return f'HiGHS {highspy.Highs().version()}'


def solve(
    programme: Programme,
    *,
    integer: bool = False,
    start: np.ndarray | None = None,
    nodes: int | None = None,
    clock: Clock | None = None,
    seconds: float | None = None,
    seed: int = 0,
) -> Solution:
    """Solves a programme with HiGHS.

    Args:
        programme: The arrays.
        integer: Whether every x must be 0 or 1.
        start: (k,) 0/1 point to start an integer programme from.
        nodes: Node limit of an integer programme; None for no limit.
        clock: Safety net, noted as struck when it is the clock that ended the search.
        seconds: A limit on top of the clock's.
        seed: HiGHS's random seed.

    Returns:
        The solution; its status is HiGHS's own, not a guess from the point.
    """
    import highspy

    highs = highspy.Highs()
    highs.setOptionValue('output_flag', False)
    highs.setOptionValue('threads', 1)
    highs.setOptionValue('parallel', 'off')
    highs.setOptionValue('random_seed', seed % (2**31 - 1))
    limit = math.inf if clock is None else clock.left()
    if seconds is not None:
        limit = min(limit, seconds)
    if limit <= 0:
        return Solution('time', None, None, -math.inf, 0)
    highs.setOptionValue('time_limit', limit)
    if integer:
        highs.setOptionValue('mip_rel_gap', 0.0)
        if nodes is not None:
            highs.setOptionValue('mip_max_nodes', nodes)

    matrix = programme.matrix.tocsc()
    rows, columns = matrix.shape
    model = highspy.HighsLp()
    model.num_col_ = columns
    model.num_row_ = rows
    model.col_cost_ = programme.cost * COST_SCALE
    model.col_lower_ = np.zeros(columns)
    model.col_upper_ = np.ones(columns)
    model.row_lower_ = programme.low
    model.row_upper_ = programme.high
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_ = matrix.indptr
    model.a_matrix_.index_ = matrix.indices
    model.a_matrix_.value_ = matrix.data
    if integer:
        model.integrality_ = [highspy.HighsVarType.kInteger] * columns
    highs.passModel(model)
    if integer and start is not None:
        point = highspy.HighsSolution()
        point.col_value = start.astype(float)
        highs.setSolution(point)
    highs.run()

    status = highs.getModelStatus()
    info = highs.getInfo()
    found = highs.getSolution()
    kind = highspy.HighsModelStatus
    if status == kind.kOptimal:
        name = 'optimal'
    elif status in (kind.kInfeasible, kind.kUnboundedOrInfeasible):  # all x lie in [0, 1]
        name = 'infeasible'
    elif status == kind.kSolutionLimit:  # HiGHS's name for a limit of nodes
        name = 'nodes'
    elif status in (kind.kTimeLimit, kind.kInterrupt):
        name = 'time'
        if clock is not None:
            clock.struck = True
    else:
        name = 'failed'
    feasible = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    x = np.array(found.col_value) if feasible and len(found.col_value) == columns else None
    if not integer:
        duals = np.array(found.row_dual) / COST_SCALE if name == 'optimal' else None
        bound = info.objective_function_value / COST_SCALE if name == 'optimal' else -math.inf
        return Solution(name, x if name == 'optimal' else None, duals, bound, 0)
    bound = info.mip_dual_bound / COST_SCALE
    if not math.isfinite(bound):
        bound = -math.inf
    return Solution(name, x, None, bound, int(info.mip_node_count))
