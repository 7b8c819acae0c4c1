"""Model selection and the result table, by hand."""

import json

import pytest

from mmdet_moe.evaluation.dg_selection import (
    Cell,
    Run,
    read_run,
    results_table,
    select,
    to_dict,
    to_markdown,
    to_text,
)

UNITS = [('a',), ('b',), ('c',)]


def line(step, model='last', **accuracy):
    """An evaluation: ``a=(train, val)`` is the accuracy on both parts of domain a."""
    found = {}
    for domain, (train, val) in accuracy.items():
        found.update({f'{domain}/train': train, f'{domain}/val': val})
    return dict(step=step, model=model, accuracy=found)


def run(held_out, *lines, algorithm='erm', trial=0, draw=0, dataset='D'):
    units = tuple((domain,) for domain in held_out)
    return Run(dataset, algorithm, units, trial, draw, tuple('abc'), ('train', 'val'), lines)


# Held out: a. Mean of the sources' val: step 1 (60 + 80) / 2 = 70, step 2 (90 + 70) / 2 = 80,
# step 3 (70 + 80) / 2 = 75.
FIRST = run(
    'a',
    line(1, a=(30, 35), b=(99, 60), c=(99, 80)),
    line(2, a=(40, 20), b=(99, 90), c=(99, 70)),
    line(3, a=(50, 45), b=(99, 70), c=(99, 80)),
)
# Draw 1: (70 + 70) / 2 = 70, then (82 + 80) / 2 = 81.
SECOND = run(
    'a',
    line(1, a=(10, 90), b=(99, 70), c=(99, 70)),
    line(2, a=(20, 40), b=(99, 82), c=(99, 80)),
    draw=1,
)


def test_training_domain_selection_takes_step_and_draw_by_the_sources_validation():
    choice = select('training-domain', [FIRST])
    assert (choice.step, choice.selected_by, choice.accuracy) == (2, 80, 40)
    choice = select('training-domain', [FIRST, SECOND])
    assert (choice.draw, choice.step, choice.selected_by, choice.accuracy) == (1, 2, 81, 20)


def test_the_oracle_takes_the_last_step_and_the_draw_by_the_test_domains_validation():
    choice = select('oracle', [FIRST])
    assert (choice.step, choice.selected_by, choice.accuracy) == (3, 45, 50)
    # Of draw 1 the last step's 40 counts, not the 90 before: draw 0 stays.
    assert select('oracle', [FIRST, SECOND]).draw == 0


def test_leave_one_out_takes_the_mean_over_runs_that_hold_out_one_more():
    pairs = [
        run('ab', line(1, b=(70, 0)), line(2, b=(50, 0)), line(3, b=(60, 0))),
        run('ac', line(1, c=(50, 0)), line(2, c=(60, 0)), line(3, c=(64, 0))),
    ]  # 60, 55, 62
    choice = select('leave-one-out', [FIRST], pairs, units=UNITS)
    assert (choice.step, choice.selected_by, choice.accuracy) == (3, 62, 50)
    assert select('leave-one-out', [FIRST], pairs[:1], units=UNITS) is None  # c's run is missing


def test_of_equals_the_first_counts():
    same = run('a', line(1, a=(1, 0), b=(0, 7), c=(0, 7)), line(2, a=(2, 0), b=(0, 7), c=(0, 7)))
    assert select('training-domain', [same]).step == 1


def test_with_a_test_part_it_is_what_is_reported_and_leave_one_out_selects_on_val():
    parts = ('train', 'val', 'test')
    lines = [
        dict(step=1, model='last', accuracy={'a/test': 11, 'a/val': 5, 'b/val': 70, 'c/val': 50})
    ]
    alone = Run('D', 'erm', (('a',),), 0, 0, tuple('abc'), parts, tuple(lines))
    assert select('training-domain', [alone]).accuracy == 11
    assert select('oracle', [alone]).selected_by == 5
    pairs = [Run('D', 'erm', (('a',), (o,)), 0, 0, tuple('abc'), parts, tuple(lines)) for o in 'bc']
    assert select('leave-one-out', [alone], pairs, units=UNITS).selected_by == 60


def test_a_group_is_one_column_and_counts_as_the_mean_of_its_domains():
    grouped = Run('D', 'erm', (('a', 'b'),), 0, 0, tuple('abc'), ('train', 'val'), FIRST.lines)
    choice = select('training-domain', [grouped])  # by c alone: 80, 70, 80
    assert (choice.step, choice.accuracy) == (1, (30 + 99) / 2)
    blocks, _ = results_table([grouped], {'D': [('a', 'b'), ('c',)]}, ['training-domain'])
    assert blocks[0].columns == ('a+b', 'c', 'Avg')


def one(test, accuracy, trial, **kwargs):
    """A run with one evaluation, whatever the selection."""
    values = dict.fromkeys('abc', (accuracy, accuracy))
    return run(test, line(1, **values), trial=trial, **kwargs)


def test_the_table_has_the_mean_and_standard_error_over_trials():
    runs = [one('a', 50, 0), one('a', 54, 1), one('b', 70, 0), one('b', 70, 1), one('c', 60, 0)]
    runs += [one('c', 66, 1), one('a', 40, 0, algorithm='moe')]
    blocks, chosen = results_table(runs, {'D': UNITS}, ['training-domain', 'oracle'])
    assert [block.selection for block in blocks] == ['training-domain', 'oracle']
    row = blocks[0].rows['erm']
    # a: 50, 54: deviations -2, 2; variance 8 / (2 - 1); error sqrt(8 / 2) = 2.
    assert row['a'].mean == 52 and row['a'].error == pytest.approx(2)
    assert row['b'].error == 0
    # Averages of the trials: (50 + 70 + 60) / 3 = 60, (54 + 70 + 66) / 3 = 63.333
    assert row['Avg'].values == pytest.approx((60, 190 / 3))
    assert row['Avg'].error == pytest.approx(5 / 3)
    # One trial has no error; an average over missing columns is none.
    moe = blocks[0].rows['moe']
    assert moe['a'] == Cell((40,)) and moe['a'].error is None
    assert moe['b'] is None and moe['Avg'] is None
    assert to_text(blocks[:1]) == (
        'D, training-domain selection\n'
        'Algorithm           a           b           c         Avg\n'
        'erm        52.0 ± 2.0  70.0 ± 0.0  63.0 ± 3.0  61.7 ± 1.7\n'
        'moe              40.0           –           –           –\n'
    )
    assert to_markdown(blocks[:1]).splitlines()[2:5] == [
        '| Algorithm | a | b | c | Avg |',
        '|---|---|---|---|---|',
        '| erm | 52.0 ± 2.0 | 70.0 ± 0.0 | 63.0 ± 3.0 | 61.7 ± 1.7 |',
    ]
    assert to_dict(blocks)[0]['rows']['erm']['a'] == dict(
        mean=52, error=pytest.approx(2), values=[50, 54]
    )
    assert {(c['held_out'], c['trial']) for c in chosen if c['algorithm'] == 'erm'} == {
        (domain, trial) for domain in 'abc' for trial in (0, 1)
    }


def test_several_data_sets_get_a_block_of_their_averages():
    runs = [one(d, 50, 0) for d in 'abc'] + [one(d, 70, 0, dataset='E') for d in 'abc']
    blocks, _ = results_table(runs, {'D': UNITS, 'E': UNITS}, ['oracle'])
    assert [block.dataset for block in blocks] == ['D', 'E', 'all']
    assert blocks[-1].columns == ('D', 'E', 'Avg')
    assert [blocks[-1].rows['erm'][c].mean for c in ('D', 'E', 'Avg')] == [50, 70, 60]


def test_an_averaged_model_is_a_row_of_its_own():
    values = dict(b=(0, 50), c=(0, 50))
    both = run('a', line(9, a=(40, 0), **values), line(9, model='swad', a=(45, 0), **values))
    blocks, _ = results_table([both], {'D': UNITS}, ['training-domain'])
    assert list(blocks[0].rows) == ['erm', 'erm + SWAD']
    assert [row['a'].mean for row in blocks[0].rows.values()] == [40, 45]


def test_records_of_another_run_and_unknown_selections_are_refused(tmp_path):
    path = tmp_path / 'dg_records.jsonl'
    head = dict(dataset='D', domains=['a', 'b'], held_out=['b'], trial=3, parts=['train', 'val'])
    path.write_text(json.dumps(head) + '\n' + json.dumps(line(1, a=(1, 2))) + '\n')
    assert read_run(path, 'erm', [['b']]).trial == 3
    with pytest.raises(ValueError, match='holds out .*b.*not'):
        read_run(path, 'erm', [['a']])
    with pytest.raises(ValueError, match='no records of a run'):
        read_run(tmp_path / 'none', 'erm', [['a']])
    with pytest.raises(ValueError, match="'orcale' is unknown; did you mean 'oracle'"):
        select('orcale', [FIRST])
