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
CORE_COLUMNS = 600
SMALL_CORE_COLUMNS = 450
#: An exact core larger than this is not tried unless optimality must be proven.
EXACT_COLUMNS = 16_000
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


def node_limit(columns: int, whole: bool = False, large: bool = False) -> int:
    """Branch-and-bound nodes allowed to a programme: fewer where each costs more.

    These limits, not the clock, end a search, so that the same input gives the same bytes.

    Args:
        columns: Free columns of the programme.
        whole: Whether they are all columns of the problem, so that the search can prove it.
        large: Whether the problem has more than ``LARGE_COLUMNS``.
    """
    if whole and columns <= 800:
        return 20_000
    if large:
        return 10
    return max(20, (250_000 if whole else 50_000) // max(columns, 1))


class Losses:
    """What each decision costs at the relaxation's prices; see the module's docstring.

    Ties are broken towards the known map, so that tied rows count as decided.

    Args:
        reduced: (m, n) reduced worths, -inf where not allowed.
        copies: (m,).
        chosen: (m, n) the known map, or None; its columns are open in every core.

    Attributes:
        best: (m, n) bool, each row's r_i columns of largest reduced worth.
        loss: (m, n), of refusing a column of ``best`` or taking another; never negative, inf where
            not allowed and where a column must be taken.
    """

    def __init__(
        self, reduced: np.ndarray, copies: np.ndarray, chosen: np.ndarray | None = None
    ) -> None:
        self.copies = copies
        self.allowed = np.isfinite(reduced)
        if chosen is not None:
            reduced = reduced + 1e-12 * chosen
        self.best = _best_columns(reduced, copies)
        rows, n = np.arange(len(reduced)), reduced.shape[1]
        most = min(int(copies.max()), n - 1)
        ordered = -np.partition(-reduced, list(range(most + 1)), axis=1)[:, : most + 1]
        last = ordered[rows, copies - 1]
        following = np.where(copies < n, ordered[rows, np.minimum(copies, most)], -np.inf)
        with np.errstate(invalid='ignore'):
            loss = np.where(self.best, reduced - following[:, None], last[:, None] - reduced)
        loss[~self.allowed] = np.inf
        self.loss = loss
        self.always = self.best if chosen is None else self.best | chosen

    def core(self, threshold: float) -> np.ndarray:
        """The open columns of the core of threshold t: losses <= t, the best, the map's own.

        Returns:
            Boolean array (m, n). A row with exactly ``copies`` open columns is decided.
        """
        return (self.always | (self.loss <= threshold)) & self.allowed

    def free(self, core: np.ndarray) -> int:
        """How many open columns belong to rows that are not decided."""
        count = core.sum(axis=1)
        return int(count[count > self.copies].sum())

    def core_of_size(self, size: int, demand: np.ndarray) -> tuple[np.ndarray, float]:
        """The largest core with at most ``size`` free columns.

        Where many losses are equal (tied affinities) even the smallest threshold may open too much;
        then the threshold is -1 (nothing is proven) and rows are opened in the order of their
        demand (m, n), largest first, until the size is reached.

        Returns:
            Open columns (m, n) and the threshold.
        """
        losses = self.loss[~self.always & self.allowed]
        # each threshold opens at least one column, so the size-th smallest is the last candidate
        if len(losses) > size:
            losses = np.partition(losses, size)[: size + 1]
        losses.sort()
        core, threshold, next_threshold = self.core(-1.0), -1.0, math.inf
        lower, upper = 0, len(losses)
        while lower < upper:  # the number of free columns grows with the threshold
            middle = (lower + upper) // 2
            trial = self.core(float(losses[middle]))
            if self.free(trial) <= size:
                core, threshold, lower = trial, float(losses[middle]), middle + 1
            else:
                next_threshold, upper = float(losses[middle]), middle
        if threshold < 0 and math.isfinite(next_threshold):
            core = self._open_in_part(next_threshold, core, size, demand)
        elif (self.allowed <= core).all():
            threshold = math.inf  # everything is open
        return core, threshold

    def _open_in_part(
        self, threshold: float, base: np.ndarray, size: int, demand: np.ndarray
    ) -> np.ndarray:
        core = base.copy()
        wanted = (self.loss <= threshold) & self.allowed & ~base
        rows = np.flatnonzero(wanted.any(axis=1))
        rows = rows[np.lexsort((rows, -demand[rows].max(axis=1)))]
        left, n = size - self.free(base), base.shape[1]
        for position, i in enumerate(rows.tolist()):
            if left <= 0:
                break
            # a few columns a row, each row starting from another expert: spread over all of them
            columns = np.flatnonzero(wanted[i])
            columns = columns[np.lexsort(((columns - position) % n, self.loss[i, columns]))][:8]
            core[i, columns] = True
            decided = int(base[i].sum()) == int(self.copies[i])
            left -= len(columns) + (int(self.copies[i]) if decided else 0)
        return core


def _best_columns(reduced: np.ndarray, copies: np.ndarray) -> np.ndarray:
    inside = np.zeros(reduced.shape, dtype=bool)
    if (copies == 1).all():
        inside[np.arange(len(reduced)), reduced.argmax(axis=1)] = True
        return inside
    order = np.argsort(-reduced, axis=1, kind='stable')
    rank = np.arange(reduced.shape[1]) < copies[:, None]
    np.put_along_axis(inside, order, rank, axis=1)
    return inside


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
        self.chosen = chosen
        self.bound = relaxation.bound
        self.exact = exact
        self.clock = clock
        self.seed = seed
        self.say = say
        self.large = int(instance.allowed.sum()) > LARGE_COLUMNS

    def losses(self) -> Losses:
        """The losses, with ties broken towards the best map known."""
        return Losses(self.relaxation.reduced, self.instance.copies, self.chosen)

    def value(self) -> float:
        """Worth of the best map known."""
        return -math.inf if self.chosen is None else self.instance.value(self.chosen)

    def solve(self, open_columns: np.ndarray, threshold: float, what: str) -> Answer:
        """One programme; keeps a better map and, over a complete core, a better bound."""
        columns = self.losses().free(open_columns)
        self.say(f'integer programme over {what}: {columns} columns')
        complete = threshold >= self.relaxation.bound - self.value()
        answer = solve_core(
            self.instance,
            open_columns,
            # HiGHS takes two to three times as long to prove what it was given than what it found
            start=None if complete and self.chosen is not None else self.chosen,
            nodes=None if self.exact and complete else node_limit(columns, large=self.large),
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
        size = SMALL_CORE_COLUMNS if self.large else CORE_COLUMNS
        core, threshold = self.losses().core_of_size(size, instance.demand)
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
        if self.large and not self.exact:
            return False
        while self.chosen is not None and clock.left() > 0:
            needed = self.relaxation.bound - self.value()
            if self.bound - self.value() <= TOLERANCE or threshold >= needed:
                break  # proven, or every better map has been searched within the limits
            losses = self.losses()
            core, threshold = losses.core(needed), needed
            most = EXACT_COLUMNS if answer.status == 'optimal' else WHOLE_COLUMNS
            if not self.exact and losses.free(core) > most:
                break  # too large to prove anything, or too hard: the core was already
            answer = self.solve(core, threshold, 'all columns that could pay')
        return False
