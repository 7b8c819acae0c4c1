"""The experiment on soft and hard constraints: trained, measured, in a table, not done twice."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip('mmpretrain')

from test_train_and_test_tools import run_tool

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ('activities', 'animals_nature', 'food_drink', 'objects', 'smileys', 'travel_places')


def _load(name: str):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / f'tools/{name}.py')
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


sys.path.insert(0, str(ROOT / 'tools'))  # tools import their neighbours by bare name
job = _load('steps')
tool = _load('cnn_moe')
sys.path.remove(str(ROOT / 'tools'))


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Two styles x six classes x six concepts."""
    root = tmp_path_factory.mktemp('emoji')
    rng = np.random.default_rng(0)
    for style in ('flat', 'line'):
        for name in CLASSES:
            (root / style / name).mkdir(parents=True)
            for i in range(6):
                picture = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                cv2.imwrite(f'{root}/{style}/{name}/{name}{i}.png', picture)
    return root


@pytest.fixture
def forked(monkeypatch):
    """Commands run in a copy of this process, which has everything imported; the list of them."""
    commands = []

    def run(steps, *arguments, show, env=None):
        commands.append(arguments)
        assert run_tool(ROOT / arguments[0], *arguments[1:], log=steps.log) == 0

    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(job.Steps, 'run', run)
    # One after the other: a process forked from a pool's thread does not end well.
    monkeypatch.setattr(job, 'run_all', lambda tasks, _: [task(steps) for steps, task in tasks])
    return commands


def test_the_whole_experiment_and_what_it_leaves(images, tmp_path, forked, monkeypatch, capfd):
    monkeypatch.setenv('EMOJI_DG', '')
    arguments = ['--data', str(images), '--out', str(tmp_path), '--settings', 'relative', 'none']
    arguments += ['--seeds', '3', '4', '--cfg-options', 'train_cfg.max_epochs=1']
    arguments += ['train_dataloader.batch_size=16', 'model.backbone.base_channels=8']
    arguments += ['model.backbone.stem_channels=8', 'model.head.in_channels=64']
    assert tool.main(arguments) == 0
    assert [command[1] for command in forked] == [
        tool.config_of(setting) for setting in ('relative', 'none', 'relative', 'none')
    ]

    # Every number is that of its run.
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['seeds'] == [3, 4]
    for setting in ('relative', 'none'):
        found = [
            json.loads((tmp_path / setting / f'seed{seed}/statistics.json').read_text())
            for seed in (3, 4)
        ]
        for one in found:
            assert len(one['share']) == 4 and sum(one['share']) == pytest.approx(1)
            # Two experts an image, and so it was trained: k = 2 changes nothing.
            assert 1 <= one['effective_k'] <= 2 and one['accuracy_k2'] == one['accuracy']
            assert 0 <= one['mi_domain'] <= np.log(2) + 1e-9
        row = results['settings'][setting]
        for key in ('accuracy', 'cv', 'living', 'accuracy_k1', 'accuracy_k4', 'nmi_class'):
            assert row[key]['values'] == [one[key] for one in found]
        # Experts, too, are drawn anew for each seed.
        weights = [_expert_weights(tmp_path / setting / f'seed{seed}/train') for seed in (3, 4)]
        assert not np.allclose(*weights, atol=0.02)

    # The table has them; a second call does nothing again.
    text = capfd.readouterr().out
    table = (tmp_path / 'table.md').read_text()
    assert table in text and 'relative (hard)' in table and '% at k = 4' in table
    assert f'{results["settings"]["none"]["cv"]["mean"]:.2f} ±' in table
    forked.clear()
    assert tool.main(arguments) == 0
    assert not forked and (tmp_path / 'table.md').read_text() == table
    assert capfd.readouterr().out.count('done already') == 8


def _expert_weights(folder: Path) -> np.ndarray:
    """The last expert's first convolution, over its standard deviation."""
    from mmengine.runner import CheckpointLoader

    state = CheckpointLoader.load_checkpoint(str(folder / 'epoch_1.pth'), 'cpu')['state_dict']
    value = state['backbone.layer4.experts.3.0.conv1.weight']
    return (value / value.std()).numpy()


def test_mmpretrains_own_tool_trains_the_configs(images, tmp_path, monkeypatch):
    import mmpretrain

    train = Path(mmpretrain.__file__).parent / '.mim/tools/train.py'
    if not train.is_file():
        pytest.skip('this mmpretrain comes without its tools')
    monkeypatch.setenv('EMOJI_DG', f'{images}/')
    config = ROOT / tool.config_of('kl')
    options = ['train_cfg.max_epochs=1', 'train_dataloader.batch_size=16']
    arguments = [config, '--work-dir', tmp_path, '--cfg-options', *options]
    assert run_tool(train, *arguments, log=tmp_path / 'log.txt') == 0
    (scalars,) = tmp_path.glob('*/vis_data/scalars.json')
    assert 'loss_moe_kl' in scalars.read_text() and (tmp_path / 'epoch_1.pth').is_file()


def test_a_cell_is_the_mean_and_the_sample_deviation():
    # 50, 52, 54: deviations -2, 0, 2, sqrt(8 / 2) = 2.
    results = [dict(accuracy=a, cv=0.5, share=[1.0]) for a in (50.0, 52.0, 54.0)]
    table = tool.to_markdown({'none': tool.cells(results), 'dense': {}})
    header, _, none, dense = (line.split('|')[1:-1] for line in table.splitlines())
    assert [cell.strip() for cell in header[:3]] == ['balance', 'accuracy %', 'CV']
    assert [cell.strip() for cell in none[:4]] == ['none', '52.0 ± 2.0', '0.50 ± 0.00', '']
    assert [cell.strip() for cell in dense] == ['dense network', *[''] * 6]


def test_data_that_is_not_there_is_named(tmp_path, capsys):
    assert tool.main(['--data', str(tmp_path / 'none')]) == 1
    assert 'none is not a folder: give --data DIR' in capsys.readouterr().err


def test_tasks_run_side_by_side_and_one_that_fails_ends_the_others(tmp_path):
    (tmp_path / 'long.py').write_text('import time; print(1, flush=True); time.sleep(60)')
    (tmp_path / 'bad.py').write_text('raise SystemExit(3)')
    names = ('long', 'bad', 'never')
    all_steps = {name: job.Steps(tmp_path, name, {}) for name in names}
    done = []

    def task(name):
        def run(steps):
            if name == 'never':
                done.append(name)
            steps.run(str(tmp_path / f'{name}.py'), show=lambda line: None)

        return run

    start = time.monotonic()
    with pytest.raises(job.StepError, match='exit code 3'):
        job.run_all([(steps, task(name)) for name, steps in all_steps.items()], 2)
    assert time.monotonic() - start < 30
    assert all_steps['long'].process.returncode != 0
    # Either it was not begun, or it was refused.
    assert all_steps['never'].process is None


def test_results_come_in_the_order_of_the_tasks(tmp_path):
    tasks = [(job.Steps(tmp_path, str(i), {}), lambda _, i=i: i * i) for i in range(5)]
    assert job.run_all(tasks, 2) == [0, 1, 4, 9, 16]


def test_progress_of_epochs_says_which():
    line = '2026/11/26 - mmengine - INFO - Epoch(train)  [3][64/64]  lr: 1.0e-03  eta: 0:03:12  '
    assert job.progress(f'{line}loss: 1.62') == 'epoch 3  train 64/64  eta 0:03:12  loss 1.62'
    line = 'Epoch(val) [5][8/8]    accuracy/top1: 57.3000  data_time: 0.01'
    assert job.progress(line) == 'epoch 5  val 8/8  accuracy/top1 57.3000'
