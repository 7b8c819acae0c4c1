"""From a map that is nearly within its limits to one that is strictly so.

:func:`repair` is a local search on the total breach

    V = sum_j (overload_j + shortfall_j) / c_j + (number of breached separate pairs)

that takes, step by step, the shift (row i from expert j to k) or the swap (i on j with p on k) that
cuts V most per worth lost, and where none cuts it the least bad one, with a short tabu list.
:func:`improve` raises the worth of a strict map; :func:`construct` builds one from nothing,
largest demand first, by reduced worth.

Everything is arrays over the rows of one expert times all experts; nothing loops over m x n.
"""

from __future__ import annotations

import copy

import numpy as np

from mmdet_moe.planning.instance import Instance
from mmdet_moe.planning.plan import LOAD_TOLERANCE, exact_loads
from mmdet_moe.planning.relaxation import capacity_scale
from mmdet_moe.planning.solver import Clock

#: How many pairs a swap search looks at.
SWAP_PAIRS = 400_000
#: The share of the gap that an accepted kick may lose at first.
PATIENCE = 0.1
_TINY = 1e-12


class _State:
    """A 0/1 map with its loads, in full experts, kept up to date as rows move."""

    def __init__(self, instance: Instance, chosen: np.ndarray) -> None:
        self.instance = instance
        self.chosen = chosen.copy()
        self.scale = capacity_scale(instance)
        self.demand = instance.demand / self.scale
        self.capacity = instance.room / self.scale
        self.floor = instance.floor * (1 - LOAD_TOLERANCE) / self.scale
        m, n = instance.shape
        # other members of each row's groups that sit on each expert
        self.rivals = np.zeros((m, n), dtype=np.int32) if instance.groups else None
        self.groups_of: dict[int, list[np.ndarray]] = {}
        for group in instance.groups:
            for i in group.tolist():
                self.groups_of.setdefault(i, []).append(group)
            assert self.rivals is not None
            self.rivals[group] += chosen[group].sum(axis=0) - chosen[group]
        self.reload()

    def copy(self) -> _State:
        """A state of its own map; the arrays of the problem are shared."""
        twin = copy.copy(self)
        twin.chosen, twin.load = self.chosen.copy(), self.load.copy()
        twin.rivals = None if self.rivals is None else self.rivals.copy()
        return twin

    def reload(self) -> None:
        """Recomputes the loads by exact sums, so that no error builds up."""
        self.load = exact_loads(self.chosen, self.instance.demand) / self.scale

    def breach(
        self, load: np.ndarray, experts: np.ndarray | slice | int = slice(None)
    ) -> np.ndarray:
        """Overload plus shortfall at the given loads, elementwise."""
        over = np.maximum(load - self.capacity[experts], 0.0)
        return over + np.maximum(self.floor[experts] - load, 0.0)

    def conflicts(self) -> np.ndarray:
        """(n,): breached separate pairs per expert, each counted from both sides."""
        if self.rivals is None:
            return np.zeros(len(self.load))
        return np.where(self.chosen, self.rivals, 0).sum(axis=0).astype(float)

    def move(self, i: int, source: int, target: int) -> None:
        """Row i leaves ``source`` for ``target``."""
        self.chosen[i, source] = False
        self.chosen[i, target] = True
        self.load[source] -= self.demand[i, source]
        self.load[target] += self.demand[i, target]
        if self.rivals is not None:
            for group in self.groups_of.get(i, ()):
                others = group[group != i]
                self.rivals[others, source] -= 1
                self.rivals[others, target] += 1

    def shifts(self, rows: np.ndarray, source: int) -> tuple[np.ndarray, np.ndarray]:
        """Shifting each of ``rows`` off ``source`` to each expert.

        Returns:
            Cut of V and worth lost, both (len(rows), n); the cut is -inf where not possible.
        """
        before, after = self.breach(self.load), self.load[source] - self.demand[rows, source]
        cut = (before[source] - self.breach(after, source))[:, None] + (
            before - self.breach(self.load + self.demand[rows])
        )
        if self.rivals is not None:
            cut = cut + (self.rivals[rows, source][:, None] - self.rivals[rows])
        worth = self.instance.worth[rows]
        lost = worth[:, source][:, None] - worth
        cut[self.chosen[rows] | ~self.instance.allowed[rows]] = -np.inf
        return cut, lost

    def swaps(
        self, rows: np.ndarray, source: int, others: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Exchanging each of ``rows`` on ``source`` with each pair (others[q] on targets[q]).

        Returns:
            Cut of V and worth lost, both (len(rows), len(others)).
        """
        worth, demand = self.instance.worth, self.demand
        grid = rows[:, None], targets[None, :]
        new_source = self.load[source] - demand[rows, source][:, None] + demand[others, source]
        new_target = self.load[targets] - demand[others, targets] + demand[grid]
        before = self.breach(self.load)
        cut = before[source] - self.breach(new_source, source)
        cut = cut + before[targets] - self.breach(new_target, targets)
        if self.rivals is not None:
            cut = cut + (
                self.rivals[rows, source][:, None]
                - self.rivals[grid]
                + self.rivals[others, targets]
                - self.rivals[others, source]
            )
        lost = worth[rows, source][:, None] - worth[grid]
        lost = lost + worth[others, targets] - worth[others, source]
        allowed, chosen = self.instance.allowed, self.chosen
        bad = chosen[grid] | ~allowed[grid]
        bad |= chosen[others, source] | ~allowed[others, source] | (targets == source)
        cut[bad] = -np.inf
        return cut, lost


def repair(
    instance: Instance, chosen: np.ndarray, steps: int = 400, clock: Clock | None = None
) -> tuple[np.ndarray, bool]:
    """Moves rows until every limit is kept.

    Args:
        instance: The problem.
        chosen: (m, n) bool, complete (each row has its copies).
        steps: Steps allowed beyond those that cut the breach.
        clock: The safety net.

    Returns:
        The map and whether it is strict, rechecked by exact sums.
    """
    state = _State(instance, chosen)
    best = _settle(state, {}, steps, clock)
    if instance.is_strict(state.chosen):
        return state.chosen, True
    return best, instance.is_strict(best)


def _settle(
    state: _State, tabu: dict[tuple[int, int], int], steps: int, clock: Clock | None
) -> np.ndarray:
    """Steps until nothing is breached, or none helps any more; the least breached map it saw."""
    best, best_breach = state.chosen.copy(), np.inf
    step = 0
    while True:
        breach = state.breach(state.load) + state.conflicts()
        total = float(breach.sum())
        if total <= _TINY:
            state.reload()
            if float((state.breach(state.load) + state.conflicts()).sum()) <= _TINY:
                return state.chosen
        if total < best_breach * (1 - 1e-9):
            best, best_breach = state.chosen.copy(), total
        elif steps == 0 or (clock is not None and clock.left() <= 0):
            return best
        else:
            steps -= 1
        step += 1
        banned = [pair for pair, until in tabu.items() if until > step]
        until = step + 7 + state.instance.shape[1] // 4
        if not _step(state, int(np.argmax(breach)), banned, tabu, until):
            return best


def improve(
    instance: Instance,
    chosen: np.ndarray,
    reduced: np.ndarray,
    bound: float,
    kicks: int,
    seed: int,
    clock: Clock | None = None,
) -> np.ndarray:
    """Raises the worth of a strict map: iterated local search.

    Shifts and swaps first, until none is left that pays. Then each kick puts one row that is not
    where it would like to be on the expert it likes best, holds it there and settles the breach
    that makes. The outcome is kept if it is worth more, or, ever less often, a little less.

    Args:
        instance: The problem.
        chosen: (m, n) strict map.
        reduced: (m, n) reduced worths, which say what a row would like.
        bound: The relaxation's bound on the worth.
        kicks: Number of kicks.
        seed: Which rows are kicked.
        clock: The safety net.

    Returns:
        A strict map worth at least as much.
    """
    if int(instance.copies.sum()) ** 2 > SWAP_PAIRS * instance.shape[1]:
        return chosen  # too many swaps to look at
    random = np.random.default_rng(seed)
    n = instance.shape[1]
    state = _State(instance, chosen)
    _climb(state, list(range(n)))
    value = highest = instance.value(state.chosen)
    best = state
    for kick in range(kicks):
        if clock is not None and clock.left() <= 0:
            break
        rows, sources = np.nonzero(state.chosen)
        wish = np.where(state.chosen[rows], -np.inf, reduced[rows])
        targets = wish.argmax(axis=1)
        regret = wish[np.arange(len(rows)), targets] - reduced[rows, sources]
        scale = max(float(regret.max()), 1e-12) / 3
        k = int(np.argmax(regret + scale * random.gumbel(size=len(rows))))
        i, source, target = int(rows[k]), int(sources[k]), int(targets[k])
        if not np.isfinite(regret[k]):
            continue
        trial = state.copy()
        trial.move(i, source, target)
        forever = 1 << 30
        tabu = {(i, j): forever for j in range(n)}
        _settle(trial, tabu, 5, clock)
        touched = np.flatnonzero((trial.chosen != state.chosen).any(axis=0)).tolist()
        _climb(trial, touched)
        worth = instance.value(trial.chosen)
        # a little worse is a way out of a local optimum, less and less as the kicks run out
        margin = PATIENCE * (highest - bound) * (kicks - kick - 1) / kicks
        if worth > value + margin and instance.is_strict(trial.chosen):
            state, value = trial, worth
            if worth > highest:
                best, highest = trial, worth
    return best.chosen if instance.is_strict(best.chosen) else chosen


def _climb(state: _State, waiting: list[int]) -> None:
    """Shifts and swaps that keep all limits and gain worth, off the experts given and onwards."""
    steps = 20 * len(state.chosen)
    while waiting and steps:
        expert = waiting.pop(0)
        other = _gain(state, expert)
        if other is not None:
            steps -= 1
            waiting += [j for j in (expert, other) if j not in waiting]


def _gain(state: _State, expert: int) -> int | None:
    """Takes the best shift or swap off one expert that keeps all limits; the other expert."""
    rows = np.flatnonzero(state.chosen[:, expert])
    if not len(rows):
        return None
    cut, lost = state.shifts(rows, expert)
    lost = np.where(cut >= 0, lost, np.inf)
    k = int(np.argmin(lost))
    a, target = divmod(k, lost.shape[1])
    best, action = float(lost.flat[k]), (int(rows[a]), target, -1)
    others, targets = np.nonzero(state.chosen)
    elsewhere = targets != expert
    others, targets = others[elsewhere], targets[elsewhere]
    if len(others):
        cut, lost = state.swaps(rows, expert, others, targets)
        lost = np.where(cut >= 0, lost, np.inf)
        k = int(np.argmin(lost))
        if lost.flat[k] < best:
            a, q = divmod(k, lost.shape[1])
            best, action = float(lost.flat[k]), (int(rows[a]), int(targets[q]), int(others[q]))
    if best >= -1e-10:
        return None
    row, target, other = action
    state.move(row, expert, target)
    if other >= 0:
        state.move(other, target, expert)
    return target


def _step(
    state: _State,
    expert: int,
    banned: list[tuple[int, int]],
    tabu: dict[tuple[int, int], int],
    until: int,
) -> bool:
    """The best shift or swap that touches the most breached expert; False if there is none."""
    instance = state.instance
    under = state.load[expert] < state.floor[expert]
    candidates: list[tuple[float, float, tuple]] = []

    def score(cut: np.ndarray, lost: np.ndarray) -> np.ndarray:
        # most breach cut per worth lost; without a cut, the least harm. A cut must not be dust
        gain = np.where(cut > _TINY, cut / (np.maximum(lost, 0.0) + 1e-3), -np.inf)
        return np.where(np.isneginf(gain) & np.isfinite(cut), -1e9 * (1e-9 - cut) - lost, gain)

    if under:  # rows come to this expert, from wherever
        i, sources = np.nonzero(state.chosen & ~state.chosen[:, [expert]])
        ok = instance.allowed[i, expert]
        i, sources = i[ok], sources[ok]
        if len(i):
            before = state.breach(state.load)
            cut = before[expert] - state.breach(
                state.load[expert] + state.demand[i, expert], expert
            )
            cut = (
                cut
                + before[sources]
                - state.breach(state.load[sources] - state.demand[i, sources], sources)
            )
            if state.rivals is not None:
                cut = cut + state.rivals[i, sources] - state.rivals[i, expert]
            lost = instance.worth[i, sources] - instance.worth[i, expert]
            for row, target in banned:
                if target == expert:
                    cut[i == row] = -np.inf
            points = score(cut, lost)
            k = int(np.argmax(points))
            if np.isfinite(points[k]):
                candidates.append((float(points[k]), float(cut[k]), (i[k], sources[k], expert)))
    rows = np.flatnonzero(state.chosen[:, expert])
    if len(rows):
        if not under:
            cut, lost = state.shifts(rows, expert)
            for row, target in banned:
                cut[rows == row, target] = -np.inf
            points = score(cut, lost)
            k = int(np.argmax(points))
            a, target = divmod(k, cut.shape[1])
            if np.isfinite(points.flat[k]):
                candidates.append(
                    (float(points.flat[k]), float(cut.flat[k]), (rows[a], expert, target))
                )
        pairs = len(rows) * int(instance.copies.sum())
        if pairs <= SWAP_PAIRS or not any(cut > _TINY for _, cut, _ in candidates):
            found = _best_swap(state, expert, rows, banned, score)
            if found is not None:
                candidates.append(found)
    if not candidates:
        return False
    _, _, action = max(candidates, key=lambda c: c[0])
    if len(action) == 3:
        row, source, target = (int(v) for v in action)
        state.move(row, source, target)
        tabu[row, source] = until
    else:
        row, source, other, target = (int(v) for v in action)
        state.move(row, source, target)
        state.move(other, target, source)
        tabu[row, source] = tabu[other, target] = until
    return True


def _best_swap(
    state: _State, expert: int, rows: np.ndarray, banned: list[tuple[int, int]], score: object
) -> tuple[float, float, tuple] | None:
    others, targets = np.nonzero(state.chosen)
    elsewhere = targets != expert
    others, targets = others[elsewhere], targets[elsewhere]
    if not len(others):
        return None
    blocked = {row for row, target in banned}
    if blocked:
        free = ~np.isin(others, list(blocked))
        others, targets = others[free], targets[free]
        rows = rows[~np.isin(rows, list(blocked))]
        if not len(others) or not len(rows):
            return None
    block = max(1, SWAP_PAIRS // len(rows))
    best: tuple[float, float, tuple] | None = None
    for start in range(0, len(others), block):
        part = slice(start, start + block)
        cut, lost = state.swaps(rows, expert, others[part], targets[part])
        points = score(cut, lost)  # type: ignore[operator]
        k = int(np.argmax(points))
        if np.isfinite(points.flat[k]) and (best is None or points.flat[k] > best[0]):
            a, q = divmod(k, cut.shape[1])
            action = (rows[a], expert, others[part][q], targets[part][q])
            best = (float(points.flat[k]), float(cut.flat[k]), action)
    return best


def construct(instance: Instance, reduced: np.ndarray) -> np.ndarray | None:
    """A map from nothing: largest demand first, each to its best experts by reduced worth.

    Args:
        instance: The problem.
        reduced: (m, n) worth minus prices, -inf where not allowed.

    Returns:
        A complete map within the capacities and groups (floors may fall short), or None where a
        row found no room.
    """
    m, n = instance.shape
    room = instance.room.copy()
    chosen = np.zeros((m, n), dtype=bool)
    scale = capacity_scale(instance)
    size = (instance.demand / scale).max(axis=1)
    groups_of: dict[int, list[np.ndarray]] = {}
    for group in instance.groups:
        for i in group.tolist():
            groups_of.setdefault(i, []).append(group)
    for i in np.lexsort((np.arange(m), -size)).tolist():
        fits = instance.demand[i] <= room
        for group in groups_of.get(i, ()):
            fits &= ~chosen[group].any(axis=0)
        # ties go where there is most room
        points = np.where(fits, reduced[i] + 1e-9 * room / scale, -np.inf)
        copies = int(instance.copies[i])
        picks = [int(np.argmax(points))] if copies == 1 else np.argsort(-points)[:copies].tolist()
        if not np.isfinite(points[picks]).all():
            return None
        chosen[i, picks] = True
        room[picks] -= instance.demand[i, picks]
    return chosen
