"""The few-shot job: what it reads of the tests of others, and the table that it makes of them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / 'tools'))

import fewshot

from mmdet_moe.planning.checks import write_atomically
from mmdet_moe.visualization.shot_figure import Adapted


def test_averages_are_no_domains():
    metrics = {
        'bccd/coco/bbox_mAP': 0.5,
        'cheetah/coco/bbox_mAP': None,  # nan in the test
        'hituav/coco/bbox_mAP': -1.0,
        'bccd/unrestricted/coco/bbox_mAP': 0.4,
        'bccd/coco/bbox_mAP_50': 0.7,
        **{f'{name}/coco/bbox_mAP': 0.9 for name in ('macro', 'small', 'large')},
    }
    assert fewshot.domain_aps(metrics) == {'bccd': 0.5, 'cheetah': 0.0, 'hituav': 0.0}


def test_table_has_the_newcomer_and_what_became_of_the_others(tmp_path, capsys):
    before = {'gem': {'cheetah': 0.4, 'hituav': 0.2}}
    runs = {
        'gem': {
            '1': Adapted(0.1, {}),  # the others are tested after the last number of shots
            '5': Adapted(0.25, {'cheetah': 0.4, 'hituav': 0.1}),
            '10': Adapted(0.3, {'cheetah': 0.4, 'hituav': 0.2}),
        }
    }
    fewshot.report(tmp_path, runs, before)
    lines = (tmp_path / 'results.md').read_text().splitlines()
    # The mean of 40 and 20 is 30, of 40 and 10 it is 25; hituav lost 10.
    assert [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines[2:]] == [
        ['gem', '1', '10.0', '30.0', '', '', ''],
        ['gem', '5', '25.0', '30.0', '25.0', '-5.0', 'hituav -10.0'],
        ['gem', '10', '30.0', '30.0', '30.0', '+0.0', 'none moved'],
    ]
    content = json.loads((tmp_path / 'results.json').read_text())
    assert content['newcomer'] == 'bccd' and content['runs'][1]['old']['hituav'] == 0.1
    assert (tmp_path / 'shots.png').stat().st_size > 0
    assert 'hituav -10.0' in capsys.readouterr().out


def after(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


def test_every_model_is_adapted_to_all_shots_and_nothing_is_done_twice(tmp_path, monkeypatch):
    """With commands that do nothing but leave their files."""
    data, base, out = (tmp_path / name for name in ('data', 'base', 'out'))
    write_atomically(data / 'bccd/train.json', '{}')
    write_atomically(base / 'plan.json', '{}')
    old = {'cheetah/coco/bbox_mAP': 0.4, 'small/coco/bbox_mAP': 0.4, 'macro/coco/bbox_mAP': 0.4}
    for name in ('gem', 'dense'):
        write_atomically(base / name / 'iter_5.pth', '')
        write_atomically(base / name / 'last_checkpoint', str(base / name / 'iter_5.pth'))
        write_atomically(base / f'test-{name}/metrics.json', json.dumps({'metrics': old}))
    calls = []

    def run(self, tool, *arguments, show, env=None):
        arguments = list(arguments)
        calls.append((Path(tool).stem, arguments, env or {}))
        if 'split' in tool:
            write_atomically(out / f'train_{after(arguments, "--shots")}shot_seed0.json', '{}')
        elif 'plan' in tool:
            write_atomically(after(arguments, '--out'), '{}')
        elif 'train' in tool:
            folder = Path(after(arguments, '--work-dir'))
            write_atomically(folder / 'iter_3.pth', '')
            write_atomically(folder / 'last_checkpoint', str(folder / 'iter_3.pth'))
        else:
            found = {'bccd/coco/bbox_mAP': 0.1, **({} if '--domains' in arguments else old)}
            write_atomically(after(arguments, '--out-json'), json.dumps({'metrics': found}))

    monkeypatch.setattr(fewshot.job.Steps, 'run', run)
    monkeypatch.setattr(fewshot.job, 'devices', dict)
    command = ['--data', data, '--base', base, '--out', out, '--models', 'gem', 'dense']
    command = [*map(str, command), '--shots', '1', '5', 'all', '--steps', '3', '--old', 'last']
    assert fewshot.main(command) == 0
    tools = [tool for tool, _, _ in calls]
    assert tools == ['fewshot_split', 'fewshot_split', 'plan_experts', *['train', 'test'] * 6]
    assert [after(x, '--shots') for tool, x, _ in calls if tool == 'fewshot_split'] == ['1', '5']
    trained = [(arguments, env) for tool, arguments, env in calls if tool == 'train']
    shots = [str(out / f'train_{k}shot_seed0.json') for k in '15'] + [str(data / 'bccd/train.json')]
    assert [env['SHOTS'] for _, env in trained] == [x for x in shots for _ in ('gem', 'dense')]
    for (arguments, env), name in zip(trained, ['gem', 'dense'] * 3, strict=True):
        assert arguments[0].startswith(f'configs/fewshot/{name}-retinanet')
        assert env['BASE_CHECKPOINT'] == str(base / name / 'iter_5.pth')
        assert 'train_cfg.max_iters=3' in arguments
    # The others are tested after the last number of shots.
    assert ['--domains' in x for tool, x, _ in calls if tool == 'test'] == [True] * 4 + [False] * 2
    runs = json.loads((out / 'results.json').read_text())['runs']
    assert [run['old'] for run in runs] == [{}, {}, {'cheetah': 0.4}] * 2
    calls.clear()
    assert fewshot.main(command) == 0
    assert not calls
    # More shots cost what they are; the others are tested after each of them unless --old is last.
    command[command.index('5')] = '2'
    assert fewshot.main(command[:-2]) == 0
    assert [tool for tool, _, _ in calls] == [
        'fewshot_split',
        *('test', 'test'),  # of the others too, after 1 shot
        *('train', 'test', 'train', 'test'),
    ]
    runs = json.loads((out / 'results.json').read_text())['runs']
    assert [(run['shots'], run['old']) for run in runs] == [
        (k, {'cheetah': 0.4}) for k in ('1', '2', 'all')
    ] * 2
    # A model that was trained again is adapted again, and no other.
    calls.clear()
    os.utime(base / 'dense/iter_5.pth', (1, 1))
    assert fewshot.main(command[:-2]) == 0
    assert [tool for tool, _, _ in calls] == ['train', 'test'] * 3
    assert all('dense' in arguments[0] for _, arguments, _ in calls)
    # Other images: everything.
    calls.clear()
    write_atomically(data / 'bccd/train.json', '{"images": []}')
    assert fewshot.main(command[:-2]) == 0
    assert len(calls) == 2 + 1 + 6 * 2
