"""A dataset joins a plan whose map is held."""

from __future__ import annotations

import numpy as np
import pytest

from mmdet_moe.planning import ExpertPlan, InfeasibleError, PlanError, add_newcomer


def prototypes(**means):
    return dict(embedder={}, dimension=2, mean=means, concentration=1.0)


def plan(capacity=2.0):
    """a and b share e0, c is on e1, e2 is idle; means at 0, 20 and 90 degrees."""

    def at(degrees):
        angle = np.deg2rad(degrees)
        return [float(np.cos(angle)), float(np.sin(angle))]

    made = ExpertPlan.from_assignment(
        {'a': 'e0', 'b': 'e0', 'c': 'e1'},
        experts=3,
        prototypes=prototypes(a=at(0), b=at(20), c=at(90)),
    )
    made.capacity = np.full(3, capacity)
    return made


def test_newcomer_takes_the_nearest_expert_with_room_and_nobody_moves():
    before = plan(capacity=3.0)
    after = add_newcomer(before, 'd', prototypes(d=[0.0, 1.0]), demand=1)
    assert after.assignment == {**before.assignment, 'd': {'e1': 1.0}}
    # d's mean is c's: the cosine is 1, seen from wherever. e2 serves nobody: -1.
    assert after.affinity[3, 1] == pytest.approx(1.0) and after.affinity[3, 2] == -1
    assert after.certificate['loads'] == [2.0, 2.0, 0.0]
    # By hand: centre of the three means, then cosines of (0, 1) with (1, 0) and (cos 20, sin 20).
    means = np.array([[1, 0], [np.cos(np.pi / 9), np.sin(np.pi / 9)], [0, 1.0]])
    centred = means - means.mean(0)
    centred /= np.linalg.norm(centred, axis=1)[:, None]
    assert after.affinity[3, 0] == pytest.approx(max(centred[:2] @ centred[2]))
    # It is a plan like any other: it survives its file.
    again = ExpertPlan.from_dict(after.to_dict())
    assert again.assignment == after.assignment and list(again.prototypes['mean']) == list('abcd')


def test_a_full_expert_is_passed_over_and_where_all_are_full_there_is_a_new_one():
    # The nearest, e1, has room for 1 of 2; e0 is full; e2 has room for 2.
    after = add_newcomer(plan(), 'd', prototypes(d=[0.0, 1.0]), demand=2)
    assert after.assignment['d'] == {'e2': 1.0}
    after = add_newcomer(plan(), 'd', prototypes(d=[0.0, 1.0]), demand=5)
    assert after.experts == ('e0', 'e1', 'e2', 'e3') and after.assignment['d'] == {'e3': 1.0}
    assert after.capacity.tolist() == [2.0, 2.0, 2.0, 5.0]
    assert after.affinity[3, 3] == 1.0


def test_a_new_expert_or_one_by_name_can_be_asked_for():
    new = add_newcomer(plan(), 'd', prototypes(d=[0.0, 1.0]), demand=1, expert='new')
    assert new.assignment['d'] == {'e3': 1.0} and new.capacity[3] == 2.0
    named = add_newcomer(plan(), 'd', prototypes(d=[0.0, 1.0]), demand=1, expert='e2')
    assert named.assignment['d'] == {'e2': 1.0}
    with pytest.raises(InfeasibleError, match="'d' needs 1, expert 'e0' has room for 0"):
        add_newcomer(plan(), 'd', prototypes(d=[0.0, 1.0]), demand=1, expert='e0')
    with pytest.raises(PlanError, match="expert 'e7' is unknown"):
        add_newcomer(plan(), 'd', prototypes(d=[0.0, 1.0]), demand=1, expert='e7')


def test_two_newcomers_come_one_after_the_other():
    one = add_newcomer(plan(), 'd', prototypes(d=[0.0, 1.0]), demand=1, expert='new')
    two = add_newcomer(one, 'e', prototypes(e=[0.0, 1.0]), demand=1)
    assert two.experts == one.experts and two.datasets == tuple('abcde')
    assert two.assignment['e'] in ({'e1': 1.0}, {'e3': 1.0})  # both are at cosine 1


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(PlanError, match="'a' is in the earlier plan already"):
        add_newcomer(plan(), 'a', prototypes(a=[0.0, 1.0]), demand=1)
    bare = ExpertPlan.from_assignment({'a': 'e0'})
    with pytest.raises(PlanError, match='no prototypes'):
        add_newcomer(bare, 'd', prototypes(d=[0.0, 1.0]), demand=1)
    other = {**prototypes(d=[0.0]), 'dimension': 1}
    with pytest.raises(PlanError, match='use its embedder'):
        add_newcomer(plan(), 'd', other, demand=1)
