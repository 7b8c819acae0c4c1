"""The planner's linear relaxation: one formulation, three ways to an optimum, one proof.

    maximise    sum_ij worth_ij x_ij
    subject to  sum_j x_ij = r_i                              for every row i
                floor_j <= sum_i s_ij x_ij <= c_j             for every expert j
                sum_{i in G} x_ij <= 1                        for every separate group G, expert j
                0 <= x_ij <= 1,  x_ij = 0 where s_ij > c_j

:func:`solve_pulp` says it in PuLP, :func:`solve_arrays` gives HiGHS the same as sparse arrays
where PuLP's objects would cost more than the solve (a test holds the two equal), and large problems
without groups go to :func:`mmdet_moe.planning.pricing.solve_transport_lp`.

Whatever found the prices, the bound is recomputed from them: for any capacity price p_j (positive
for the capacity, negative for the floor) and any g >= 0 on the group rows,

    UB(p, g) = sum_j (c_j max(p_j, 0) + floor_j min(p_j, 0)) + sum g
               + sum_i (sum of the r_i largest  worth_ij - s_ij p_j - sum_{G with i} g_Gj)

is at least the worth of every map (Lagrangian duality). A solver's row duals are not used: they are
wrong for this wherever x <= 1 binds as a bound of a column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from mmdet_moe.planning import solver
from mmdet_moe.planning.checks import number
from mmdet_moe.planning.errors import InfeasibleError, NoPlanFoundError
from mmdet_moe.planning.instance import Instance
from mmdet_moe.planning.solver import Clock, Programme

#: Up to this many columns the model is built in PuLP.
PULP_COLUMNS = 4_000
#: Up to this many columns the whole matrix goes to HiGHS; beyond, columns are priced in.
ARRAY_COLUMNS = 16_000
#: Entries of x this close to 0 or 1 are 0 or 1.
SNAP = 1e-9


@dataclass
class Relaxation:
    """An LP optimum and its proof.

    Attributes:
        x: (m, n) csr, entries in [0, 1], rows summing to ``copies``.
        reduced: (m, n) worth minus the prices of the limits; -inf where not allowed.
        price: (n,) capacity price per unit of demand, negative where a floor binds.
        bound: UB at these prices, in scaled worth.
        method: 'pulp', 'arrays' or 'pricing'.
    """

    x: sparse.csr_matrix
    reduced: np.ndarray
    price: np.ndarray
    bound: float
    method: str


def relax(instance: Instance, clock: Clock | None = None) -> Relaxation:
    """Solves the relaxation by the way that suits its size.

    Raises:
        InfeasibleError: If the relaxation has no solution, so that no map exists.
        NoPlanFoundError: If the clock struck first.
    """
    if clock is not None and clock.left() <= 0:
        raise _unsolved(clock)
    columns = int(instance.allowed.sum())
    if columns <= PULP_COLUMNS:
        return solve_pulp(instance, clock)
    if columns <= ARRAY_COLUMNS:
        return solve_arrays(instance, clock)
    if instance.groups:
        return solve_generated(instance, clock)
    return solve_priced(instance, clock)


# ---------------------------------------------------------------------- the formulation
def capacity_scale(instance: Instance) -> np.ndarray:
    """(n,): what load rows are divided by, so that 1 means a full expert."""
    largest = np.where(instance.allowed, instance.demand, 0.0).max(axis=0)
    scale = np.maximum(instance.capacity, largest)
    return np.where(scale > 0, scale, 1.0)


def formulate(
    instance: Instance,
    rows: np.ndarray,
    columns: np.ndarray,
    cuts: Sequence[tuple[int, np.ndarray]] = (),
) -> Programme:
    """The problem over the pairs (rows[k], columns[k]) as sparse arrays, minimising -worth.

    Constraint rows in order: one per row of the instance, one per expert, one per (group, expert),
    one per cut (j, members): at most len(members) - 1 of the members on expert j.
    """
    m, n = instance.shape
    k = np.arange(len(rows))
    scale = capacity_scale(instance)
    parts = [(rows, k, np.ones(len(rows)))]
    parts.append((m + columns, k, instance.demand[rows, columns] / scale[columns]))
    low = [instance.copies.astype(float), instance.floor / scale]
    high = [instance.copies.astype(float), instance.capacity / scale]
    base = m + n
    for group in instance.groups:
        mine = np.isin(rows, group)
        parts.append((base + columns[mine], k[mine], np.ones(mine.sum())))
        low.append(np.full(n, -np.inf))
        high.append(np.ones(n))
        base += n
    for expert, members in cuts:
        mine = (columns == expert) & np.isin(rows, members)
        parts.append((np.full(mine.sum(), base), k[mine], np.ones(mine.sum())))
        low.append(np.array([-np.inf]))
        high.append(np.array([len(members) - 1.0]))
        base += 1
    i, j, value = (np.concatenate(part) for part in zip(*parts, strict=True))
    matrix = sparse.csc_matrix((value, (i, j)), shape=(base, len(rows)))
    cost = -instance.worth[rows, columns]
    return Programme(cost, matrix, np.concatenate(low), np.concatenate(high))


# ---------------------------------------------------------------------- ways to solve it
def solve_pulp(instance: Instance, clock: Clock | None = None) -> Relaxation:
    """The relaxation written in PuLP, solved by HiGHS in process."""
    import pulp

    m, n = instance.shape
    rows, columns = np.nonzero(instance.allowed)
    pairs = list(zip(rows.tolist(), columns.tolist(), strict=True))
    scale = capacity_scale(instance)
    x = {(i, j): pulp.LpVariable(f'x_{i}_{j}', 0, 1) for i, j in pairs}
    of_row: list[list[int]] = [[] for _ in range(m)]
    of_expert: list[list[int]] = [[] for _ in range(n)]
    for i, j in pairs:
        of_row[i].append(j)
        of_expert[j].append(i)

    # PuLP's duals of a maximisation come with their signs flipped; minimise the loss instead
    model = pulp.LpProblem('expert_map', pulp.LpMinimize)
    loss = -instance.worth * solver.COST_SCALE
    model += pulp.LpAffineExpression([(x[pair], float(loss[pair])) for pair in pairs])
    names = []

    def add(constraint: pulp.LpConstraint, name: str) -> None:
        model.addConstraint(constraint, name)
        names.append(name)

    for i in range(m):
        served = pulp.lpSum(x[i, j] for j in of_row[i])
        add(served == int(instance.copies[i]), f'row_{i}')
    for j in range(n):
        load = pulp.LpAffineExpression(
            [(x[i, j], float(instance.demand[i, j] / scale[j])) for i in of_expert[j]]
        )
        add(load <= float(instance.capacity[j] / scale[j]), f'capacity_{j}')
        if instance.floor[j] > 0:
            add(load >= float(instance.floor[j] / scale[j]), f'floor_{j}')
    for g, group in enumerate(instance.groups):
        members = set(group.tolist())
        for j in range(n):
            sharing = [x[i, j] for i in of_expert[j] if i in members]
            if len(sharing) > 1:
                add(pulp.lpSum(sharing) <= 1, f'separate_{g}_{j}')

    options = {'threads': 1, 'parallel': 'off', 'random_seed': 0}
    limit = None if clock is None else max(clock.left(), 1e-3)
    model.solve(pulp.HiGHS(msg=False, timeLimit=limit, **options))
    # PuLP calls an LP that the time limit stopped 'Optimal': ask HiGHS itself
    status = str(model.solverModel.getModelStatus()).rsplit('.', 1)[-1]
    if status in ('kInfeasible', 'kUnboundedOrInfeasible'):
        raise infeasible(instance)
    if status != 'kOptimal':
        raise _unsolved(clock)
    values = np.array([x[pair].varValue or 0.0 for pair in pairs])
    dual = {name: (model.constraints[name].pi or 0.0) / solver.COST_SCALE for name in names}
    price = np.array(
        [-(dual[f'capacity_{j}'] + dual.get(f'floor_{j}', 0.0)) / scale[j] for j in range(n)]
    )
    group_price = np.array(
        [
            [max(-dual.get(f'separate_{g}_{j}', 0.0), 0.0) for j in range(n)]
            for g in range(len(instance.groups))
        ]
    ).reshape(-1, n)
    return _finish(instance, rows, columns, values, price, group_price, 'pulp')


def solve_arrays(
    instance: Instance,
    clock: Clock | None = None,
    pairs: tuple[np.ndarray, np.ndarray] | None = None,
) -> Relaxation:
    """The same relaxation given to HiGHS as sparse arrays, over all allowed pairs or a subset."""
    rows, columns = np.nonzero(instance.allowed) if pairs is None else pairs
    answer = solver.solve(formulate(instance, rows, columns), clock=clock)
    if answer.status == 'infeasible':
        raise infeasible(instance)
    if answer.x is None or answer.duals is None:
        raise _unsolved(clock)
    m, n = instance.shape
    price = -answer.duals[m : m + n] / capacity_scale(instance)
    group_price = np.maximum(-answer.duals[m + n :], 0.0).reshape(-1, n)
    return _finish(instance, rows, columns, answer.x, price, group_price, 'arrays')


def solve_priced(instance: Instance, clock: Clock | None = None) -> Relaxation:
    """A large relaxation without groups, by smoothed duals and column generation."""
    from mmdet_moe.planning.pricing import solve_transport_lp
    from mmdet_moe.planning.repair import construct

    m, n = instance.shape
    none = np.zeros((0, n))
    # where everyone can have what it likes best, prices of zero prove it; with many ties this is
    # common, and it is the case that column generation finds hardest
    free = np.where(instance.allowed, instance.worth, -np.inf)
    chosen = construct(instance, free)
    if instance.is_strict(chosen) and chosen is not None:
        best = lagrangian_bound(instance, free, np.zeros(n))
        if best - instance.value(chosen) <= 1e-12 * m:
            rows, columns = np.nonzero(chosen)
            ones = np.ones(len(rows))
            return _finish(instance, rows, columns, ones, np.zeros(n), none, 'pricing')
    same = (instance.demand == instance.demand[:, :1]).all()
    answer = solve_transport_lp(
        free,
        instance.demand[:, 0] if same else instance.demand,
        instance.capacity,
        instance.copies,
        instance.floor,
        # what an unfinished relaxation leaves is for repair and polish
        time_limit=math.inf if clock is None else clock.left() / 2,
    )
    if clock is not None and not answer.proven:
        clock.struck = True
    x = sparse.coo_matrix(answer.x)
    price = np.asarray(answer.capacity_duals) - np.asarray(answer.floor_duals)
    return _finish(instance, x.row, x.col, x.data, price, none, 'pricing')


def solve_generated(instance: Instance, clock: Clock | None = None, per_row: int = 8) -> Relaxation:
    """A large relaxation with groups: the best columns by reduced worth, then more by pricing.

    Starts from the prices of the relaxation without groups, adds each row's best columns until no
    column outside prices in, which proves the optimum over all columns.
    """
    plain = Instance(**{**vars(instance), 'groups': []})
    reduced = (
        solve_arrays(plain, clock)
        if instance.allowed.sum() <= ARRAY_COLUMNS
        else solve_priced(plain, clock)
    ).reduced
    m, n = instance.shape
    known = np.zeros((m, n), dtype=bool)
    keep = int(instance.copies.max()) + per_row
    while True:
        count = min(keep, n)
        best = np.argpartition(-reduced, count - 1, axis=1)[:, :count]
        before = known.sum()
        np.put_along_axis(known, best, True, axis=1)
        known &= instance.allowed
        i, j = np.nonzero(known)
        everything = known.sum() == instance.allowed.sum()
        try:
            found = solve_arrays(instance, clock, (i, j))
        except InfeasibleError:
            if everything:
                raise
            keep *= 2  # too few columns to keep the limits at all
            continue
        gap = found.bound - float((found.x.multiply(instance.worth)).sum())
        if gap <= 1e-9 * max(1, m) or everything:
            return found
        reduced = found.reduced
        if known.sum() == before:
            keep *= 2


def _finish(
    instance: Instance,
    rows: np.ndarray,
    columns: np.ndarray,
    values: np.ndarray,
    price: np.ndarray,
    group_price: np.ndarray,
    method: str,
) -> Relaxation:
    values = np.clip(values, 0.0, 1.0)
    values = np.where(values < SNAP, 0.0, np.where(values > 1 - SNAP, 1.0, values))
    x = sparse.csr_matrix((values, (rows, columns)), shape=instance.shape)
    x.eliminate_zeros()
    x.sort_indices()
    # a positive price on a capacity that is no limit only loosens the bound; so does a negative
    # one without a floor
    price = np.where(instance.floor > 0, price, np.maximum(price, 0.0)) + 0.0
    reduced = reduced_worth(instance, price, group_price)
    bound = lagrangian_bound(instance, reduced, price, group_price)
    return Relaxation(x, reduced, price, bound, method)


# ---------------------------------------------------------------------- the proof
def reduced_worth(
    instance: Instance, price: np.ndarray, group_price: np.ndarray | None = None
) -> np.ndarray:
    """(m, n): worth_ij - s_ij p_j - sum of the prices of the groups with i; -inf if not allowed."""
    reduced = instance.worth - instance.demand * price
    if group_price is not None:
        for group, prices in zip(instance.groups, group_price, strict=False):
            reduced[group] -= prices
    reduced[~instance.allowed] = -np.inf
    return reduced


def lagrangian_bound(
    instance: Instance,
    reduced: np.ndarray,
    price: np.ndarray,
    group_price: np.ndarray | None = None,
) -> float:
    """UB(p, g) of the module's docstring, from the reduced worths (m, n)."""
    n = instance.shape[1]
    most = int(instance.copies.max())
    if most == 1:
        best = reduced.max(axis=1)
    else:
        top = -np.sort(-reduced, axis=1)[:, :most]
        best = np.where(np.arange(most) < instance.copies[:, None], top, 0.0).sum(axis=1)
    limits = [c * max(p, 0.0) for c, p in zip(instance.capacity, price, strict=True)]
    limits += [low * min(p, 0.0) for low, p in zip(instance.floor, price, strict=True)]
    groups = [] if group_price is None else group_price.reshape(-1, n).ravel().tolist()
    return math.fsum([*best.tolist(), *limits, *groups])


def infeasible(instance: Instance) -> InfeasibleError:
    """The error for a relaxation without solution, naming the limits that cannot all be kept.

    Solves the elastic relaxation: the least total excess over capacities (in full experts),
    shortfall of floors and breach of groups.
    """
    m, n = instance.shape
    rows, columns = np.nonzero(instance.allowed)
    programme = formulate(instance, rows, columns)
    total = programme.matrix.shape[0]
    slack_rows = np.arange(m, total)
    over = sparse.csc_matrix(
        (np.full(len(slack_rows), -float(m)), (slack_rows, np.arange(len(slack_rows)))),
        shape=(total, len(slack_rows)),
    )
    cost = np.concatenate([np.zeros(len(rows)), np.ones(2 * len(slack_rows))])
    elastic = Programme(
        cost, sparse.hstack([programme.matrix, over, -over]).tocsc(), programme.low, programme.high
    )
    answer = solver.solve(elastic, seconds=20)
    culprits = []
    if answer.x is not None:
        size = len(slack_rows)
        excess = answer.x[len(rows) : len(rows) + size] * m
        short = answer.x[len(rows) + size :] * m
        scale = capacity_scale(instance)
        for j in range(n):
            name = repr(instance.experts[j])
            if excess[j] > 1e-7:
                culprits.append(f'capacity of {name} by {number(round(excess[j] * scale[j], 9))}')
            if short[j] > 1e-7:
                culprits.append(f'min_load of {name} by {number(round(short[j] * scale[j], 9))}')
        for g, group in enumerate(instance.groups):
            if (excess[n + g * n : n + (g + 1) * n] > 1e-7).any():
                members = ', '.join(repr(instance.rows[i][0]) for i in group[:4])
                culprits.append(f'separate group of {members}')
    shown = '; '.join(culprits[:6]) + (' ...' if len(culprits) > 6 else '')
    why = f'; the nearest fractional map breaks: {shown}' if culprits else ''
    return InfeasibleError(f'no map exists, not even a fractional one{why}')


def _unsolved(clock: Clock | None) -> NoPlanFoundError:
    if clock is not None and clock.left() <= 0:
        return NoPlanFoundError('no map found: time ran out before the relaxation was solved')
    return NoPlanFoundError('no map found: HiGHS could not solve the relaxation')
