"""The relaxation at any size: the optimum of scipy's linprog, a valid bound, honest errors."""

from __future__ import annotations

import doctest
import time

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse

from mmdet_moe.planning import pricing
from mmdet_moe.planning.errors import InfeasibleError, PlanError
from mmdet_moe.planning.pricing import dual_bound, solve_transport_lp


def reference(w, s, c, r, d):
    """The same LP by scipy, over all columns."""
    m, n = w.shape
    rows = scipy.sparse.kron(scipy.sparse.eye(m), np.ones((1, n)))
    loads = scipy.sparse.hstack([scipy.sparse.diags(s[i]) for i in range(m)]).tocsr()
    open_ = ~np.isneginf(w.ravel())
    return scipy.optimize.linprog(
        -np.where(open_, w.ravel(), 0.0),
        A_ub=scipy.sparse.vstack([loads, -loads]),
        b_ub=np.concatenate([np.minimum(c, s.sum(0) + 1), -d]),
        A_eq=rows,
        b_eq=r,
        bounds=np.column_stack([np.zeros(m * n), open_]),
        method='highs',
    )


def random_problem(seed):
    """Random, heavy-tailed, tied, repeated rows, offset; copies, floors, forbidden entries."""
    g = np.random.default_rng(seed)
    n, m = int(g.integers(1, 8)), int(g.integers(1, 30))
    w = [
        lambda: g.random((m, n)),
        lambda: g.lognormal(0, 2, (m, n)),
        lambda: np.round(g.random((m, n)), 1),
        lambda: -5 + 1e-3 * g.random((m, n)),
    ][seed % 4]()
    if g.random() < 0.2:
        w = w[g.integers(0, max(1, m // 5), m)]
    if g.random() < 0.15:
        w = np.where(g.random((m, n)) < 0.1, -np.inf, w)
    s = [
        lambda: np.ones((m, n)),
        lambda: np.repeat(g.lognormal(0, 1, (m, 1)), n, 1),
        lambda: g.integers(1, 20, (m, n)).astype(float),
        lambda: np.repeat(g.pareto(1.1, (m, 1)), n, 1),
        lambda: g.integers(0, 3, (m, n)) * 1.0,
    ][int(g.integers(5))]()
    r = g.integers(1, n + 1, m) if g.random() < 0.4 else np.ones(m, int)
    c = g.choice([0.9, 1.0, 1.02, 1.1, 2.0]) * np.full(n, (s.mean(1) * r).sum() / n)
    if g.random() < 0.3:
        c = c * (g.random(n) + 0.5)
    if g.random() < 0.1:
        c[g.integers(n)] = np.inf
    d = np.zeros(n)
    if g.random() < 0.4:
        d = np.where(np.isinf(c), 1.0, c) * g.random(n) * g.choice([0.3, 0.9])
    return w, s, c, r, d


@pytest.mark.parametrize('direct', [True, False], ids=['whole', 'priced'])
def test_the_optimum_is_linprogs_and_infeasible_means_infeasible(monkeypatch, direct):
    if not direct:
        monkeypatch.setattr(pricing, 'DIRECT_COLUMNS', 0)
        monkeypatch.setattr(pricing, 'CHUNK', 7)
    solved = infeasible = 0
    for seed in range(60):
        w, s, c, r, d = random_problem(seed)
        expected = reference(w, s, c, r, d)
        try:
            found = solve_transport_lp(w, s, c, r, d)
        except InfeasibleError:
            assert expected.status == 2, seed
            infeasible += 1
            continue
        assert expected.status == 0, seed
        solved += 1
        scale = max(1e-9, np.ptp(w[np.isfinite(w)])) * r.sum()
        load = np.asarray(found.x.multiply(s).sum(0)).ravel()
        unit = np.where(np.isinf(c), 1.0, c) + s.max()
        assert found.proven, seed
        assert found.value == pytest.approx(-expected.fun, abs=1e-7 * scale), seed
        assert found.bound == pytest.approx(found.value, abs=1e-8 * scale), seed
        assert (load <= c + 1e-8 * unit).all(), seed
        assert (load >= d - 1e-8 * unit).all(), seed
        np.testing.assert_allclose(np.asarray(found.x.sum(1)).ravel(), r, atol=1e-9)
        assert found.x.data.min() >= 0 and found.x.data.max() <= 1
        assert np.isfinite(w[found.x.nonzero()]).all()
        u, v = found.capacity_duals, found.floor_duals
        assert (u >= 0).all() and (v >= 0).all()
        assert dual_bound(w, s, c, r, d, u, v) == pytest.approx(found.bound, abs=1e-9 * scale)
    assert solved >= 25 and infeasible >= 5


def test_the_bound_by_hand():
    # w = [[5, 4], [3, 0]], s = 1, c = (1, 1), r = 1, prices u = (2, 0): the capacity costs
    # 1 * 2; row 0 takes max(5 - 2, 4) = 4, row 1 takes max(3 - 2, 0) = 1: UB = 2 + 4 + 1 = 7,
    # and 7 = 4 + 3 is the optimum, row 0 giving way to row 1.
    w, one = [[5, 4], [3, 0]], np.ones((2, 2))
    assert dual_bound(w, one, [1, 1], [1, 1], [0, 0], [2, 0], [0, 0]) == 7
    found = solve_transport_lp(w, one, [1, 1])
    assert found.value == pytest.approx(7) and found.bound == pytest.approx(7)
    # Without prices every row has its best: 5 + 3 = 8. Two copies take everything: 5+4+3+0 = 12.
    assert dual_bound(w, one, [1, 1], [1, 1], [0, 0], [0, 0], [0, 0]) == 8
    assert dual_bound(w, one, [2, 2], [2, 2], [0, 0], [0, 0], [0, 0]) == 12
    # A floor of 1 on expert 1 with price v = 4: -1 * 4 + max(5, 4 + 4) + max(3, 0 + 4) = 8.
    assert dual_bound(w, one, [2, 2], [1, 1], [0, 1], [0, 0], [0, 4]) == 8


def test_any_prices_bound_any_map():
    g = np.random.default_rng(3)
    w, s = g.normal(size=(12, 4)), g.random((12, 4))
    chosen = g.integers(0, 4, 12)
    value = w[np.arange(12), chosen].sum()
    load = np.bincount(chosen, s[np.arange(12), chosen], minlength=4)
    for _ in range(20):
        u, v = g.exponential(size=4), g.exponential(size=4)
        assert dual_bound(w, s, load, np.ones(12), load, u, v) >= value - 1e-9


KINDS = ('random', 'clustered', 'few rows', 'tied', 'binary', 'heavy')


@pytest.mark.parametrize('kind', KINDS)
def test_thousands_of_rows_are_proven_in_a_moment(kind):
    g = np.random.default_rng(0)
    m, n = 3000, 32
    s = g.lognormal(size=m)
    w = g.random((m, n))
    if kind == 'clustered':
        w = w[g.integers(0, 16, m)] + 0.02 * g.standard_normal((m, n))
    elif kind == 'few rows':
        w = w[g.integers(0, 20, m)]
    elif kind == 'tied':
        w = np.round(w, 1)
    elif kind == 'binary':
        w = (w < 0.1) * 1.0
    elif kind == 'heavy':
        s = g.pareto(1.1, m)
    c = np.full(n, max(1.01 * s.sum() / n, s.max()))
    start = time.process_time()
    found = solve_transport_lp(w, s, c)
    assert time.process_time() - start < 10
    assert found.proven
    assert abs(found.bound - found.value) <= 1e-9 * abs(found.bound)
    assert (s @ found.x <= c * (1 + 1e-9)).all()
    # a basic solution: at most one fractional row per binding capacity
    assert (np.diff(found.x.indptr) > 1).sum() <= n
    # what is worth anything is in the core
    rows, cols = found.core
    core = scipy.sparse.csr_matrix((np.ones(len(rows)), (rows, cols)), shape=(m, n))
    assert core.multiply(found.x > 0).sum() == found.x.nnz


def test_copies_floors_and_demands_per_pair_at_scale():
    g = np.random.default_rng(1)
    m, n = 1500, 24
    w, s = g.random((m, n)), g.lognormal(size=(m, n))
    r = g.integers(1, 4, m)
    share = (s.mean(1) * r).sum() / n
    floor = np.where(np.arange(n) < 4, 0.9 * share, 0.0)
    found = solve_transport_lp(w, s, np.full(n, 0.93 * share), r, floor)
    assert found.proven
    assert (found.capacity_duals > 0).any() and (found.floor_duals >= 0).all()
    load = np.asarray(found.x.multiply(s).sum(0)).ravel()
    assert (load >= floor * (1 - 1e-9)).all() and (load <= 0.93 * share * (1 + 1e-9)).all()


def test_shift_and_scale_of_the_affinity_change_nothing():
    g = np.random.default_rng(5)
    w, s = g.random((800, 16)), g.lognormal(size=800)
    c = np.full(16, 1.02 * s.sum() / 16)
    plain = solve_transport_lp(w, s, c)
    small = solve_transport_lp(0.8 + 2.0**-20 * w, s, c)
    assert small.proven
    assert (small.value - 0.8 * 800) * 2.0**20 == pytest.approx(plain.value, rel=1e-6)


def test_the_same_input_gives_the_same_bytes():
    g = np.random.default_rng(6)
    w, s = np.round(g.random((2000, 16)), 1), g.lognormal(size=2000)
    c = np.full(16, 1.001 * s.sum() / 16)
    first, second = solve_transport_lp(w, s, c), solve_transport_lp(w, s, c)
    assert first.x.data.tobytes() == second.x.data.tobytes()
    assert first.capacity_duals.tobytes() == second.capacity_duals.tobytes()


@pytest.mark.parametrize(
    ('arguments', 'error', 'words'),
    [
        (
            ([[1, 2], [3, 4]], [26, 26], [20, 20]),
            InfeasibleError,
            'capacity 40 in total, demand 52',
        ),
        (
            ([[1, 2], [3, 4]], [1, 1], [5, 5], None, [2, 1]),
            InfeasibleError,
            'min_load 3 in total, demand at most 2',
        ),
        (([[1, 2]], [1], [5, 5], [3]), InfeasibleError, 'row 0 needs 3 experts but only 2'),
        (([[1, 2]], [1], [1, 1], None, [2, 0]), InfeasibleError, 'min_load 2 exceeds capacity 1'),
        # each of two copies is 2; no expert holds both rows, and one expert is closed
        (([[1, 2], [1, 2]], [2, 2], [4, 0], [2, 2]), InfeasibleError, 'demand 8'),
        (([[1, np.nan]], [1], [1, 1]), PlanError, 'affinity must be finite'),
        (([[1, 2]], [-1], [1, 1]), PlanError, 'demand must be finite and not negative'),
        (([[1, 2]], [1, 1, 1], [1, 1]), PlanError, 'demand must have shape'),
        (([[1, 2]], [1], [1, 1, 1]), PlanError, r'capacity must have shape \(2,\), got \(3,\)'),
        (([1, 2], [1], [1, 1]), PlanError, 'affinity must be a non-empty'),
    ],
)
def test_bad_input_and_the_impossible_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        solve_transport_lp(*arguments)


def test_infeasible_at_scale_is_proven_by_prices(monkeypatch):
    # Total capacity suffices, but the rows of the first half may only use one expert.
    monkeypatch.setattr(pricing, 'DIRECT_COLUMNS', 0)
    w = np.random.default_rng(0).random((200, 8))
    w[:100, 1:] = -np.inf
    with pytest.raises(InfeasibleError, match='not even a fractional assignment'):
        solve_transport_lp(w, np.ones(200), np.full(8, 60.0))


def test_single_expert_and_no_limits():
    alone = solve_transport_lp([[3.0], [4.0]], [1, 2], [3])
    assert (alone.value, alone.bound, alone.proven) == (7, 7, True)
    with pytest.raises(InfeasibleError):
        solve_transport_lp([[3.0], [4.0]], [1, 2], [2.9])
    free = solve_transport_lp([[1.0, 2.0], [5.0, 3.0]], [1, 1], np.inf)
    assert (free.value, free.bound) == (7, 7)
    assert (free.capacity_duals == 0).all()


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(pricing).failed == 0
