"""The linear relaxation of the planning problem at any size, with a proof of its optimum.

The relaxation of the (weighted) transport problem behind a plan is::

    max   sum_ij w_ij x_ij
    s.t.  sum_j x_ij = r_i                       every dataset on r_i experts
          d_j <= sum_i s_ij x_ij <= c_j          floor and capacity of every expert
          0 <= x_ij <= 1

with affinity ``w``, demand ``s``, capacity ``c``, floor ``d`` and copies ``r``.

**Bound.** For prices ``u, v >= 0`` of capacity and floor, put ``p = u - v``. Moving the load
constraints into the objective leaves one tiny problem per row, whose optimum is the sum of the
``r_i`` largest *reduced* affinities ``w_ij - s_ij p_j``. Hence (Lagrange duality)::

    UB(u, v) = sum_j c_j u_j - sum_j d_j v_j + sum_i sum of the r_i largest (w_ij - s_ij p_j)

is an upper bound for *any* ``u, v >= 0``, whoever found them, and its minimum is the LP's value.
:func:`dual_bound` computes it. A solution is called proven when its own value meets the bound.
With ``w = 0`` the bound turns into a proof that no solution exists, wherever it is negative.

**Method** (problems of a few thousand columns go to HiGHS whole):

1. *Smoothing.* The row maxima become soft maxima of temperature ``T`` and the smooth bound is
   minimised over the ``n`` prices by L-BFGS-B at falling ``T``. That takes some dozen passes over
   the matrix and leaves prices that are right up to about ``T``.
2. *A restricted LP.* Most rows keep only the experts they take at these prices and become a
   constant load; undecided rows keep a few columns. Prices are held in a box of half-width
   ``delta`` around a centre by two penalised slack columns per expert (the boxstep method: Marsten,
   Hogan, Blankenship, *Operations Research* 23(3), 1975), so every restricted LP is feasible.
3. *Pricing.* All columns are priced. Each row whose known columns are beaten gets its best unknown
   one, the centre moves to the prices of the best bound, and the box widens only where nothing
   prices out while it still binds. No violator and no binding box: the LP is solved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from mmdet_moe.planning.errors import InfeasibleError, NoPlanFoundError, PlanError

__all__ = ['LPSolution', 'dual_bound', 'solve_transport_lp']

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

#: Up to this many columns the whole LP goes to HiGHS at once.
DIRECT_COLUMNS = 4000
#: Temperatures of the smoothing, in units of the typical regret of a row.
TEMPERATURES = (0.1, 0.02, 0.004)
#: Columns per row, beyond its copies, that the later temperatures look at.
POOL_COLUMNS = 16
#: Columns an undecided row may start with, and rows per expert that may start undecided.
COLUMNS_PER_ROW = 6
START_ROWS_PER_EXPERT = 30
#: Half-width of the first price box, in temperatures (for a demand of mean size).
BOX_WIDTH = 4.0
#: A box that still binds at this half-width: feasible or not within rounding errors, unproven.
WIDEST_BOX = 1e9
#: HiGHS: primal simplex from our basis, on one thread (changing the number within a process
#: returns no solution).
OPTIONS: dict[str, Any] = {
    'output_flag': False,
    'threads': 1,
    'presolve': 'off',
    'solver': 'simplex',
    'simplex_strategy': 4,
    'primal_feasibility_tolerance': 1e-9,
    'dual_feasibility_tolerance': 1e-9,
}
#: Rows processed at once: the work arrays stay inside the processor's cache.
CHUNK = 1024


@dataclass(frozen=True)
class LPSolution:
    """An optimal solution of the relaxation and the proof that it is one.

    Attributes:
        x: Assignment, sparse (m, n); rows sum to the copies. A basic solution: at most about n
            rows are fractional.
        capacity_duals: Prices u >= 0 of the capacities, shape (n,), in affinity per demand.
        floor_duals: Prices v >= 0 of the minimum loads, shape (n,).
        bound: ``dual_bound`` at these prices: no map is worth more.
        value: Affinity of ``x``.
        proven: True when value and bound agree to the tolerance asked for.
        core: Rows and columns of the entries the method ended up with: those of ``x`` and the near
            alternatives of the rows that were undecided (all entries of a small problem).
    """

    x: scipy.sparse.csr_matrix
    capacity_duals: Floats
    floor_duals: Floats
    bound: float
    value: float
    proven: bool
    core: tuple[Ints, Ints]


def dual_bound(
    affinity: ArrayLike,
    demand: ArrayLike,
    capacity: ArrayLike,
    copies: ArrayLike,
    min_load: ArrayLike,
    capacity_duals: ArrayLike,
    floor_duals: ArrayLike,
) -> float:
    """The upper bound UB(u, v) of the module's docstring.

    Args:
        affinity: w, shape (m, n); -inf forbids an entry.
        demand: s, shape (m, n).
        capacity: c, shape (n,); inf allowed where the price is 0.
        copies: r, shape (m,).
        min_load: d, shape (n,).
        capacity_duals: u >= 0, shape (n,).
        floor_duals: v >= 0, shape (n,).

    Returns:
        A number no feasible (fractional or 0/1) assignment exceeds, but for float rounding.

    >>> dual_bound([[2., 1.], [2., 0.]], np.ones((2, 2)), [1, 1], [1, 1], [0, 0], [1, 0], [0, 0])
    3.0
    """
    w, s = np.asarray(affinity, float), np.asarray(demand, float)
    u, v = np.asarray(capacity_duals, float), np.asarray(floor_duals, float)
    r = np.asarray(copies).astype(np.int64)
    total = _price_term(np.asarray(capacity, float), np.asarray(min_load, float), u, v)
    parts = [total]
    for a in range(0, len(w), CHUNK):
        rows = slice(a, a + CHUNK)
        parts.append(float(_top_sums(w[rows] - s[rows] * (u - v), r[rows]).sum()))
    return math.fsum(parts)


def solve_transport_lp(
    affinity: ArrayLike,
    demand: ArrayLike,
    capacity: ArrayLike,
    copies: ArrayLike | None = None,
    min_load: ArrayLike | None = None,
    *,
    tol: float = 1e-9,
    time_limit: float = math.inf,
) -> LPSolution:
    """Solves the relaxation of a planning problem and proves the optimum.

    Args:
        affinity: w, shape (m, n), larger is better; -inf forbids an entry.
        demand: s >= 0, shape (m, n), (m,) or (m, 1).
        capacity: c >= 0, shape (n,); inf means no limit.
        copies: r, shape (m,), experts per row; 1 by default.
        min_load: d, shape (n,), the least load of each expert; 0 by default.
        tol: Largest difference of bound and value, as a share of the sum over the rows of the
            regret of a random assignment (affinity shifted or scaled: same meaning).
        time_limit: Seconds after which the best bound so far is returned, with ``proven`` False and
            an ``x`` that may exceed capacities. A safety net, infinite by default.

    Returns:
        The solution; ``proven`` says whether value and bound met.

    Raises:
        PlanError: Shapes do not fit or numbers are not usable.
        InfeasibleError: No assignment exists, not even a fractional one.
        NoPlanFoundError: HiGHS failed, for numerical reasons.

    >>> solution = solve_transport_lp([[2.0, 1.0], [2.0, 0.0]], [1.0, 1.0], [1.0, 1.0])
    >>> solution.value, solution.bound, solution.proven
    (3.0, 3.0, True)
    """
    problem = _Problem(affinity, demand, capacity, copies, min_load)
    if problem.w.size <= DIRECT_COLUMNS:
        return _Pricing(problem, problem.allowed.copy(), tol=tol).solve(math.inf)
    deadline = time.monotonic() + time_limit
    prices, temperature = _smoothed_prices(problem, TEMPERATURES)
    if problem.proves_infeasible(prices):
        raise problem.infeasible()
    chosen, known = _start_columns(problem, prices, temperature)
    box = _Box(prices, BOX_WIDTH * temperature)
    return _Pricing(problem, known, chosen, box, tol).solve(deadline)


class _Problem:
    """The relaxation with affinities and demands brought to size one.

    ``w`` becomes ``(w - row maximum) / w_scale``, demands are divided by their mean. Forbidden
    entries are -inf. ``s_row`` (m,) is set where the demand does not depend on the expert,
    ``s_full`` (m, n) where it does.
    """

    def __init__(
        self,
        affinity: ArrayLike,
        demand: ArrayLike,
        capacity: ArrayLike,
        copies: ArrayLike | None,
        min_load: ArrayLike | None,
    ) -> None:
        raw = np.asarray(affinity, float)
        if raw.ndim != 2 or not raw.size:
            raise PlanError(f'affinity must be a non-empty (m, n) matrix, got shape {raw.shape}')
        self.raw = raw
        self.m, self.n = m, n = raw.shape
        if np.isnan(raw).any() or np.isposinf(raw).any():
            raise PlanError('affinity must be finite (or -inf to forbid an entry)')
        s = np.asarray(demand, float)
        if s.shape in ((m,), (m, 1)):
            s = np.broadcast_to(s.reshape(m, 1), (m, n))
        self.raw_s = s
        self.r = _vector(1 if copies is None else copies, m, 'copies').astype(np.int64)
        self.raw_c = _vector(capacity, n, 'capacity', infinite=True)
        self.raw_d = _vector(0.0 if min_load is None else min_load, n, 'min_load')
        if s.shape != (m, n):
            raise PlanError(f'demand must have shape {(m, n)} or {(m,)}, got {s.shape}')
        if not np.isfinite(s).all() or (s < 0).any():
            raise PlanError('demand must be finite and not negative')
        if (self.r < 1).any():
            raise PlanError(f'copies of row {int(self.r.argmin())} must be at least 1')
        if (self.raw_d > self.raw_c).any():
            j = int((self.raw_d > self.raw_c).argmax())
            raise InfeasibleError(
                f'expert {j}: min_load {self.raw_d[j]:.10g} exceeds capacity {self.raw_c[j]:.10g}'
            )

        forbidden = np.isneginf(raw)
        self.allowed: Bools = ~forbidden
        short = self.allowed.sum(1) < self.r
        if short.any():
            i = int(short.argmax())
            raise InfeasibleError(
                f'row {i} needs {self.r[i]} experts but only {self.allowed[i].sum()} can take it'
            )
        self.top = raw.max(1)
        w = raw - self.top[:, None]
        self.regret, self.w_scale = _regrets(w, self.r, forbidden)
        self.w: Floats = w / self.w_scale
        self.s_scale = float(s.mean()) or 1.0
        uniform = bool((s == s[:, :1]).all())
        self.s_row: Floats | None = s[:, 0] / self.s_scale if uniform else None
        self.s_full: Floats | None = None if uniform else s / self.s_scale
        # A capacity beyond all demand never binds; keep the numbers of the LP near one.
        self.c = np.minimum(self.raw_c, 2.0 * s.sum(0) + self.s_scale) / self.s_scale
        self.d = self.raw_d / self.s_scale
        self.unit_copies = bool((self.r == 1).all())

    def chunks(self) -> Iterator[slice]:
        for a in range(0, self.m, CHUNK):
            yield slice(a, min(a + CHUNK, self.m))

    def demand(self, rows: Any, cols: Any = slice(None)) -> Floats:
        """Scaled demands of matching rows and columns (fancy indices) or of a slice of rows."""
        if self.s_row is None:
            assert self.s_full is not None
            return np.asarray(self.s_full[rows, cols])
        if isinstance(rows, slice):
            return np.asarray(self.s_row[rows, None])
        return np.asarray(self.s_row[rows])

    def loads(self, rows: Ints, cols: Ints) -> Floats:
        """Load of every expert when these entries are one, shape (n,)."""
        return np.asarray(np.bincount(cols, self.demand(rows, cols), minlength=self.n), float)

    def reduced(self, rows: slice, prices: Floats) -> Floats:
        """Reduced affinities ``w - s p`` of a slice of rows."""
        out = self.demand(rows) * prices
        np.subtract(self.w[rows], out, out=out)
        return out

    def bound(self, prices: Floats) -> float:
        """UB in scaled units, v being the negative part of the prices."""
        total = _price_term(self.c, self.d, np.maximum(prices, 0), np.maximum(-prices, 0))
        for rows in self.chunks():
            total += float(_top_sums(self.reduced(rows, prices), self.r[rows]).sum())
        return total

    def proves_infeasible(self, prices: Floats) -> bool:
        """True when the prices are a Farkas proof: w = 0 has a negative bound."""
        fixed = _price_term(self.c, self.d, np.maximum(prices, 0), np.maximum(-prices, 0))
        rows_term = 0.0
        for rows in self.chunks():
            cost = np.where(self.allowed[rows], -self.demand(rows) * prices, -np.inf)
            rows_term += float(_top_sums(cost, self.r[rows]).sum())
        return fixed + rows_term < -1e-9 * (abs(fixed) + abs(rows_term))

    def original_bound(self, prices: Floats) -> float:
        """The bound in the caller's units; computed on the caller's numbers."""
        u, v = self.original_duals(prices)
        return dual_bound(self.raw, self.raw_s, self.raw_c, self.r, self.raw_d, u, v)

    def original_duals(self, prices: Floats) -> tuple[Floats, Floats]:
        prices = prices * (self.w_scale / self.s_scale)
        return np.maximum(prices, 0), np.maximum(-prices, 0)

    def infeasible(self) -> InfeasibleError:
        """The error for a problem without any fractional solution, naming the totals."""
        least = _top_sums(np.where(self.allowed, -self.raw_s, -np.inf), self.r)
        need, have = -float(least.sum()), float(self.raw_c.sum())
        if need > have:
            return InfeasibleError(f'capacity {have:.10g} in total, demand {need:.10g}')
        most = float(_top_sums(np.where(self.allowed, self.raw_s, -np.inf), self.r).sum())
        floor = float(self.raw_d.sum())
        if most < floor:
            return InfeasibleError(f'min_load {floor:.10g} in total, demand at most {most:.10g}')
        return InfeasibleError(
            'capacities, minimum loads and copies contradict each other: '
            'not even a fractional assignment exists'
        )


def _vector(values: ArrayLike, size: int, name: str, infinite: bool = False) -> Floats:
    out = np.asarray(values, float)
    if out.ndim == 0:
        out = np.full(size, float(out))
    if out.shape != (size,):
        raise PlanError(f'{name} must have shape ({size},), got {out.shape}')
    if np.isnan(out).any() or (out < 0).any() or (not infinite and np.isinf(out).any()):
        raise PlanError(f'{name} must be finite and not negative')
    return out


def _regrets(w: Floats, r: Ints, forbidden: Bools) -> tuple[float, float]:
    """(sum of r_i * mean regret of row i, typical regret of a row); ``w`` has row maxima 0."""
    finite = np.where(forbidden, 0.0, w)
    mean = -finite.sum(1) / np.maximum((~forbidden).sum(1), 1)
    total = float((r * mean).sum())
    typical = float(np.median(mean)) or float(mean.mean())
    return (total, typical) if total > 0 else (1.0, 1.0)


def _price_term(c: Floats, d: Floats, u: Floats, v: Floats) -> float:
    """c'u - d'v, where an infinite capacity with price 0 counts 0."""
    return float(np.multiply(c, u, out=np.zeros(len(u)), where=u > 0).sum() - d @ v)


def _top_sums(a: Floats, r: Ints) -> Floats:
    """Sum of the r_i largest entries of row i."""
    out = a.max(1)
    for k in np.unique(r[r > 1]):
        rows = np.flatnonzero(r == k)
        part = a[rows]
        if k < a.shape[1]:
            part = np.partition(part, a.shape[1] - k, axis=1)[:, a.shape[1] - k :]
        out[rows] = part.sum(1)
    return np.asarray(out)


# --- smoothing -----------------------------------------------------------------------------------


@dataclass
class _Pool:
    """The columns the smoothed bound looks at: all of them, or the best few of each row."""

    cols: Ints | None  # (m, k), or None for all
    w: Floats  # (m, k)
    s: Floats  # (m, k) or (m, 1)

    @classmethod
    def full(cls, problem: _Problem) -> _Pool:
        return cls(None, problem.w, problem.demand(slice(None)))

    @classmethod
    def best(cls, problem: _Problem, prices: Floats, width: int) -> _Pool:
        if 2 * width > problem.n:
            return cls.full(problem)
        cols = _best_columns(problem, prices, width)[0]
        s = problem.demand(slice(None))
        if problem.s_row is None:
            s = np.take_along_axis(s, cols, 1)
        return cls(cols, np.take_along_axis(problem.w, cols, 1), s)


def _smoothed_prices(problem: _Problem, temperatures: tuple[float, ...]) -> tuple[Floats, float]:
    """Prices that minimise the smoothed bound at the last temperature, and that temperature.

    Only the first temperature looks at all columns.
    """
    n, floors = problem.n, problem.d > 0
    z = np.zeros(n + int(floors.sum()))
    pool, prices = _Pool.full(problem), np.zeros(n)

    def split(z: Floats) -> tuple[Floats, Floats]:
        v = np.zeros(n)
        v[floors] = z[n:]
        return z[:n], v

    for step, temperature in enumerate(temperatures):

        def objective(z: Floats, pool: _Pool, t: float, rough: bool) -> tuple[float, Floats]:
            u, v = split(z)
            value, load = _smooth_rows(problem, pool, u - v, t, rough)
            value += float(problem.c @ u - problem.d @ v)
            gradient = np.concatenate([problem.c - load, (load - problem.d)[floors]])
            return value / problem.m, gradient / problem.m

        result = scipy.optimize.minimize(
            objective,
            z,
            args=(pool, temperature, step == 0),
            jac=True,
            method='L-BFGS-B',
            bounds=[(0, WIDEST_BOX)] * len(z),  # an infeasible problem has no minimum
            options={'maxiter': 60, 'maxcor': 20, 'ftol': 1e-10, 'gtol': 1e-6},
        )
        z = result.x
        u, v = split(z)
        prices = u - v
        if step == 0:
            pool = _Pool.best(problem, prices, POOL_COLUMNS + int(problem.r.max()))
    return prices, temperatures[-1]


def _smooth_rows(
    problem: _Problem, pool: _Pool, prices: Floats, temperature: float, rough: bool
) -> tuple[float, Floats]:
    """Sum of the rows' soft maxima of the reduced affinities, and the loads they imply.

    ``rough`` takes a row with r copies for r rows with one, which is cheap and near enough to find
    out which columns matter.
    """
    value, load = 0.0, np.zeros(problem.n)
    for rows in problem.chunks():
        s, r = pool.s[rows], problem.r[rows]
        if pool.cols is None:
            a = pool.w[rows] - s * prices
        else:
            a = pool.w[rows] - s * prices[pool.cols[rows]]
        part, x = _soft_maximum(a, r, temperature)
        if not (rough or problem.unit_copies):
            several = np.flatnonzero(r > 1)
            if len(several):
                part[several], x[several] = _soft_top(a[several], r[several], temperature)
        value += float(part.sum())
        if pool.cols is None:
            load += (s[:, 0] @ x) if problem.s_row is not None else (s * x).sum(0)
        else:
            x *= s
            load += np.bincount(pool.cols[rows].ravel(), x.ravel(), minlength=problem.n)
    return value, load


def _soft_maximum(a: Floats, r: Ints, temperature: float) -> tuple[Floats, Floats]:
    """``r T log sum exp(a / T)`` of every row, and its gradient."""
    peak = a.max(1)
    x = a - peak[:, None]
    x /= temperature
    np.exp(x, out=x)
    total = x.sum(1)
    x *= (r / total)[:, None]
    return r * (peak + temperature * np.log(total)), x


def _soft_top(a: Floats, r: Ints, temperature: float) -> tuple[Floats, Floats]:
    """Smoothed sum of the r largest entries of every row, r >= 1, and its gradient x.

    With the entropy of a coin per entry this is ``min_t r t + T sum softplus((a - t) / T)``, and
    the gradient is the Fermi function with the level t at which the row sums to r. The level is
    found by Newton's method inside a bracket.
    """
    k = a.shape[1]
    rank = np.minimum(r, k - 1)
    ordered = np.sort(a, axis=1)
    above, below = ordered[np.arange(len(a)), k - rank], ordered[np.arange(len(a)), k - rank - 1]
    above = np.where(np.isfinite(above), above, ordered[:, -1])
    below = np.where(np.isfinite(below), below, above)
    reach = temperature * (math.log(k) + 1)
    low, high = below - reach, above + reach
    level = (above + below) / 2
    for _ in range(20):
        x = _fermi(a, level, temperature)
        excess = x.sum(1) - rank
        if np.abs(excess).max() < 1e-7:
            break
        low, high = np.where(excess > 0, level, low), np.where(excess < 0, level, high)
        slope = np.maximum((x * (1 - x)).sum(1) / temperature, 1e-300)
        newton = level + excess / slope
        inside = (newton > low) & (newton < high)
        level = np.where(inside, newton, (low + high) / 2)
    soft = temperature * np.logaddexp(0, (a - level[:, None]) / temperature).sum(1) + rank * level
    whole = np.flatnonzero(r >= k)
    x[whole] = np.isfinite(a[whole])
    soft[whole] = np.where(np.isfinite(a[whole]), a[whole], 0.0).sum(1)
    return soft, x


def _fermi(a: Floats, level: Floats, temperature: float) -> Floats:
    return np.asarray(0.5 + 0.5 * np.tanh((a - level[:, None]) / (2 * temperature)))


# --- the restricted LP ---------------------------------------------------------------------------


def _start_columns(problem: _Problem, prices: Floats, temperature: float) -> tuple[Bools, Bools]:
    """An assignment to start from (r_i entries per row) and the columns known at first.

    Every row takes its r_i best. Rows whose next best lies within ten temperatures are undecided;
    the ``START_ROWS_PER_EXPERT * n`` closest of them know up to ``COLUMNS_PER_ROW`` columns. A row
    with (nearly) equal choices takes the one with the most room left, so that tied problems start
    with balanced loads.

    Returns:
        Two boolean arrays (m, n).
    """
    m, n, r = problem.m, problem.n, problem.r
    width = int(min(n, COLUMNS_PER_ROW + int(r.max()) - 1))
    best, value = _best_columns(problem, prices, width)
    row = np.arange(m)
    taken = np.arange(width) < r[:, None]
    last = value[row, np.minimum(r, width) - 1]
    gap = np.where(r < width, last - value[row, np.minimum(r, width - 1)], np.inf)
    undecided = np.flatnonzero(gap <= 10 * temperature)

    chosen = np.zeros((m, n), bool)
    chosen[np.repeat(row, r), best[taken]] = True
    loose = undecided[(r[undecided] == 1) & (gap[undecided] <= temperature)]
    chosen[loose] = False
    room = problem.c - problem.loads(*np.nonzero(chosen))
    near = (value[loose] >= (last[loose] - temperature)[:, None]).sum(1)
    for t in np.argsort(-problem.demand(loose, best[loose, 0]), kind='stable'):
        i = int(loose[t])
        options = best[i, : near[t]]
        j = int(options[room[options].argmax()])
        chosen[i, j] = True
        room[j] -= problem.demand(i, j)

    known = chosen.copy()
    order = undecided[np.argsort(gap[undecided], kind='stable')][: START_ROWS_PER_EXPERT * n]
    close = value[order] >= (last[order] - 10 * temperature)[:, None]
    known[np.repeat(order, close.sum(1)), best[order][close]] = True
    return chosen, known & problem.allowed


def _best_columns(problem: _Problem, prices: Floats, width: int) -> tuple[Ints, Floats]:
    """The ``width`` columns with the largest reduced affinities per row, best first: (m, width)."""
    best = np.empty((problem.m, width), np.int64)
    value = np.empty((problem.m, width))
    for rows in problem.chunks():
        a = problem.reduced(rows, prices)
        part = np.argpartition(-a, width - 1, axis=1)[:, :width]
        part.sort(axis=1)
        a = np.take_along_axis(a, part, 1)
        order = np.argsort(-a, axis=1, kind='stable')
        best[rows] = np.take_along_axis(part, order, 1)
        value[rows] = np.take_along_axis(a, order, 1)
    return best, value


@dataclass
class _Box:
    """Bounds on the prices: ``centre`` plus and minus ``width``."""

    centre: Floats
    width: float


@dataclass
class _Basis:
    """Basis of a restricted LP (HiGHS status codes) with what its rows and columns stand for."""

    columns: Ints
    column_status: NDArray[np.int8]
    rows: Ints
    row_status: NDArray[np.int8]
    slack_status: NDArray[np.int8]
    load_status: NDArray[np.int8]


@dataclass
class _Restricted:
    """Solution of a restricted LP: entries of x, prices, and how much the box was used."""

    rows: Ints
    cols: Ints
    x: Floats
    prices: Floats
    excess: float


class _Pricing:
    """Restricted LPs with all columns priced in between, from known columns to the optimum.

    A row with exactly r_i known columns is a constant; the others are rows of the LP. Without a
    box, all columns must be known.

    Args:
        problem: The scaled problem.
        known: Columns of the first restricted LP, (m, n).
        chosen: r_i of them per row, the assignment the first LP starts from.
        box: Bounds on the prices.
        tol: As in :func:`solve_transport_lp`.
    """

    def __init__(
        self,
        problem: _Problem,
        known: Bools,
        chosen: Bools | None = None,
        box: _Box | None = None,
        tol: float = 1e-9,
    ) -> None:
        self.problem = problem
        self.known = known
        self.chosen = chosen
        self.box = box
        self.slack = tol * problem.regret / problem.w_scale
        # Loads are scaled by the capacities, so that the LP's right-hand sides are near one.
        self.unit = np.maximum(problem.c, 1e-6 * float(problem.c.mean()) or 1.0)
        self.basis: _Basis | None = None

    def solve(self, deadline: float) -> LPSolution:
        problem, best = self.problem, math.inf
        while True:
            lp = self._restricted()
            rows, cols, bound = self._price(lp.prices)
            if len(rows) == 0:
                if lp.excess <= 1e-9 or self.box is None:
                    return self._solution(lp)
                if problem.proves_infeasible(lp.prices):
                    raise problem.infeasible()
                if self.box.width > WIDEST_BOX:
                    return self._solution(lp)
                self.box = _Box(lp.prices, 4 * self.box.width)
            elif self.box is not None and bound < best:
                best = bound
                self.box = _Box(lp.prices, self.box.width)
            if time.monotonic() > deadline:
                return self._solution(lp)
            self.chosen = self.known.copy()
            self.known[rows, cols] = True

    def _price(self, prices: Floats) -> tuple[Ints, Ints, float]:
        """The best unknown column of every row whose known ones are beaten, and the bound."""
        problem = self.problem
        bound = _price_term(problem.c, problem.d, np.maximum(prices, 0), np.maximum(-prices, 0))
        found_rows, found_cols = [], []
        tolerance = 0.1 * self.slack / float(problem.r.sum())
        for rows in problem.chunks():
            a = problem.reduced(rows, prices)
            r, known = problem.r[rows], self.known[rows]
            bound += float(_top_sums(a, r).sum())
            weakest = _rth_largest(np.where(known, a, -np.inf), r)
            a[known] = -np.inf
            col = a.argmax(1)
            beaten = np.flatnonzero(a[np.arange(len(a)), col] > weakest + tolerance)
            found_rows.append(beaten + rows.start)
            found_cols.append(col[beaten])
        return np.concatenate(found_rows), np.concatenate(found_cols), bound

    def _solution(self, lp: _Restricted) -> LPSolution:
        problem = self.problem
        x = np.where(lp.x < 1e-11, 0.0, np.where(lp.x > 1 - 1e-11, 1.0, lp.x))
        matrix = scipy.sparse.csr_matrix((x, (lp.rows, lp.cols)), shape=(problem.m, problem.n))
        matrix.eliminate_zeros()
        matrix.sort_indices()
        entries = matrix.tocoo()
        rows, cols, x = entries.row, entries.col, entries.data
        scaled_value = float((problem.w[rows, cols] * x).sum())
        u, v = problem.original_duals(lp.prices)
        core_rows, core_cols = np.nonzero(self.known)
        return LPSolution(
            x=matrix,
            capacity_duals=u,
            floor_duals=v,
            bound=problem.original_bound(lp.prices),
            value=math.fsum(problem.raw[rows, cols] * x),
            proven=lp.excess <= 1e-9 and problem.bound(lp.prices) - scaled_value <= self.slack,
            core=(core_rows, core_cols),
        )

    def _restricted(self) -> _Restricted:
        """Solves the LP over the known columns.

        Raises:
            InfeasibleError: There is no box and HiGHS finds no solution.
        """
        import highspy as hp

        problem, n, unit = self.problem, self.problem.n, self.unit
        free = self.known.sum(1) > problem.r
        constant_rows, constant_cols = np.nonzero(self.known & ~free[:, None])
        load = problem.loads(constant_rows, constant_cols)
        free_rows = np.flatnonzero(free)
        local, cols = np.nonzero(self.known[free_rows])
        rows = free_rows[local]
        k, f = len(rows), len(free_rows)
        if k == 0 and self.box is None:
            slack = 1e-9 * unit
            if (load > problem.c + slack).any() or (load < problem.d - slack).any():
                raise problem.infeasible()
            ones = np.ones(len(constant_rows))
            return _Restricted(constant_rows, constant_cols, ones, np.zeros(n), 0.0)

        # Columns: x, and with a box the overload y+ at the highest price and the spare load y- at
        # the lowest one. Rows: the sum of each free row, then the load of each expert.
        floor = problem.d > 0
        cost, limit = [-problem.w[rows, cols]], [np.ones(k)]
        start = [2 * np.arange(k)]
        index = [np.column_stack([local, f + cols]).ravel()]
        entry = [np.column_stack([np.ones(k), problem.demand(rows, cols) / unit[cols]]).ravel()]
        if self.box is not None:
            low, high = self.box.centre - self.box.width, self.box.centre + self.box.width
            cost += [high * unit, -low * unit]
            limit += [np.full(n, np.inf), np.where(floor | (low > 0), np.inf, 0.0)]
            start += [2 * k + np.arange(2 * n)]
            index += [f + np.arange(n), f + np.arange(n)]
            entry += [-np.ones(n), np.ones(n)]
        sums = problem.r[free_rows].astype(float)
        lp = hp.HighsLp()
        lp.col_cost_, lp.col_upper_ = np.concatenate(cost), np.concatenate(limit)
        lp.num_col_, lp.num_row_ = len(lp.col_cost_), f + n
        lp.col_lower_ = np.zeros(lp.num_col_)
        lp.row_lower_ = np.concatenate([sums, np.where(floor, (problem.d - load) / unit, -np.inf)])
        lp.row_upper_ = np.concatenate([sums, (problem.c - load) / unit])
        values = np.concatenate(entry)
        lp.a_matrix_.format_ = hp.MatrixFormat.kColwise
        lp.a_matrix_.start_ = np.append(np.concatenate(start), len(values)).astype(np.int32)
        lp.a_matrix_.index_ = np.concatenate(index).astype(np.int32)
        lp.a_matrix_.value_ = values

        solver = hp.Highs()
        for name, option in OPTIONS.items():
            solver.setOptionValue(name, option)
        solver.passModel(lp)
        keys = rows * n + cols
        if self.chosen is not None:
            at_one = self.chosen[rows, cols]
            solver.setBasis(self._warm_basis(hp, keys, local, free_rows, at_one, lp))
        solver.run()
        status = solver.getModelStatus()
        if status not in (hp.HighsModelStatus.kOptimal, hp.HighsModelStatus.kInfeasible):
            # Lost its way from our basis, which is rare: again from nothing, by the dual simplex.
            solver.clearSolver()
            solver.setOptionValue('simplex_strategy', 1)
            solver.run()
            status = solver.getModelStatus()
        if status == hp.HighsModelStatus.kInfeasible:
            raise problem.infeasible()
        if status != hp.HighsModelStatus.kOptimal:
            name = solver.modelStatusToString(status)
            raise NoPlanFoundError(f'the linear relaxation was not solved: HiGHS says {name!r}')
        basis = solver.getBasis()
        column_status = np.array([int(s) for s in basis.col_status], np.int8)
        row_status = np.array([int(s) for s in basis.row_status], np.int8)
        self.basis = _Basis(
            keys, column_status[:k], free_rows, row_status[:f], column_status[k:], row_status[f:]
        )
        solution = solver.getSolution()
        x = np.array(solution.col_value)
        prices = -np.array(solution.row_dual)[f:] / unit
        return _Restricted(
            rows=np.concatenate([constant_rows, rows]),
            cols=np.concatenate([constant_cols, cols]),
            x=np.concatenate([np.ones(len(constant_rows)), x[:k]]),
            prices=np.where(floor, prices, np.maximum(prices, 0.0)),
            excess=float(np.abs(x[k:]).sum()),
        )

    def _warm_basis(
        self, hp: Any, keys: Ints, local: Ints, free_rows: Ints, at_one: Bools, lp: Any
    ) -> Any:
        """A primal feasible basis: the last one, with new rows at the constants they were."""
        basic = int(hp.HighsBasisStatus.kBasic)
        lower, upper = int(hp.HighsBasisStatus.kLower), int(hp.HighsBasisStatus.kUpper)
        columns = np.full(len(keys), lower, np.int8)
        rows = np.full(len(free_rows), lower, np.int8)
        fresh = np.ones(len(free_rows), bool)
        if self.basis is not None:
            columns[np.searchsorted(keys, self.basis.columns)] = self.basis.column_status
            old = np.searchsorted(free_rows, self.basis.rows)
            rows[old] = self.basis.row_status
            fresh[old] = False
            slacks, loads = self.basis.slack_status, self.basis.load_status
        else:
            slacks, loads = self._slack_basis(lp, basic, lower, upper)
        ones = np.flatnonzero(fresh[local] & at_one)
        columns[ones] = upper
        columns[ones[np.unique(local[ones], return_index=True)[1]]] = basic
        kinds = [hp.HighsBasisStatus(i) for i in range(5)]
        basis = hp.HighsBasis()
        basis.col_status = [kinds[i] for i in np.concatenate([columns, slacks])]
        basis.row_status = [kinds[i] for i in np.concatenate([rows, loads])]
        basis.valid = True
        return basis

    def _slack_basis(
        self, lp: Any, basic: int, lower: int, upper: int
    ) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
        """Who is basic in the load rows at the assignment the first LP starts from."""
        problem = self.problem
        assert self.chosen is not None
        load = problem.loads(*np.nonzero(self.chosen))
        spare = np.isposinf(np.asarray(lp.col_upper_)[-problem.n :])
        over, under = load > problem.c, load < problem.d
        slacks = np.full((2, problem.n), lower, np.int8)
        slacks[0, over] = basic
        slacks[1, ~over & (under | spare)] = basic
        loads = np.where(over | spare, upper, np.where(under, lower, basic)).astype(np.int8)
        loads[under & ~over] = lower
        return slacks.ravel(), loads


def _rth_largest(a: Floats, r: Ints) -> Floats:
    """The r_i-th largest entry of row i."""
    out = a.max(1)
    for k in np.unique(r[r > 1]):
        rows, n = np.flatnonzero(r == k), a.shape[1]
        out[rows] = np.partition(a[rows], n - k, axis=1)[:, n - k]
    return np.asarray(out)
