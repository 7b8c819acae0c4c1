"""One formulation, several builders, one proof."""

from __future__ import annotations

import numpy as np
import pytest

from mmdet_moe.planning import InfeasibleError, PlanningProblem
from mmdet_moe.planning.instance import canonical
from mmdet_moe.planning.relaxation import (
    lagrangian_bound,
    reduced_worth,
    solve_arrays,
    solve_generated,
    solve_priced,
    solve_pulp,
)


def random_instance(seed, m=20, n=5, per_pair=False, groups=False, floors=False, copies=False):
    rng = np.random.default_rng(seed)
    demand = rng.lognormal(sigma=0.5, size=(m, n) if per_pair else m)
    served = rng.integers(1, 3, size=m) if copies else np.ones(m, dtype=int)
    total = (demand.mean(axis=1) if per_pair else demand) @ served
    capacity = max(total / n * 1.2, demand.max())
    problem = PlanningProblem(
        [f'd{i:02d}' for i in range(m)],
        n,
        rng.lognormal(size=(m, n)),
        demand,
        capacity,
        min_load=capacity * 0.5 if floors else 0,
        copies=served,
        separate=[['d00', 'd01'], ['d01', 'd02', 'd03']] if groups else [],
    )
    return canonical(problem, problem.capacity)


VARIANTS = [
    {},
    {'per_pair': True},
    {'floors': True},
    {'copies': True},
    {'groups': True},
    {'per_pair': True, 'groups': True, 'floors': True, 'copies': True},
]


@pytest.mark.parametrize('variant', VARIANTS)
def test_pulp_and_arrays_and_pricing_agree(variant):
    instance = random_instance(3, **variant)
    ways = [solve_pulp(instance), solve_arrays(instance), solve_generated(instance, per_row=1)]
    if not instance.groups:
        ways.append(solve_priced(instance))
    for found in ways:
        x = found.x.toarray()
        assert (x >= 0).all() and (x <= 1).all()
        np.testing.assert_allclose(x.sum(axis=1), instance.copies, atol=1e-7)
        load = (instance.demand * x).sum(axis=0)
        assert (load <= instance.capacity * (1 + 1e-6)).all()
        assert (load >= instance.floor * (1 - 1e-6)).all()
        for group in instance.groups:
            assert (x[group].sum(axis=0) <= 1 + 1e-6).all()
        # primal and dual meet, and all ways meet each other
        assert found.bound == pytest.approx((instance.worth * x).sum(), abs=1e-7)
        assert found.bound == pytest.approx(ways[0].bound, abs=1e-7)


def test_any_prices_prove_a_bound():
    # two rows, two experts of capacity 1, worth (after shifting) [[0, -1], [0, -.5]]: the best map
    # is worth -.5. At p = (u, 0): UB = u + max(-u, -1) + max(-u, -.5)
    #   u = 0: 0;   u = .5: .5 - .5 - .5 = -.5 (tight);   u = 1: 1 - 1 - .5 = -.5;   u = 2: .5
    problem = PlanningProblem(['a', 'b'], 2, [[1, 0], [1, 0.5]], capacity=1)
    instance = canonical(problem, problem.capacity)
    for price, bound in [(0, 0), (0.5, -0.5), (1, -0.5), (2, 0.5)]:
        prices = np.array([price, 0.0])
        reduced = reduced_worth(instance, prices)
        assert lagrangian_bound(instance, reduced, prices) == pytest.approx(bound)


def test_a_demand_above_a_capacity_is_never_fractional():
    # a does not fit on e0, so it cannot lie there in part either
    problem = PlanningProblem(['a', 'b'], 2, [[1, 0], [1, 0]], [3, 1], [2, 5])
    instance = canonical(problem, problem.capacity)
    for solve in (solve_pulp, solve_arrays, solve_priced):
        np.testing.assert_allclose(solve(instance).x.toarray(), [[0, 1], [1, 0]], atol=1e-9)


@pytest.mark.parametrize('solve', [solve_pulp, solve_arrays])
def test_an_infeasible_relaxation_names_the_limits(solve):
    # both fit each expert alone and the total fits, but e1 holds only b
    problem = PlanningProblem(['a', 'b', 'c'], 2, np.zeros((3, 2)), [2, 1, 2], [3, 2], copies=1)
    assert solve(canonical(problem, problem.capacity)).bound == 0
    problem = PlanningProblem(
        ['a', 'b', 'c'], 2, np.zeros((3, 2)), [[2, 9], [2, 9], [1, 1]], [3, 2]
    )
    with pytest.raises(InfeasibleError, match="not even a fractional one.*capacity of 'e0' by 1"):
        solve(canonical(problem, problem.capacity))


def test_tiny_differences_on_an_offset_are_seen():
    # 0.8 + 1e-8 * noise: the same optimum as the noise alone
    rng = np.random.default_rng(0)
    noise = rng.random((12, 3))
    names = [f'd{i:02d}' for i in range(12)]
    bounds = []
    for affinity in (noise, 0.8 + 1e-8 * noise):
        problem = PlanningProblem(names, 3, affinity, capacity=4)
        instance = canonical(problem, problem.capacity)
        found = solve_pulp(instance)
        chosen = found.x.toarray() > 0.5
        bounds.append(noise[chosen].sum())
    assert bounds[0] == pytest.approx(bounds[1], abs=1e-6)


def test_where_all_can_have_what_they_like_no_prices_are_needed():
    # 4 levels of affinity on 16 experts: everyone has a tied best expert with room
    rng = np.random.default_rng(0)
    problem = PlanningProblem(
        [f'd{i:03d}' for i in range(200)],
        16,
        rng.integers(0, 4, size=(200, 16)),
        rng.lognormal(size=200),
        capacity=40,
    )
    instance = canonical(problem, problem.capacity)
    found = solve_priced(instance)
    assert found.bound == 0 and not found.price.any()
    assert instance.is_strict(found.x.toarray() > 0)
