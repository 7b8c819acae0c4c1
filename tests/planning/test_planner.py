"""What plan_experts promises: strict, complete, proven where it says so, the same every time."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdet_moe.planning import (
    ExpertPlan,
    InfeasibleError,
    NoPlanFoundError,
    PlanError,
    PlanningProblem,
    plan_experts,
)
from mmdet_moe.planning.certificate import worth_of
from mmdet_moe.planning.instance import canonical
from mmdet_moe.planning.planner import default_capacities
from mmdet_moe.planning.polish import Losses, solve_core
from mmdet_moe.planning.relaxation import solve_arrays
from mmdet_moe.planning.repair import construct, improve, repair
from mmdet_moe.planning.solver import Clock


def names(count):
    return [f'd{i:03d}' for i in range(count)]


def lognormal(m, n, seed, slack=1.15, **options):
    rng = np.random.default_rng(seed)
    demand = rng.lognormal(sigma=0.6, size=m)
    capacity = max(demand.sum() / n * slack, demand.max())
    options = {'demand': demand, 'capacity': capacity, **options}
    return PlanningProblem(names(m), n, rng.lognormal(size=(m, n)), **options)


def brute_force(problem):
    """The best net value over all maps that keep every limit, or None."""
    m, n = problem.affinity.shape
    best = None
    sets = [list(itertools.combinations(range(n), int(r))) for r in problem.copies]
    index = {name: i for i, name in enumerate(problem.datasets)}
    for picks in itertools.product(*sets):
        chosen = np.zeros((m, n), dtype=bool)
        for i, pick in enumerate(picks):
            chosen[i, list(pick)] = True
        loads = (problem.demand * chosen).sum(axis=0)
        if (loads > problem.capacity * (1 + 1e-9)).any():
            continue
        if (loads < problem.min_load * (1 - 1e-9)).any():
            continue
        if any((chosen[[index[x] for x in g]].sum(axis=0) > 1).any() for g in problem.separate):
            continue
        members = [chosen[[index[name] for name in group]] for group in problem.together]
        if any((rows != rows[0]).any() for rows in members):
            continue
        value = worth_of(problem, chosen)[0]
        best = value if best is None else max(best, value)
    return best


def check_plan(problem, plan):
    """Everything a plan promises, from its own dict."""
    chosen = plan.weights_matrix() > 0
    assert list(plan.datasets) == list(problem.datasets)
    assert (chosen.sum(axis=1) == problem.copies).all()
    capacity = plan.capacity if problem.capacity is None else problem.capacity
    for j in range(len(plan.experts)):
        load = math.fsum(problem.demand[chosen[:, j], j])
        assert load <= capacity[j] * (1 + 1e-9)
        assert load >= problem.min_load[j] * (1 - 1e-9)
        assert load == plan.certificate['loads'][j]
    for group in problem.separate:
        taken = [set(plan.assignment[name]) for name in group]
        assert sum(map(len, taken)) == len(set().union(*taken))
    for group in problem.together:
        assert len({frozenset(plan.assignment[name]) for name in group}) == 1
    proof = plan.certificate
    assert proof['value'] == worth_of(problem, chosen)[0]
    assert proof['value'] <= proof['upper_bound'] <= proof['lp_bound']
    assert proof['optimal'] == (proof['stopped'] == 'optimal')
    assert ExpertPlan.from_dict(json.loads(json.dumps(plan.to_dict()))).to_dict() == plan.to_dict()


# ---------------------------------------------------------------------- right answers
def test_the_papers_counter_example_is_solved():
    problem = PlanningProblem(['a', 'b', 'c'], 2, [[1, 0], [1, 0], [0, 1]], capacity=2)
    plan = plan_experts(problem)
    assert plan.assignment == {'a': {'e0': 1.0}, 'b': {'e0': 1.0}, 'c': {'e1': 1.0}}
    assert plan.certificate['value'] == plan.certificate['upper_bound'] == 3
    assert plan.certificate['gap'] == 0 and plan.certificate['optimal']
    printed = plan_experts(problem, rounding='printed')
    assert 'printed' in printed.certificate['method']
    check_plan(problem, printed)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_small_problems_of_every_kind_are_solved_as_by_brute_force(seed):
    rng = np.random.default_rng(seed)
    m, n = int(rng.integers(1, 6)), int(rng.integers(1, 4))
    demand = rng.choice([0.5, 1.0, 1.5, 2.0], size=(m, n) if rng.random() < 0.5 else m)
    copies = rng.integers(1, n + 1, size=m) if rng.random() < 0.4 else np.ones(m, dtype=int)
    options = {'demand': demand, 'copies': copies}
    if m >= 2 and rng.random() < 0.3:
        options['separate'] = [['d000', 'd001']]
    if m >= 4 and rng.random() < 0.3 and copies[2] == copies[3]:
        options['together'] = [['d002', 'd003']]
    options['capacity'] = rng.choice([2.0, 3.0, 4.5, 6.0], size=n)
    if rng.random() < 0.3:
        options['min_load'] = rng.choice([0.0, 0.5, 1.0], size=n)
    if rng.random() < 0.3:
        old = {name: ['e0'] for name in names(m)[:2]}
        options['previous'] = ExpertPlan.from_assignment(old, experts=n)
        options['move_penalty'] = float(rng.choice([0.1, 1.0]))
    offset = rng.choice([0.0, 100.0, -100.0])
    problem = PlanningProblem(names(m), n, offset + rng.normal(size=(m, n)), **options)
    best = brute_force(problem)
    if best is None:
        with pytest.raises(InfeasibleError):
            plan_experts(problem)
        return
    plan = plan_experts(problem)
    check_plan(problem, plan)
    assert plan.certificate['optimal']
    assert plan.certificate['value'] == pytest.approx(best, abs=1e-7)


@pytest.mark.parametrize('scale', [(0.8, 1e-8), (-1e6, 1.0), (0, 1e12)])
def test_offset_and_scale_of_the_affinity_change_no_map(scale):
    offset, factor = scale
    problem = lognormal(12, 4, 1)
    plain = plan_experts(problem)
    turned = plan_experts(
        PlanningProblem(
            problem.datasets,
            problem.experts,
            offset + factor * problem.affinity,
            problem.demand,
            problem.capacity,
        )
    )
    assert plain.certificate['optimal'] and turned.certificate['optimal']
    assert turned.assignment == plain.assignment


def test_a_load_that_a_solver_tolerates_is_refused():
    # 0.5 + 0.5000005 = 1.0000005 > 1, which HiGHS takes for 1; the worthier pair must be split
    problem = PlanningProblem(['a', 'b'], 2, [[1, 0], [1, 0.5]], [0.5, 0.5000005], 1.0)
    plan = plan_experts(problem)
    assert plan.assignment == {'a': {'e0': 1.0}, 'b': {'e1': 1.0}}
    assert plan.certificate['optimal']
    # and 0.1 + 0.2 > 0.3 by one bit only is accepted
    problem = PlanningProblem(['a', 'b'], 2, [[1, 0], [1, 0.5]], [0.1, 0.2], 0.3)
    assert plan_experts(problem).certificate['value'] == 2


def test_medium_problems_are_proven_optimal():
    for seed in range(2):
        problem = lognormal(40, 8, seed)
        plan = plan_experts(problem)
        check_plan(problem, plan)
        assert plan.certificate['optimal']


def test_exact_without_a_capacity_spends_its_time_on_the_first_that_holds():
    # 9.1 over 2 experts: 4.55. Three rows of 3 and more need an expert of 6: 1.35 x 4.55 = 6.1425.
    problem = PlanningProblem(list('abc'), 2, [[1, 0], [1, 0], [0, 1]], [3, 3, 3.1])
    plan = plan_experts(problem, exact=True, time_limit=60)
    assert plan.certificate['optimal']
    assert plan.capacity == pytest.approx([6.1425, 6.1425])


def test_exact_proves_or_says_it_could_not():
    problem = lognormal(60, 45, 0)
    plan = plan_experts(problem, exact=True, time_limit=60)
    check_plan(problem, plan)
    assert plan.certificate['stopped'] in ('optimal', 'time')
    with pytest.raises(PlanError, match="exact=True needs rounding='hierarchical'"):
        plan_experts(problem, exact=True, rounding='printed')


# ---------------------------------------------------------------------- no map
def test_lp_feasible_but_no_map():
    # 3 demands of 2 on two experts of 3: 6 <= 6, but two of them never share an expert
    problem = PlanningProblem(list('abc'), 2, np.ones((3, 2)), 2, 3)
    with pytest.raises(InfeasibleError, match='LP-feasible, but no map exists'):
        plan_experts(problem)


def test_totals_that_do_not_fit_are_said():
    problem = PlanningProblem(names(13), 4, np.ones((13, 4)), 4, 10)
    with pytest.raises(InfeasibleError, match='capacity 40 in total, demand 52'):
        plan_experts(problem)


def test_out_of_time_is_not_infeasible():
    with pytest.raises(NoPlanFoundError, match='no map found'):
        plan_experts(lognormal(60, 20, 0, slack=1.001), time_limit=1e-6)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'time_limit': 0}, 'time_limit must be positive'),
        ({'time_limit': float('nan')}, 'time_limit must be finite'),
        ({'seed': -1}, 'seed must be at least 0'),
        ({'rounding': 'up'}, "rounding must be one of hierarchical, printed, got 'up'"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        plan_experts(lognormal(5, 2, 0), **options)


# ---------------------------------------------------------------------- default capacity
def test_the_default_capacity_of_unit_demands_is_the_even_share_rounded_up():
    # 5 datasets, one with 2 copies: ceil(6 / 4) = 2
    problem = PlanningProblem(names(5), 4, np.ones((5, 4)), copies=[1, 1, 1, 1, 2])
    assert plan_experts(problem).capacity.tolist() == [2] * 4


def test_the_default_capacity_of_weighted_demands_is_the_first_with_a_map():
    # even share 12 / 2 = 6, largest 4 -> 6 x 1.10 = 6.6: {4, 2} and {3, 3} fit
    problem = PlanningProblem(names(4), 2, np.ones((4, 2)), [4, 3, 3, 2])
    assert plan_experts(problem).capacity == pytest.approx([6.6, 6.6])
    # three of 2 on two experts: the share is 3; 3.3, 3.45, ... hold one each, 4.05 the first two
    problem = PlanningProblem(names(3), 2, np.ones((3, 2)), [2, 2, 2.0001])
    plan = plan_experts(problem)
    factor = plan.capacity[0] / (6.0001 / 2)
    assert factor == pytest.approx(1.35) and plan.capacity[0] >= 4
    tried = itertools.islice(default_capacities(problem), 3)
    first = [capacity[0] for capacity, _ in tried]
    assert first == pytest.approx([3.00005 * f for f in (1.10, 1.15, 1.20)])


def test_the_default_capacity_gives_up_where_capacity_is_not_the_matter():
    problem = PlanningProblem(
        names(3), 2, np.ones((3, 2)), [1, 2, 3], separate=[['d000', 'd001', 'd002']]
    )
    with pytest.raises(InfeasibleError, match='separate'):
        plan_experts(problem)


# ---------------------------------------------------------------------- planning again
def test_a_newcomer_moves_as_little_as_pays_and_every_move_is_reported():
    # e0 is full with a and b (capacity 2); the newcomer c is worth 3 there and 0 on e1, so one of
    # them must leave: a loses 1, b loses 2
    previous = plan_experts(PlanningProblem(['a', 'b'], 2, [[1, 0], [2, 0]], capacity=2))
    problem = PlanningProblem(
        ['a', 'b', 'c'],
        2,
        [[1, 0], [2, 0], [3, 0]],
        capacity=2,
        previous=previous,
        move_penalty=0.5,
    )
    plan = plan_experts(problem)
    assert plan.assignment == {'a': {'e1': 1.0}, 'b': {'e0': 1.0}, 'c': {'e0': 1.0}}
    assert plan.certificate['moves'] == [
        {'dataset': 'a', 'from': ['e0'], 'to': ['e1'], 'gain': -1.0, 'cost': 0.5}
    ]
    # worth 0 + 2 + 3, less the penalty of one move
    assert plan.certificate['move_cost'] == 0.5
    assert plan.certificate['value'] == 4.5
    # where a move costs more than the 2 it gains (5 against 3), nobody moves
    problem.move_penalty = 2.5
    stay = plan_experts(problem)
    assert stay.assignment['a'] == stay.assignment['b'] == {'e0': 1.0}
    assert stay.certificate['moves'] == [] and stay.certificate['move_cost'] == 0


def test_among_equal_maps_nothing_moves_although_moving_costs_nothing():
    # Every map of two datasets to an expert is worth 4; two datasets fit on each.
    names = ['a', 'b', 'c', 'd']
    for old in ('e0 e1 e0 e1', 'e1 e0 e0 e1', 'e1 e1 e0 e0'):
        previous = ExpertPlan.from_assignment(
            dict(zip(names, old.split(), strict=True)), experts=['e0', 'e1']
        )
        problem = PlanningProblem(names, 2, np.ones((4, 2)), capacity=2, previous=previous)
        plan = plan_experts(problem)
        assert plan.certificate['moves'] == [] and plan.certificate['optimal']
    # c gains by moving to e1, and one of e1's must make room: that is one move more, not three.
    better = np.ones((4, 2))
    better[2] = [0, 1]
    plan = plan_experts(PlanningProblem(names, 2, better, capacity=2, previous=previous))
    assert plan.certificate['value'] == 4
    assert len(plan.certificate['moves']) == 2


def test_a_lost_expert_moves_its_datasets():
    previous = ExpertPlan.from_assignment({'a': 'old', 'b': 'e0'}, experts=['old', 'e0'])
    problem = PlanningProblem(['a', 'b'], ['e0', 'e1'], [[0, 1], [0, 1]], previous=previous)
    problem.move_penalty = 5.0
    plan = plan_experts(problem)
    assert plan.assignment == {'a': {'e1': 1.0}, 'b': {'e0': 1.0}}
    assert [(m['dataset'], m['gain']) for m in plan.certificate['moves']] == [('a', None)]


# ---------------------------------------------------------------------- the same every time
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_the_map_does_not_depend_on_the_order_of_listing(seed):
    rng = np.random.default_rng(seed)
    m, n = 8, 3
    affinity = rng.integers(0, 3, size=(m, n)).astype(float)  # many ties
    demand = rng.integers(1, 4, size=m).astype(float)
    problem = PlanningProblem(names(m), n, affinity, demand)
    rows, columns = rng.permutation(m), rng.permutation(n)
    turned = PlanningProblem(
        [problem.datasets[i] for i in rows],
        [problem.experts[j] for j in columns],
        affinity[np.ix_(rows, columns)],
        demand[rows],
    )
    a, b = plan_experts(problem), plan_experts(turned)
    assert a.assignment == b.assignment
    assert a.fractional == b.fractional
    assert a.fingerprint == b.fingerprint
    assert a.certificate['value'] == b.certificate['value']
    assert list(b.datasets) == [problem.datasets[i] for i in rows]


def test_the_same_input_gives_the_same_bytes_but_for_the_seconds():
    texts = set()
    for _ in range(2):
        data = plan_experts(lognormal(50, 10, 4), seed=3).to_dict()
        assert data['certificate']['stopped'] != 'time'
        data['certificate'].pop('seconds')
        texts.add(json.dumps(data))
    assert len(texts) == 1


# ---------------------------------------------------------------------- the steps
def test_repair_reaches_strict_capacity_by_shifts_and_swaps():
    # e0 holds 3 + 3 of 5: only the swap of a 3 with the 2 on e1 (3 + 2, 3 + 2) is strict
    problem = PlanningProblem(list('abcd'), 2, [[1, 0]] * 4, [3, 3, 2, 2], 5)
    instance = canonical(problem, problem.capacity)
    start = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], dtype=bool)
    fixed, strict = repair(instance, start)
    assert strict and instance.is_strict(fixed)


def test_repair_restores_floors_and_separations():
    problem = PlanningProblem(
        list('abcd'), 2, [[1, 0]] * 4, capacity=3, min_load=1, separate=[['a', 'b']]
    )
    instance = canonical(problem, problem.capacity)
    start = np.array([[1, 0]] * 4, dtype=bool)
    fixed, strict = repair(instance, start)
    assert strict and instance.is_strict(fixed)


def test_improve_climbs_by_shifts_swaps_and_kicks_and_stays_strict():
    # both rows sit on the expert the other one wants, and neither expert has room for two
    problem = PlanningProblem(['a', 'b'], 2, [[0, 1], [1, 0]], capacity=1)
    instance = canonical(problem, problem.capacity)
    start = np.array([[1, 0], [0, 1]], dtype=bool)
    better = improve(instance, start, instance.worth, 0.0, kicks=0, seed=0)
    assert better.tolist() == [[False, True], [True, False]]
    problem = lognormal(60, 8, 0, slack=1.05, copies=[1, 2] * 30, capacity=1e9)
    problem.capacity = np.full(8, float((problem.demand[:, 0] * problem.copies).sum()) / 8 * 1.05)
    instance = canonical(problem, problem.capacity)
    found = solve_arrays(instance)
    start = construct(instance, found.reduced)
    values = [instance.value(start)]
    for kicks in (0, 60):
        chosen = improve(instance, start, found.reduced, found.bound, kicks, seed=0)
        assert instance.is_strict(chosen)
        values.append(instance.value(chosen))
    assert values[0] < values[1] < values[2] <= found.bound


def test_construct_places_the_big_ones_first():
    problem = PlanningProblem(list('abc'), 2, [[1, 0], [1, 0], [1, 0]], [1, 1, 2], 2)
    instance = canonical(problem, problem.capacity)
    chosen = construct(instance, instance.worth)
    assert chosen.tolist() == [[False, True], [False, True], [True, False]]


def test_cores_hold_every_decision_below_their_threshold():
    # losses of leaving the best: row 0: .5 and 1; refusing the best costs the same .5
    reduced = np.array([[0.0, -0.5, -1.0], [-2.0, 0.0, -0.25]])
    assert Losses(reduced, np.array([1, 1])).loss.tolist() == [[0.5, 0.5, 1.0], [2.0, 0.25, 0.25]]
    # two copies: row 0 keeps 0 and -.5, refusing them costs 1 and .5, taking the third .5;
    # row 1 keeps 0 and -.25, refusing them costs 2 and 1.75, taking the third 1.75
    assert Losses(reduced, np.array([2, 2])).loss.tolist() == [[1.0, 0.5, 0.5], [1.75, 2.0, 1.75]]
    # three copies of three: nothing can be refused
    assert np.isinf(Losses(reduced, np.array([3, 1])).loss[0]).all()
    problem = lognormal(30, 6, 0)
    instance = canonical(problem, problem.capacity)
    found = solve_arrays(instance)
    losses = Losses(found.reduced, instance.copies)
    core, threshold = losses.core_of_size(40, instance.demand)
    assert 0 < losses.free(core) <= 40
    assert (core == losses.core(threshold)).all()
    # the bound of a complete core holds for the whole problem
    answer = solve_core(instance, core, start=None, nodes=None, clock=Clock(60), seed=0)
    whole = solve_core(instance, instance.allowed, start=None, nodes=None, clock=Clock(60), seed=0)
    best = instance.value(whole.chosen)
    assert best <= max(answer.bound, found.bound - threshold) + 1e-9


def test_large_problems_go_through_cores_and_stay_strict():
    # 150 x 20 = 3000 columns: more than are solved whole
    problem = lognormal(150, 20, 0, slack=1.3)
    plan = plan_experts(problem)
    check_plan(problem, plan)
    assert plan.certificate['gap'] < 0.01
    # tied affinities: no threshold separates the columns
    rng = np.random.default_rng(0)
    tied = PlanningProblem(
        names(150), 20, rng.integers(0, 3, (150, 20)), rng.lognormal(size=150, sigma=0.5)
    )
    check_plan(tied, plan_experts(tied))


# ---------------------------------------------------------------------- the storey
def test_planning_runs_where_torch_is_absent():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        'from mmdet_moe.planning import PlanningProblem, plan_experts\n'
        "problem = PlanningProblem(['a', 'b'], 2, [[1, 0], [1, 0]], [1, 2])\n"
        "print(plan_experts(problem).certificate['value'])\n"
        "bad = [m for m in ('mmengine', 'mmcv', 'mmdet', 'torchvision') if m in sys.modules]\n"
        'assert not bad, bad\n'
        "assert sys.modules['torch'] is None\n"
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # even share 1.5 and largest 2: capacity 2.2, so one of them leaves e0
    assert done.stdout.strip() == '1.0'
