"""The demo: what it says, what it promises, and what it does not do twice."""

from __future__ import annotations

import importlib.util
import signal
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f'tools/{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# Tools import their neighbours by bare name, as scripts do.
job = _load('steps')
tool = _load('demo')


def _rows(*ap50: float) -> list[dict]:
    domains = {f'd{i}': {'train': 10, 'classes': ['a', 'b']} for i in range(len(ap50))}
    metrics = {f'd{i}/coco/bbox_mAP_50': value for i, value in enumerate(ap50)}
    metrics |= {f'd{i}/coco/bbox_mAP': value / 2 for i, value in enumerate(ap50)}
    plan = {'assignment': {name: {'e0': 1.0} for name in domains}}
    return tool.make_table(metrics, domains, plan)[0]


def test_the_table_has_a_row_per_domain_and_their_mean() -> None:
    domains = {
        'ink': {'train': 240, 'classes': ['x'] * 10},
        'chalk': {'train': 30, 'classes': ['y']},
    }
    metrics = {
        'ink/coco/bbox_mAP': 0.5,
        'ink/coco/bbox_mAP_50': 0.8,
        'chalk/coco/bbox_mAP': 0.2,
        'chalk/coco/bbox_mAP_50': 0.4,
    }
    plan = {'assignment': {'ink': {'e1': 1.0}, 'chalk': {'e0': 0.5, 'e2': 0.5}}}
    _, text = tool.make_table(metrics, domains, plan)
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ['domain', 'train', 'classes', 'experts', 'AP', 'AP50']
    assert lines[1] == ['ink', '240', '10', 'e1', '0.500', '0.800']
    assert lines[2] == ['chalk', '30', '1', 'e0', 'e2', '0.200', '0.400']
    # (0.5 + 0.2) / 2 = 0.35 and (0.8 + 0.4) / 2 = 0.6
    assert lines[4] == ['mean', '0.350', '0.600']


@pytest.mark.parametrize(
    ('ap50', 'missed'),
    [
        ((0.9, 0.3), None),  # mean 0.6, least 0.3
        ((0.5, 0.5), None),
        ((0.9, 0.29), 'AP50 too low: d1 0.290 < 0.3'),
        ((0.49, 0.49), 'AP50 too low: mean 0.490 < 0.5'),
        ((0.9, float('nan')), 'AP50 too low: d1 nan < 0.3, mean nan < 0.5'),
    ],
)
def test_a_table_that_misses_the_promise_is_called_out(
    ap50: tuple[float, ...], missed: str | None
) -> None:
    assert tool.verdict(_rows(*ap50)) == missed


def test_training_is_reported_in_short_lines() -> None:
    line = (
        '11/22 05:01:59 - mmengine - INFO - Iter(train) [100/600]  base_lr: 9.8e-04 lr: 2.9e-04  '
        'eta: 0:05:12  time: 0.52  data_time: 0.01  grad_norm: 4.07  loss: 0.5442  loss_cls: 0.34'
    )
    assert job.progress(line) == 'train 100/600  eta 0:05:12  loss 0.5442'
    assert job.progress('Iter(test) [ 50/240]    eta: 0:00:05  time: 0.1') == (
        'test 50/240  eta 0:00:05'
    )
    assert job.progress('paramwise_options -- backbone.lr=0.0003') is None


def test_a_step_is_done_once_and_again_when_something_before_it_changed(tmp_path: Path) -> None:
    ran: list[str] = []

    def go(inputs: str, first: str = '') -> list[str]:
        ran.clear()
        steps = job.Steps(tmp_path, inputs, {})
        for name, of_step in (('one', first), ('two', '')):
            output = tmp_path / name
            steps.step(
                name, name, lambda _, o=output: (ran.append(o.name), o.touch()), of_step, [output]
            )
        return list(ran)

    assert go('a') == ['one', 'two']
    assert go('a') == []
    assert go('a', first='other') == ['one', 'two']
    assert go('b', first='other') == ['one', 'two']
    (tmp_path / 'two').unlink()
    assert go('b', first='other') == ['two']


def test_steps_of_a_branch_make_no_later_step_run_again(tmp_path: Path) -> None:
    ran: list[str] = []

    def go(branch: str) -> list[str]:
        ran.clear()
        steps = job.Steps(tmp_path, 'a', {})
        for name in ('one', 'two', 'three'):
            act = partial(lambda name, _: ran.append(name), name)
            if name == 'two':
                with steps.branch():
                    steps.step(name, name, act, branch, [])
            else:
                steps.step(name, name, act, '', [])
        return list(ran)

    assert go('a') == ['one', 'two', 'three']
    assert go('b') == ['two']


def test_two_jobs_in_one_folder_are_refused_until_the_first_ends(tmp_path: Path, capsys) -> None:
    def inner() -> int:
        return job.call('second', lambda: 0, tmp_path)

    assert job.call('first', inner, tmp_path) == 1
    assert f'second: another job is at work in {tmp_path}: wait for it' in capsys.readouterr().err
    assert inner() == 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as before


def test_a_step_knows_that_it_was_begun_and_broke_off(tmp_path: Path) -> None:
    def breaks(_: bool) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.Steps(tmp_path, 'a', {}).step('train', '', breaks, '', [])
    seen: list[bool] = []
    job.Steps(tmp_path, 'a', {}).step('train', '', seen.append, '', [])
    job.Steps(tmp_path, 'changed', {}).step('train', '', seen.append, '', [])
    assert seen == [True, False]


def test_a_training_whose_folder_was_moved_goes_on_from_its_own_checkpoint(
    tmp_path: Path, monkeypatch
) -> None:
    folder = tmp_path / 'train'
    commands: list[tuple] = []

    def breaks_off(self, *arguments: str, **_) -> None:
        commands.append(arguments)
        folder.mkdir(exist_ok=True)
        (folder / 'iter_3.pth').touch()
        (folder / 'last_checkpoint').write_text('/elsewhere/train/iter_3.pth')
        raise KeyboardInterrupt

    monkeypatch.setattr(job.Steps, 'run', breaks_off)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            job.train(job.Steps(tmp_path, '', {}), 'train', 'c.py', folder, 0)
    assert '--resume' not in commands[0]
    place = commands[1].index('--resume')
    assert commands[1][place + 1] == str(folder / 'iter_3.pth')


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys) -> None:
    (tmp_path / 'file').touch()
    for out in (tmp_path / 'file', tmp_path / 'file/sub'):
        assert job.call('demo', lambda: 0, out) == 1
        assert f'demo: cannot work in {out}: ' in capsys.readouterr().err


def test_a_step_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(job.StepError, match='without writing'):
        job.Steps(tmp_path, 'a', {}).step('plan', 'plan', lambda _: None, '', [tmp_path / 'plan'])


def test_a_tool_that_fails_shows_the_end_of_its_output(tmp_path: Path) -> None:
    (tmp_path / 'bad.py').write_text("print('loss is nan'); raise SystemExit(3)")
    steps = job.Steps(tmp_path, 'a', {})
    with pytest.raises(job.StepError, match=r'exit code 3(.|\n)*loss is nan'):
        steps.run(str(tmp_path / 'bad.py'), show=lambda line: None)
    assert 'loss is nan' in (tmp_path / 'steps.log').read_text()
