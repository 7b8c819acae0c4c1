"""Hierarchical rounding keeps its promises; the printed algorithm does not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from mmdet_moe.planning import PlanningProblem
from mmdet_moe.planning.instance import canonical
from mmdet_moe.planning.plan import exact_loads
from mmdet_moe.planning.printed import printed_rounding
from mmdet_moe.planning.relaxation import solve_arrays
from mmdet_moe.planning.rounding import UNIT, hierarchical_rounding, quantise


def rounded(x, worth, demand, copies=None):
    x = np.asarray(x, dtype=float)
    demand = np.broadcast_to(np.asarray(demand, dtype=float), x.shape)
    copies = np.ones(len(x), dtype=np.int64) if copies is None else np.asarray(copies)
    return hierarchical_rounding(sparse.csr_matrix(x), np.asarray(worth, float), demand, copies)


def test_the_endpoint_one_is_kept():
    # the counter-example to the printed algorithm: x* is already 0/1, every fraction bit is zero
    x = [[1, 0], [1, 0], [0, 1]]
    assert rounded(x, x, 1).tolist() == [[True, False], [True, False], [False, True]]


def test_the_printed_algorithm_drops_certain_assignments():
    # m = 3, n = 2, c = (2, 2), w = [[1, 0], [1, 0], [0, 1]]: OPT = 3, printed map empty
    x = sparse.csr_matrix(np.array([[1.0, 0], [1, 0], [0, 1]]))
    worth, demand = x.toarray(), np.ones((3, 2))
    capacity, copies = np.array([2.0, 2.0]), np.ones(3, dtype=np.int64)
    bare = printed_rounding(x, worth, demand, capacity, copies, fallback=False)
    assert not bare.any()
    full = printed_rounding(x, worth, demand, capacity, copies)
    assert worth[full].sum() == 3  # here the fallback finds it; it did all the work


def test_the_printed_algorithm_takes_the_half_bits():
    # x = 1/2 has bit 1 set at level 1: the better of the two comes first, capacity 1 each
    x = sparse.csr_matrix(np.full((2, 2), 0.5))
    worth = np.array([[3.0, 1], [2, 2]])
    chosen = printed_rounding(x, worth, np.ones((2, 2)), np.ones(2), np.ones(2, dtype=np.int64))
    assert chosen.tolist() == [[True, False], [False, True]]


def test_a_half_cycle_goes_the_better_way():
    # two rows half on each of two experts: the two maps are worth 1 + 1 and 0 + 0
    chosen = rounded([[0.5, 0.5], [0.5, 0.5]], [[0, 1], [1, 0]], 1)
    assert chosen.tolist() == [[False, True], [True, False]]


def test_units_keep_row_sums_and_never_exceed_one():
    # row 0: thirds; row 1: two copies, one almost whole. Leftover units go to the best entry
    rows = np.array([0, 0, 0, 1, 1, 1])
    values = np.array([1 / 3, 1 / 3, 1 / 3, 1 - 1e-12, 0.5, 0.5])
    units = quantise(rows, values, np.array([0.0, 5, 1, 9, 1, 2]), np.array([1, 2]))
    assert units[:3].sum() == UNIT and units[3:].sum() == 2 * UNIT
    assert units.max() <= UNIT
    assert units[1] == units[0] + 1


def test_a_row_with_two_copies_never_takes_one_expert_twice():
    # the entries straddle slots: naive slots would give row 2 both slots of one expert
    x = [[0.6, 0.4, 0], [0.6, 0, 0.4], [0.8, 0.6, 0.6], [0, 1, 1]]
    for seed in range(20):
        worth = np.random.default_rng(seed).random((4, 3))
        chosen = rounded(x, worth, [[1], [2], [3], [1]], [1, 1, 2, 2])
        assert chosen.sum(axis=1).tolist() == [1, 1, 2, 2]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_rounded_maps_keep_the_guarantee(seed, m, n, per_pair, copies, vertex):
    """value >= LP and load_j <= (load of x*)_j + max_i s_ij, for vertices and any other point."""
    rng = np.random.default_rng(seed)
    demand = rng.choice([1.0, 2.0, 3.5], size=(m, n)) if per_pair else rng.random((m, 1))
    demand = np.broadcast_to(demand, (m, n)).copy()
    served = rng.integers(1, n + 1, size=m) if copies else np.ones(m, dtype=np.int64)
    worth = rng.normal(size=(m, n))
    if vertex:
        most = np.sort(demand, axis=1)[:, ::-1]
        total = sum(row[:r].sum() for row, r in zip(most, served, strict=True))
        problem = PlanningProblem(
            [f'd{i:02d}' for i in range(m)], n, worth, demand, total, copies=served
        )
        instance = canonical(problem, problem.capacity)
        instance.capacity[:] = max(total / n * 1.05, demand.max())
        x = solve_arrays_or_none(instance)
        if x is None:
            return
        worth = instance.worth
    else:  # a random point: rows of weights in [0, 1] that sum to the copies
        x = rng.random((m, n))
        for i, r in enumerate(served):
            taken = rng.permutation(n)[:r]
            x[i] = 0.5 * (np.isin(np.arange(n), taken)) + 0.5 * r / n
    chosen = rounded(x, worth, demand, served)
    assert (chosen.sum(axis=1) == served).all()
    assert not chosen[x == 0].any()
    assert worth[chosen].sum() >= (worth * x).sum() - 1e-7
    loads = exact_loads(chosen, demand)
    assert (loads <= (demand * x).sum(axis=0) + demand.max(axis=0) + 1e-6).all()


def solve_arrays_or_none(instance):
    from mmdet_moe.planning import InfeasibleError

    try:
        return solve_arrays(instance).x.toarray()
    except InfeasibleError:
        return None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 5))
def test_unit_loads_end_at_the_floor_or_the_ceiling(seed, m, n):
    rng = np.random.default_rng(seed)
    x = rng.dirichlet(np.ones(n), size=m)
    chosen = rounded(x, rng.normal(size=(m, n)), 1)
    loads, target = chosen.sum(axis=0), x.sum(axis=0)
    assert (loads >= np.floor(target - 1e-6)).all()
    assert (loads <= np.ceil(target + 1e-6)).all()


@pytest.mark.parametrize('shape', [(1, 1), (1, 4), (5, 1)])
def test_degenerate_shapes(shape):
    m, n = shape
    x = np.full(shape, 1 / n)
    chosen = rounded(x, np.arange(m * n, dtype=float).reshape(shape), 1)
    assert (chosen.sum(axis=1) == 1).all()
