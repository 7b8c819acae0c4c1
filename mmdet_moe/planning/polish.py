"""The integer programme: over everything where that is small, over a core of columns otherwise.

For the reduced worths at the relaxation's prices, call the *loss* of a decision what the bound UB
falls by when it is forced: taking a column outside the row's best r_i costs the difference to the
r_i-th best; refusing one of the best r_i costs the difference to the (r_i + 1)-th. A map that makes
any decision of loss > t is worth at most UB - t. So, over the core of all decisions with loss <= t,

    (worth of the best map)  <=  max(bound of the core's programme, UB - t),

and a core with t >= UB - (worth known) is exact: it holds every better map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mmdet_moe.planning import solver
from mmdet_moe.planning.instance import Instance
from mmdet_moe.planning.plan import exact_loads
from mmdet_moe.planning.relaxation import Relaxation, formulate
from mmdet_moe.planning.solver import Clock

#: Up to this many columns the programme is solved whole, at once.
WHOLE_COLUMNS = 2_500
#: Free columns of the first core, and of the first core of a very large problem, where the search
#: gains least over the rounded map and the relaxation has taken most of the time.
CORE_COLUMNS = 1_200
SMALL_CORE_COLUMNS = 600
#: An exact core larger than this is not tried unless optimality must be proven.
EXACT_COLUMNS = 4_800
#: Problems of more columns than this get one core and no more.
LARGE_COLUMNS = 40_000
#: Bound and worth this close, in scaled worth, are equal: the map is optimal.
TOLERANCE = 1e-9
#: What HiGHS's feasibility tolerance can put between its optimum and the exact worth of its map.
SOLVER_TOLERANCE = 1e-6


@dataclass
class Answer:
    """What one integer programme said.

    Attributes:
        status: 'optimal', 'infeasible', 'nodes', 'time' or 'failed'.
        chosen: The best strict map it found, or None.
        bound: Upper bound on the worth of the maps of its core.
    """

    status: str
    chosen: np.ndarray | None
    bound: float


def node_limit(columns: int, whole: bool) -> int:
    """Branch-and-bound nodes allowed to a programme: fewer where each costs more.

    These limits, not the clock, end a search, so that the same input gives the same bytes.
    """
    if whole and columns <= 1_000:
        return 20_000
    return max(20, (3_000_000 if whole else 200_000) // max(columns, 1))


def losses(reduced: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """(m, n): loss of taking a column outside the row's best r_i, or of refusing one inside.

    Args:
        reduced: (m, n), -inf where not allowed.
        copies: (m,).

    Returns:
        Non-negative array; inf where not allowed, and for refusing a column that must be taken.
    """
    order = -np.sort(-reduced, axis=1)
    rows = np.arange(len(reduced))
    last = order[rows, copies - 1]
    n = reduced.shape[1]
    following = np.where(copies < n, order[rows, np.minimum(copies, n - 1)], -np.inf)
    inside = best_columns(reduced, copies)
    with np.errstate(invalid='ignore'):
        loss = np.where(inside, reduced - following[:, None], last[:, None] - reduced)
    loss[np.isneginf(reduced)] = np.inf
    return loss


def best_columns(reduced: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """(m, n) bool: each row's r_i columns of largest reduced worth, ties to the first."""
    inside = np.zeros(reduced.shape, dtype=bool)
    if (copies == 1).all():
        inside[np.arange(len(reduced)), reduced.argmax(axis=1)] = True
        return inside
    order = np.argsort(-reduced, axis=1, kind='stable')
    rank = np.arange(reduced.shape[1]) < copies[:, None]
    np.put_along_axis(inside, order, rank, axis=1)
    return inside


def core_at(
    instance: Instance, reduced: np.ndarray, threshold: float, chosen: np.ndarray | None
) -> np.ndarray:
    """The columns open in the core of threshold t: losses <= t, the best r_i and the map's own.

    Args:
        instance: The problem.
        reduced: (m, n) reduced worths.
        threshold: t.
        chosen: A map whose columns are kept in, or None.

    Returns:
        Boolean array (m, n). A row with exactly ``copies`` open columns is decided.
    """
    reduced = _nudged(reduced, chosen)
    loss = losses(reduced, instance.copies)
    open_columns = best_columns(reduced, instance.copies) | (loss <= threshold)
    if chosen is not None:
        open_columns |= chosen
    return open_columns & instance.allowed


def _nudged(reduced: np.ndarray, chosen: np.ndarray | None) -> np.ndarray:
    """Reduced worths with ties broken towards a map, so that tied rows count as decided."""
    return reduced if chosen is None else reduced + 1e-12 * chosen


def free_columns(instance: Instance, open_columns: np.ndarray) -> int:
    """How many open columns belong to rows that are not decided."""
    count = open_columns.sum(axis=1)
    return int(count[count > instance.copies].sum())


def core_of_size(
    instance: Instance, reduced: np.ndarray, size: int, chosen: np.ndarray | None
) -> tuple[np.ndarray, float]:
    """The largest core with at most ``size`` free columns.

    Where many losses are equal (tied affinities) even threshold 0 may be too large; then the
    threshold is -1 (nothing is proven) and rows are opened in the order of their demand, largest
    first, until the size is reached.

    Returns:
        Open columns (m, n) and the threshold.
    """
    nudged = _nudged(reduced, chosen)
    loss = losses(nudged, instance.copies)
    outside = ~best_columns(nudged, instance.copies) & instance.allowed
    finite = np.sort(loss[outside & np.isfinite(loss)])
    low, high = -1.0, math.inf
    best = core_at(instance, reduced, -1.0, chosen)
    # bisect over the ranks of the losses: the number of free columns grows with the threshold
    lower, upper = 0, len(finite)
    while lower < upper:
        middle = (lower + upper) // 2
        threshold = float(finite[middle])
        trial = core_at(instance, reduced, threshold, chosen)
        if free_columns(instance, trial) <= size:
            best, low = trial, threshold
            lower = middle + 1
        else:
            high = threshold
            upper = middle
    if low < 0 and math.isfinite(high):
        best = _open_in_part(instance, loss, high, best, size)
    elif len(finite) and low == finite[-1]:
        low = math.inf  # everything is open
    return best, low


def _open_in_part(
    instance: Instance, loss: np.ndarray, threshold: float, base: np.ndarray, size: int
) -> np.ndarray:
    open_columns = base.copy()
    wanted = (loss <= threshold) & instance.allowed & ~base
    rows = np.flatnonzero(wanted.any(axis=1))
    rows = rows[np.lexsort((rows, -instance.demand[rows].max(axis=1)))]
    left = size - free_columns(instance, base)
    # a few columns per row, spread over the experts: the same first few would all be one expert
    n = instance.shape[1]
    per_row = max(2, min(8, n))
    for position, i in enumerate(rows.tolist()):
        if left <= 0:
            break
        columns = np.flatnonzero(wanted[i])
        columns = columns[np.lexsort(((columns - position) % n, loss[i, columns]))][:per_row]
        open_columns[i, columns] = True
        left -= len(columns) + int(base[i].sum() == instance.copies[i]) * int(instance.copies[i])
    return open_columns


def solve_core(
    instance: Instance,
    open_columns: np.ndarray,
    *,
    start: np.ndarray | None,
    nodes: int | None,
    clock: Clock,
    seed: int,
    seconds: float | None = None,
) -> Answer:
    """The best strict map within the open columns.

    Rows with exactly ``copies`` open columns are decided beforehand. HiGHS accepts loads that
    exceed a capacity by its tolerance (1.0000005 <= 1); every map is rechecked by exact sums, and
    one that breaches is cut off by the exact inequality *not all of these rows on this expert*.

    Args:
        instance: The problem.
        open_columns: (m, n) bool, at least ``copies`` in each row.
        start: A strict map within the open columns to start from, or None.
        nodes: Branch-and-bound node limit, None for none.
        clock: The safety net.
        seed: HiGHS's random seed.
        seconds: A further limit for this programme.

    Returns:
        The answer; its bound covers the maps within the open columns only.
    """
    count = open_columns.sum(axis=1)
    decided = count == instance.copies
    fixed = open_columns & decided[:, None]
    free = np.flatnonzero(~decided)
    base = instance.value(fixed)
    rest = _restricted(instance, fixed, free)
    if rest is None:
        return Answer('infeasible', None, -math.inf)
    if not len(free):
        if instance.is_strict(fixed):
            return Answer('optimal', fixed, base)
        return Answer('infeasible', None, -math.inf)
    mask = open_columns[free] & rest.allowed
    if (mask.sum(axis=1) < rest.copies).any():
        return Answer('infeasible', None, -math.inf)
    rows, columns = np.nonzero(mask)
    point = None if start is None else start[free][rows, columns].astype(float)
    if point is not None and point.sum() != rest.copies.sum():
        point = None
    cuts: list[tuple[int, np.ndarray]] = []
    for _ in range(50):
        programme = formulate(rest, rows, columns, cuts)
        answer = solver.solve(
            programme,
            integer=True,
            start=point,
            nodes=nodes,
            clock=clock,
            seed=seed,
            seconds=seconds,
        )
        bound = base - answer.bound
        if answer.status == 'infeasible':
            return Answer('infeasible', None, -math.inf)
        if answer.x is None:
            return Answer(answer.status, None, bound)
        chosen = fixed.copy()
        taken = answer.x > 0.5
        chosen[free[rows[taken]], columns[taken]] = True
        if instance.is_strict(chosen):
            worth = instance.value(chosen)
            if answer.status == 'optimal' and abs(bound - worth) <= SOLVER_TOLERANCE:
                bound = worth
            return Answer(answer.status, chosen, bound)
        new = _covers(instance, chosen, decided)
        if not new:  # short of a floor or a copy by the solver's tolerance
            return Answer('failed', None, bound)
        index = np.full(instance.shape[0], -1)
        index[free] = np.arange(len(free))
        cuts += [(expert, index[members]) for expert, members in new]
    return Answer('failed', None, bound)


def _covers(
    instance: Instance, chosen: np.ndarray, decided: np.ndarray
) -> list[tuple[int, np.ndarray]]:
    loads = exact_loads(chosen, instance.demand)
    over = np.flatnonzero(loads > instance.room)
    found = []
    for j in over.tolist():
        members = np.flatnonzero(chosen[:, j] & ~decided & (instance.demand[:, j] > 0))
        found.append((j, members))
    return found


def _restricted(instance: Instance, fixed: np.ndarray, free: np.ndarray) -> Instance | None:
    """The instance left for the free rows once the fixed entries have taken their room."""
    used = exact_loads(fixed, instance.demand)
    if (used > instance.room).any():
        return None
    room = instance.room - used
    allowed = instance.allowed[free] & (instance.demand[free] <= room)
    groups = []
    index = np.full(instance.shape[0], -1)
    index[free] = np.arange(len(free))
    for group in instance.groups:
        taken = fixed[group].sum(axis=0)
        if (taken > 1).any():
            return None
        mine = index[group]
        mine = mine[mine >= 0]
        allowed[np.ix_(mine, np.flatnonzero(taken))] = False
        if len(mine) > 1:
            groups.append(mine)
    return Instance(
        worth=instance.worth[free],
        demand=instance.demand[free],
        capacity=np.maximum(instance.capacity - used, 0.0),
        floor=np.maximum(instance.floor - used, 0.0),
        copies=instance.copies[free],
        groups=groups,
        allowed=allowed,
        offset=instance.offset,
        spread=instance.spread,
        rows=[instance.rows[i] for i in free],
        experts=instance.experts,
    )


@dataclass
class Polished:
    """The outcome of :func:`polish`.

    Attributes:
        chosen: The best strict map known, or None.
        bound: Upper bound on the worth of every map.
        infeasible: True where it is proven that no map exists.
        stopped: 'optimal', 'nodes' or 'time'.
    """

    chosen: np.ndarray | None
    bound: float
    infeasible: bool
    stopped: str


def polish(
    instance: Instance,
    relaxation: Relaxation,
    chosen: np.ndarray | None,
    *,
    exact: bool,
    clock: Clock,
    seed: int,
    near: np.ndarray | None = None,
    progress: Callable[[str], None] | None = None,
) -> Polished:
    """Raises a strict map to the optimum, or as near as the limits allow; or finds a first one.

    Args:
        instance: The problem.
        relaxation: Its LP optimum.
        chosen: A strict map to start from, or None.
        exact: Lift the limits on nodes and columns: go on until proven or the clock strikes.
        clock: The safety net.
        seed: HiGHS's random seed.
        near: Where ``chosen`` is None, the map that repair left, to open rows around.
        progress: Called with a line about each step.
    """
    bound = relaxation.bound
    say = progress or (lambda text: None)

    def value() -> float:
        return -math.inf if chosen is None else instance.value(chosen)

    def proven() -> bool:
        return bound - value() <= TOLERANCE

    def take(answer: Answer, threshold: float) -> None:
        nonlocal chosen, bound
        if answer.chosen is not None and instance.value(answer.chosen) > value():
            chosen = answer.chosen
        bound = min(bound, max(answer.bound, relaxation.bound - max(threshold, 0.0), value()))

    whole = int(instance.allowed.sum())
    if not proven() and whole <= WHOLE_COLUMNS:
        say(f'integer programme over all {whole} columns')
        nodes = None if exact else node_limit(whole, True)
        answer = solve_core(
            instance, instance.allowed, start=chosen, nodes=nodes, clock=clock, seed=seed
        )
        if answer.status == 'infeasible' and chosen is None:
            return Polished(None, bound, True, 'optimal')
        if answer.status == 'infeasible':  # the solver's tolerance, not the truth
            answer = Answer('failed', None, bound)
        take(answer, math.inf)
    elif not proven():
        search = _Search(instance, relaxation, chosen, exact, clock, seed, say)
        if search.run(near):
            return Polished(None, search.bound, True, 'optimal')
        chosen, bound = search.chosen, search.bound
    stopped = 'optimal' if chosen is not None and proven() else 'time' if clock.struck else 'nodes'
    return Polished(chosen, bound, False, stopped)


class _Search:
    """The polish of a problem too large to be solved whole: a first core, then wider ones."""

    def __init__(
        self,
        instance: Instance,
        relaxation: Relaxation,
        chosen: np.ndarray | None,
        exact: bool,
        clock: Clock,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self.instance = instance
        self.relaxation = relaxation
        self.reduced = relaxation.reduced
        self.chosen = chosen
        self.bound = relaxation.bound
        self.exact = exact
        self.clock = clock
        self.seed = seed
        self.say = say

    def value(self) -> float:
        """Worth of the best map known."""
        return -math.inf if self.chosen is None else self.instance.value(self.chosen)

    def solve(self, open_columns: np.ndarray, threshold: float, what: str) -> Answer:
        """One programme; keeps a better map and, over a complete core, a better bound."""
        columns = free_columns(self.instance, open_columns)
        self.say(f'integer programme over {what}: {columns} columns')
        complete = threshold >= self.relaxation.bound - self.value()
        answer = solve_core(
            self.instance,
            open_columns,
            start=self.chosen,
            nodes=None if self.exact and complete else node_limit(columns, False),
            clock=self.clock,
            seed=self.seed,
        )
        if answer.chosen is not None and self.instance.value(answer.chosen) > self.value():
            self.chosen = answer.chosen
        if threshold >= 0 and answer.status != 'failed':
            outside = self.relaxation.bound - threshold
            self.bound = min(self.bound, max(answer.bound, outside, self.value()))
        return answer

    def run(self, near: np.ndarray | None) -> bool:
        """Searches within the limits; True if it is proven that no map exists.

        Args:
            near: Where no map is known, the one that repair left.
        """
        instance, clock = self.instance, self.clock
        columns = int(instance.allowed.sum())
        large = columns > LARGE_COLUMNS
        size = SMALL_CORE_COLUMNS if large else CORE_COLUMNS
        core, threshold = core_of_size(instance, self.reduced, size, self.chosen)
        answer = self.solve(core, threshold, 'a core')
        if self.chosen is None and near is not None and clock.left() > 0:
            # no map yet: reopen every row of the experts that repair left over their limits
            loads = exact_loads(near, instance.demand)
            bad = (loads > instance.room) | (loads < instance.floor)
            reopened = core | near
            reopened[near[:, bad].any(axis=1)] = True
            self.solve(reopened & instance.allowed, -1.0, 'the experts over their limits')
        if self.chosen is None and clock.left() > 0:
            answer, threshold = self.solve(instance.allowed, math.inf, 'all columns'), math.inf
            if answer.status == 'infeasible':
                return True
        if large and not self.exact:
            return False
        while self.chosen is not None and clock.left() > 0:
            needed = self.relaxation.bound - self.value()
            if self.bound - self.value() <= TOLERANCE or threshold >= needed:
                break  # proven, or every better map has been searched within the limits
            core, threshold = core_at(instance, self.reduced, needed, self.chosen), needed
            if not self.exact and free_columns(instance, core) > EXACT_COLUMNS:
                # too large to prove anything; a wider core may still find a better map
                if answer.status != 'optimal':
                    break
                core, threshold = core_of_size(instance, self.reduced, EXACT_COLUMNS, self.chosen)
                self.solve(core, threshold, 'a wider core')
                break
            answer = self.solve(core, threshold, 'all columns that could pay')
        return False
