"""The planning problem as arrays in one canonical form, which every solver step works on.

Rows and columns are sorted by name (so that no answer depends on the order of listing), datasets
that must stay together are one row, moving away from the previous plan is paid in the affinity,
and affinities are shifted and scaled so that solver tolerances mean the same for any input:

    worth_ij = (w_ij - max_k w_ik) / spread   in [-1, 0]

with ``spread`` the largest row range. A constant per row changes no map, and on affinities such as
0.8 + 1e-6 * noise a solver at its default tolerances would see nothing but ties.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mmdet_moe.planning.errors import PlanError
from mmdet_moe.planning.plan import LOAD_TOLERANCE, exact_loads
from mmdet_moe.planning.problem import PlanningProblem


@dataclass(eq=False)
class Instance:
    """A canonical problem of m rows and n experts.

    Attributes:
        worth: (m, n), scaled affinity in [-1, 0]; the best allowed expert of each row has 0.
        demand: (m, n), none negative.
        capacity: (n,) and ``floor`` (n,), in units of the demand.
        copies: (m,) int64, experts per row.
        groups: Row indices that may not share an expert, one array per ``separate`` group.
        allowed: (m, n) bool: False where one demand alone exceeds the capacity, so x_ij = 0.
        offset: Affinity of the map that gives each row its best experts ``copies`` times ...
        spread: ... so that affinity = offset + spread * worth.
        rows: Names of the datasets merged into each row.
        experts: Names of the experts, sorted.
    """

    worth: np.ndarray
    demand: np.ndarray
    capacity: np.ndarray
    floor: np.ndarray
    copies: np.ndarray
    groups: list[np.ndarray]
    allowed: np.ndarray
    offset: float
    spread: float
    rows: list[list[str]]
    experts: list[str]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        m, n = self.worth.shape
        return m, n

    @property
    def room(self) -> np.ndarray:
        """(n,): the capacities with the tolerance that strictness allows."""
        return self.capacity * (1 + LOAD_TOLERANCE)

    def value(self, chosen: np.ndarray) -> float:
        """Scaled worth of a 0/1 map (m, n), summed without rounding error."""
        return math.fsum(self.worth[chosen])

    def unscaled(self, value: float) -> float:
        """A scaled worth in units of the affinity."""
        return self.offset + self.spread * value

    def problems(self, chosen: np.ndarray) -> list[str]:
        """What is wrong with a 0/1 map, by exact sums; empty if it is complete and strict."""
        found = []
        if (chosen.sum(axis=1) != self.copies).any():
            found.append('incomplete')
        loads = exact_loads(chosen, self.demand)
        if (loads > self.room).any():
            found.append('overload')
        if (loads < self.floor * (1 - LOAD_TOLERANCE)).any():
            found.append('below min_load')
        if any((chosen[group].sum(axis=0) > 1).any() for group in self.groups):
            found.append('not separate')
        return found

    def is_strict(self, chosen: np.ndarray | None) -> bool:
        """Whether a 0/1 map is complete and keeps every limit."""
        return chosen is not None and not self.problems(chosen)


def canonical(problem: PlanningProblem, capacity: np.ndarray) -> Instance:
    """The canonical instance of a problem with the given capacities (n,)."""
    columns = sorted(range(len(problem.experts)), key=lambda j: problem.experts[j])
    experts = [problem.experts[j] for j in columns]
    index = {name: i for i, name in enumerate(problem.datasets)}
    rows = problem.merged()
    first = [index[members[0]] for members in rows]
    affinity = (problem.affinity - penalties(problem))[:, columns]
    demand = problem.demand[:, columns]
    worth, needs = affinity[first], demand[first]
    for i, members in enumerate(rows):
        if len(members) > 1:
            mine = [index[name] for name in members]
            worth[i] = affinity[mine].sum(axis=0)
            needs[i] = demand[mine].sum(axis=0)
    copies = problem.copies[first]
    capacity = np.asarray(capacity, dtype=np.float64)[columns]
    allowed = needs <= capacity * (1 + LOAD_TOLERANCE)
    if not np.isfinite(worth).all():
        raise PlanError('affinity: sums over datasets kept together are too large for a float')

    best = np.where(allowed, worth, -np.inf).max(axis=1)
    best = np.where(np.isfinite(best), best, worth.max(axis=1))
    worth = worth - best[:, None]
    spread = -float(np.where(allowed, worth, 0.0).min(initial=0.0))
    if not np.isfinite(spread):
        raise PlanError('affinity: the spread between its entries is too large for a float')
    if spread == 0.0:
        spread = 1.0
    worth = np.where(allowed, np.minimum(worth, 0.0) / spread, -1.0) + 0.0
    row_of = {name: i for i, members in enumerate(rows) for name in members}
    groups = sorted({tuple(sorted({row_of[name] for name in g})) for g in problem.separate})
    return Instance(
        worth=worth,
        demand=needs,
        capacity=capacity,
        floor=problem.min_load[columns],
        copies=copies,
        groups=[np.array(group) for group in groups],
        allowed=allowed,
        offset=math.fsum(best * copies),
        spread=spread,
        rows=rows,
        experts=experts,
    )


def penalties(problem: PlanningProblem) -> np.ndarray:
    """What each pair costs for being a move: p where the previous plan had not that expert.

    Returns:
        Array of shape (m, n). A dataset that the previous plan does not know moves freely.
    """
    cost = np.zeros(problem.affinity.shape)
    if problem.previous is None or problem.move_penalty == 0:
        return cost
    for i, name in enumerate(problem.datasets):
        old = problem.previous.assignment.get(name)
        if old is not None:
            cost[i] = [0.0 if expert in old else problem.move_penalty for expert in problem.experts]
    return cost
