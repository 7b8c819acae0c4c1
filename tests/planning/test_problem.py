"""Bad input is refused with one line that names the culprit."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mmdet_moe.planning import ExpertPlan, InfeasibleError, PlanError, PlanningProblem

GOOD = {
    'datasets': ['a', 'b', 'c'],
    'experts': ['x', 'y'],
    'affinity': [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]],
}


def test_numbers_are_spread_over_the_names():
    problem = PlanningProblem(**{**GOOD, 'experts': 2}, demand=3, capacity=4, copies=2, min_load=1)
    assert problem.experts == ('e0', 'e1')
    assert problem.demand.tolist() == [[3, 3]] * 3
    assert problem.capacity.tolist() == [4, 4]
    assert problem.copies.tolist() == [2, 2, 2]
    assert problem.min_load.tolist() == [1, 1]


def test_demands_may_depend_on_the_expert():
    problem = PlanningProblem(**GOOD, demand=[[1, 2], [3, 4], [5, 6]])
    assert problem.demand.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert problem.to_dict()['demand'] == [[1, 2], [3, 4], [5, 6]]
    assert PlanningProblem(**GOOD, demand=[1, 2, 3]).to_dict()['demand'] == [1, 2, 3]


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'affinity': [[1, 0], [float('nan'), 0], [0, 1]]}, "affinity of 'b' at 'x'.*nan"),
        ({'affinity': [[1, 0], [1, float('inf')], [0, 1]]}, "affinity of 'b' at 'y'.*inf"),
        ({'affinity': [[1, 0], [1], [0, 1]]}, "affinity of 'b' has 1 entries for 2 experts"),
        ({'affinity': [[1, 0], [1, 0]]}, 'affinity has 2 rows for 3 datasets'),
        ({'affinity': [[1, 0], [1, '0'], [0, 1]]}, "affinity of 'b' at 'y' must be a number"),
        ({'affinity': [[1, 0], [1, None], [0, 1]]}, "affinity of 'b' at 'y' must be a number"),
        ({'affinity': [[1, 0], [1, 10**400], [0, 1]]}, "'b' at 'y' is too large"),
        ({'affinity': [[1e308, -1e308], [1, 0], [0, 1]]}, 'spread .* too large'),
        ({'affinity': 'a.csv'}, 'affinity must be a list of rows'),
        ({'datasets': ['a', 'b', 'a']}, "datasets lists 'a' twice"),
        ({'datasets': ['a', 'b', '']}, "datasets must be non-empty strings, got ''"),
        ({'datasets': []}, 'datasets is empty'),
        ({'experts': ['x', 'x']}, "experts lists 'x' twice"),
        ({'experts': 0}, 'experts .* at least 1, got 0'),
        ({'experts': 2.5}, 'experts .* whole number, got 2.5'),
        ({'demand': [1, -2, 3]}, "demand of 'b' must be at least 0, got -2"),
        ({'demand': [[1, 1], [1, -2], [1, 1]]}, "demand of 'b' at 'y' .* got -2"),
        ({'demand': [[1, 1], [1], [1, 1]]}, "demand of 'b' has 1 entries"),
        ({'demand': [1, 2]}, 'demand has 2 entries for 3 datasets'),
        ({'capacity': [1]}, 'capacity has 1 entries for 2 experts'),
        ({'capacity': [1, -1]}, "capacity of 'y' must be at least 0"),
        ({'capacity': float('nan')}, 'capacity must be finite'),
        ({'capacity': True}, 'capacity must be a number, got True'),
        ({'min_load': -1}, 'min_load must be at least 0'),
        ({'copies': 3}, "copies of 'a' is 3, but there are only 2 experts"),
        ({'copies': [1, 1.5, 1]}, "copies of 'b' must be a whole number, got 1.5"),
        ({'copies': [1, 0, 1]}, "copies of 'b' must be at least 1, got 0"),
        ({'separate': [['a', 'B']]}, "separate: dataset 'B' is unknown; known: a, b, c"),
        ({'together': [['a', 'a']]}, 'lists a dataset twice'),
        ({'together': [['a']]}, 'needs at least two'),
        ({'separate': ['a', 'b']}, "each group must be a list of names, got 'a'"),
        ({'separate': [['a', 'b']], 'together': [['b', 'a']]}, 'separate and together contradict'),
        (
            # a and c are together through b
            {'separate': [['a', 'c']], 'together': [['a', 'b'], ['b', 'c']]},
            "'a' and 'c' are to be kept separate and together",
        ),
        ({'together': [['a', 'b']], 'copies': [1, 2, 1]}, "'a' wants 1 copies and 'b' 2"),
        ({'previous': 'no_such_file.json'}, "previous: cannot read plan file 'no_such_file.json'"),
        ({'previous': 3}, 'previous must be a plan file'),
        ({'previous': {'schema': 7}}, 'previous: plan has schema 7'),
        ({'move_penalty': -1}, 'move_penalty must be at least 0'),
        ({'move_penalty': 'a'}, 'move_penalty must be a number'),
    ],
)
def test_bad_input_names_the_culprit(change, message):
    with pytest.raises(PlanError, match=message) as error:
        PlanningProblem(**{**GOOD, **change})
    assert '\n' not in str(error.value)


def test_misspelt_and_missing_keys_are_refused():
    with pytest.raises(PlanError, match="key 'capacities' is unknown; did you mean 'capacity'"):
        PlanningProblem.from_dict({**GOOD, 'capacities': 3})
    with pytest.raises(PlanError, match="problem lacks 'affinity'"):
        PlanningProblem.from_dict({'datasets': ['a'], 'experts': 1})
    with pytest.raises(PlanError, match='must be a JSON object, got list'):
        PlanningProblem.from_dict([1])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        # 13 datasets of 4 on 4 experts of 10: 52 against 40
        ({'capacity': [10] * 4, 'demand': 4}, 'capacity 40 in total, demand 52'),
        ({'capacity': [100] * 4, 'demand': [1] * 12 + [101]}, "'m' needs 101, more than any"),
        ({'capacity': [9, 9, 9, 90], 'demand': [1] * 12 + [10], 'copies': [1] * 12 + [2]}, '2 cop'),
        ({'capacity': 9, 'min_load': [10, 0, 0, 0]}, "'e0' must carry at least 10"),
        ({'capacity': 9, 'min_load': 4}, 'min_load 16 in total, demand 13'),
        ({'capacity': 9, 'separate': [list('abcde')]}, 'wants 5 different experts, there are 4'),
        ({'capacity': 9, 'together': [list('abcdefghij')]}, "'a' \\+ 'b' .* needs 10"),
    ],
)
def test_what_arithmetic_proves_impossible_is_said(change, message):
    rng = np.random.default_rng(0)
    problem = PlanningProblem(list('abcdefghijklm'), 4, rng.random((13, 4)), **change)
    with pytest.raises(InfeasibleError, match=message):
        problem.check_possible(problem.capacity)


def test_problem_files_go_round(tmp_path):
    previous = ExpertPlan.from_assignment({'a': 'x', 'b': 'x', 'c': 'y'})
    previous.save(tmp_path / 'old.json')
    data = {
        **GOOD,
        'demand': [1, 2, 3],
        'capacity': None,
        'separate': [['a', 'b']],
        'previous': 'old.json',  # beside the problem file
        'move_penalty': 0.5,
    }
    path = tmp_path / 'problem.json'
    path.write_text(json.dumps(data))
    problem = PlanningProblem.from_file(path)
    assert problem.previous.assignment == previous.assignment
    again = PlanningProblem.from_dict(problem.to_dict())
    assert again.fingerprint() == problem.fingerprint()
    path.write_text('{')
    with pytest.raises(PlanError, match='is not JSON'):
        PlanningProblem.from_file(path)


def test_fingerprint_sees_every_input_but_not_the_listing_order():
    base = PlanningProblem(**GOOD, separate=[['a', 'b']])
    turned = PlanningProblem(
        ['c', 'a', 'b'], ['y', 'x'], [[1, 0], [0, 1], [0, 1]], separate=[['b', 'a']]
    )
    assert turned.fingerprint() == base.fingerprint()
    old = ExpertPlan.from_assignment({'a': 'x', 'b': 'x', 'c': 'y'})
    changes = [
        {'demand': 2},
        {'capacity': 2},
        {'min_load': 0.5},
        {'copies': 2},
        {'together': [['a', 'c']]},
        {'previous': old},
        {'move_penalty': 1},
        {'affinity': [[1, 0], [1, 0], [0, 2]]},
    ]
    prints = {PlanningProblem(**{**GOOD, **change}).fingerprint() for change in changes}
    assert len(prints | {base.fingerprint()}) == len(changes) + 1
