"""The command: exit codes, one line, nothing written unless it succeeded."""

from __future__ import annotations

import json

import pytest

from mmdet_moe.planning import ExpertPlan
from mmdet_moe.planning.cli import main

# 40 different demands that fill five experts to 99.9 %: not solved in a nanosecond
TIGHT = {
    'datasets': [f'd{i}' for i in range(40)],
    'experts': 5,
    'affinity': [[(7 * i + 3 * j * j) % 11 for j in range(5)] for i in range(40)],
    'demand': [1 + (i * i % 17) / 7 for i in range(40)],
    'capacity': sum(1 + (i * i % 17) / 7 for i in range(40)) / 5 * 1.001,
}
GOOD = {'datasets': ['a', 'b', 'c'], 'experts': 2, 'affinity': [[1, 0], [1, 0], [0, 1]]}


def run(tmp_path, capsys, problem, *options):
    path, out = tmp_path / 'problem.json', tmp_path / 'plan.json'
    path.write_text(problem if isinstance(problem, str) else json.dumps(problem))
    code = main(['--problem', str(path), '--out', str(out), *options])
    captured = capsys.readouterr()
    return code, captured.out, captured.err, out


def test_success_writes_the_plan_and_says_one_line(tmp_path, capsys):
    code, out, err, path = run(tmp_path, capsys, GOOD)
    assert code == 0 and err == ''
    assert out == 'value 3  bound 3  gap 0 (optimal)  loads 100% 50% of capacity\n'
    assert ExpertPlan.load(path).assignment['c'] == {'e1': 1.0}


def test_options_reach_the_planner(tmp_path, capsys):
    options = ['--exact', '--seed', '5', '--time-limit', '30', '--table', '--verbose']
    code, out, err, path = run(tmp_path, capsys, GOOD, *options)
    assert code == 0
    assert 'dataset' in out and out.endswith('of capacity\n')
    assert 'relaxation of 3 rows x 2 experts' in err
    assert ExpertPlan.load(path).certificate['seed'] == 5
    code, _, _, path = run(tmp_path, capsys, GOOD, '--rounding', 'printed')
    assert code == 0 and 'printed' in ExpertPlan.load(path).certificate['method']


@pytest.mark.parametrize(
    ('problem', 'options', 'code', 'message'),
    [
        ('{', [], 2, 'is not JSON'),
        ('[1]', [], 2, 'must be a JSON object'),
        (
            '{"datasets": ["a"], "experts": 1, "affinity": [[NaN]]}',
            [],
            2,
            "affinity of 'a' at 'e0' must be finite, got nan",
        ),
        ({**GOOD, 'capacity': 1}, [], 2, 'capacity 2 in total, demand 3'),
        ({**GOOD, 'demand': 2, 'capacity': 3}, [], 2, 'LP-feasible, but no map exists'),
        (GOOD, ['--seed', '-1'], 2, 'seed must be at least 0'),
        (GOOD, ['--exact', '--rounding', 'printed'], 2, 'exact=True needs'),
        (TIGHT, ['--time-limit', '1e-9'], 3, 'no map found'),
    ],
)
def test_failures_are_one_line_and_write_nothing(tmp_path, capsys, problem, options, code, message):
    got, out, err, path = run(tmp_path, capsys, problem, *options)
    assert got == code
    assert message in err and err.count('\n') == 1 and out == ''
    assert not path.exists()
    assert [p.name for p in tmp_path.iterdir()] == ['problem.json']


def test_an_old_plan_survives_a_failure(tmp_path, capsys):
    run(tmp_path, capsys, GOOD)
    before = (tmp_path / 'plan.json').read_bytes()
    code, *_ = run(tmp_path, capsys, {**GOOD, 'capacity': 1})
    assert code == 2
    assert (tmp_path / 'plan.json').read_bytes() == before


@pytest.mark.parametrize('argv', [[], ['--problem', 'x'], ['--problem', 'x', '--out'], ['--what']])
def test_bad_arguments_exit_2_in_one_line(argv, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err.count('\n') == 1


def test_an_unwritable_target_exits_2(tmp_path, capsys):
    (tmp_path / 'plan.json').mkdir()
    code, _, err, _ = run(tmp_path, capsys, GOOD)
    assert code == 2 and 'cannot write' in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ['plan.json', 'problem.json']
