"""The plan file: schema 1, written atomically, read strictly."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from mmdet_moe.planning import ExpertPlan, PlanError, PlanningProblem, plan_experts
from mmdet_moe.planning.table import plan_table, summary_line


@pytest.fixture(scope='module')
def plan() -> ExpertPlan:
    affinity = [[1, 0.5, 0], [0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]]
    return plan_experts(PlanningProblem(list('abcd'), 3, affinity, copies=[1, 1, 1, 2], capacity=2))


def test_a_plan_goes_round_byte_for_byte(plan, tmp_path):
    path = tmp_path / 'new' / 'plan.json'
    plan.save(path)
    again = ExpertPlan.load(path)
    assert again.to_dict() == plan.to_dict()
    again.save(tmp_path / 'again.json')
    assert path.read_bytes() == (tmp_path / 'again.json').read_bytes()
    assert json.loads(path.read_text())['schema'] == 1
    assert [p.name for p in path.parent.iterdir()] == ['plan.json']  # no temporary left


def test_a_failed_write_leaves_the_old_file(plan, tmp_path, monkeypatch):
    path = tmp_path / 'plan.json'
    path.write_text('old')

    def fail(*_):
        raise OSError('disk full')

    monkeypatch.setattr('os.replace', fail)
    with pytest.raises(OSError, match='disk full'):
        plan.save(path)
    assert path.read_text() == 'old'
    assert [p.name for p in tmp_path.iterdir()] == ['plan.json']


def test_weights_and_loads(plan):
    # d has two copies, each with weight 1/2; its load counts on both experts
    weights = plan.weights_matrix()
    assert weights.shape == (4, 3)
    assert weights.sum(axis=1).tolist() == [1, 1, 1, 1]
    assert plan.experts_of('d') == {'e0': 0.5, 'e2': 0.5}
    assert plan.loads().tolist() == [2, 1, 2]
    assert plan.certificate['loads'] == [2, 1, 2]
    with pytest.raises(KeyError, match='no dataset .z.; it has a, b, c, d'):
        plan.experts_of('z')


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (lambda d: d.update(schema=2), 'schema 2; this version reads 1'),
        (lambda d: d.pop('capacity'), "plan lacks 'capacity'"),
        (lambda d: d.update(extra=1), "key 'extra' is unknown"),
        (lambda d: d['assignment'].pop('a'), 'assignment lacks a'),
        (lambda d: d['assignment'].update(z={'e0': 1.0}), "assignment: dataset 'z' is unknown"),
        (lambda d: d['assignment'].update(a={'e9': 1.0}), "expert 'e9' is unknown"),
        (lambda d: d['assignment'].update(a={'e0': 0.9}), 'weights sum to 0.9, not to 1'),
        (
            lambda d: d['assignment'].update(a={'e0': 0.5, 'e1': 0.5}),
            'has 2 experts, copies says 1',
        ),
        (lambda d: d['assignment'].update(a={'e0': -1.0}), "of 'a' at 'e0' must be at least 0"),
        (lambda d: d['assignment'].update(a={'e0': float('nan')}), 'must be finite, got nan'),
        (lambda d: d['assignment'].update(a=3), "assignment of 'a' must map experts"),
        (lambda d: d['fractional'].update(a={'e0': 0.5}), "fractional of 'a' sums to 0.5"),
        (lambda d: d['affinity'].pop(), 'affinity has 3 rows for 4 datasets'),
        (lambda d: d['demand'].append(1), 'demand has 5 entries for 4 datasets'),
        (lambda d: d.update(capacity=[0.5, 2, 2]), "expert 'e0' carries 2, its capacity is 0.5"),
        (lambda d: d['certificate'].pop('gap'), "certificate lacks 'gap'"),
        (
            lambda d: d['certificate'].update(value=float('inf')),
            'certificate: value must be finite',
        ),
        (
            lambda d: d['certificate'].update(stopped='bored'),
            "must be 'optimal', 'nodes' or 'time'",
        ),
        (lambda d: d['certificate'].update(loads=[1]), 'loads has 1 entries for 3 experts'),
        (lambda d: d['certificate'].update(optimal='yes'), 'optimal must be true or false'),
        (lambda d: d.update(prototypes={'mean': {}}), "prototypes lacks 'embedder'"),
        (lambda d: d.update(fingerprint=None), 'fingerprint must be a string'),
    ],
)
def test_a_spoilt_plan_is_refused_with_the_reason(plan, spoil, message):
    data = copy.deepcopy(plan.to_dict())
    spoil(data)
    with pytest.raises(PlanError, match=message):
        ExpertPlan.from_dict(data)


def test_prototypes_are_checked_by_name_and_length(plan):
    data = copy.deepcopy(plan.to_dict())
    data['prototypes'] = {
        'embedder': {'type': 'FrozenEmbedder'},
        'dimension': 2,
        'mean': {name: [1.0, 0.0] for name in 'abcd'},
        'concentration': 10.0,
    }
    assert ExpertPlan.from_dict(data).prototypes['dimension'] == 2
    for change, message in [
        ({'mean': {name: [1.0, 0.0] for name in 'abc'}}, 'mean lacks d'),
        ({'mean': {name: [1.0] for name in 'abcd'}}, "mean of 'a' must be a list of 2 numbers"),
        ({'concentration': 0}, 'concentration must be positive'),
    ]:
        spoilt = {**data, 'prototypes': {**data['prototypes'], **change}}
        with pytest.raises(PlanError, match=message):
            ExpertPlan.from_dict(spoilt)


def test_load_names_the_file(tmp_path):
    path = tmp_path / 'bad.json'
    path.write_text('{"schema": 1}')
    with pytest.raises(PlanError, match=r'bad\.json: plan lacks'):
        ExpertPlan.load(path)
    with pytest.raises(PlanError, match='cannot read plan file'):
        ExpertPlan.load(tmp_path / 'none.json')


def test_a_map_by_hand_is_a_plan():
    plan = ExpertPlan.from_assignment(
        {'kitti': 'e0', 'lisa': 'e0', 'coco': {'e0': 0.25, 'e1': 0.75}}
    )
    assert plan.experts == ('e0', 'e1')
    np.testing.assert_allclose(plan.weights_matrix(), [[1, 0], [1, 0], [0.25, 0.75]])
    assert not plan.certificate['optimal']
    assert ExpertPlan.from_dict(plan.to_dict()).to_dict() == plan.to_dict()


def test_the_table_says_who_serves_whom_and_how_full(plan):
    text = plan_table(plan)
    assert 'e0 x 0.5, e2 x 0.5' in text
    assert '100%' in text and '50%' in text
    assert text.endswith(summary_line(plan))
    assert 'gap 0 (optimal)' in summary_line(plan)
