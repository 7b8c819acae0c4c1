"""The DomainBed protocol on rotated digits: sweep, kill, resume, Ray, table."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip('mmpretrain')
pytest.importorskip('sklearn')

import mmpretrain
import torch
from mmengine.config import Config

import mmdet_moe.jobs.preload  # noqa: F401
from mmdet_moe.jobs import job as dg_job

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tools'))  # tools import their neighbours by bare name


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f'tools/{name}.py')
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = _load('dg_sweep')


def write_config(path: Path, extra: str = '') -> Path:
    """Three angles, four steps, evaluated twice; with SWAD."""
    path.write_text(f"""
_base_ = '{ROOT}/configs/dg/erm_vit_digits.py'
data = dict(domains=['0', '30', '60'])
train_dataloader = dict(batch_size=4, dataset=data)
val_dataloader = dict(dataset=data)
train_cfg = dict(max_iters=4, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2))
custom_hooks = [
    dict(type='mmdet_moe.RandomStateHook'),
    dict(type='mmdet_moe.DGRecordHook'),
    dict(type='mmdet_moe.SWADHook', n_converge=1, n_tolerance=1),
]
{extra}
""")
    return path


def arguments(config: Path, out: Path, *more: str) -> list[str]:
    wanted = ['--algorithms', f'erm={config}', '--test-domains', '0', '30', '--trials', '1']
    return [*wanted, '--out', str(out), *more]


@pytest.fixture
def forked(monkeypatch):
    """Jobs are copies of this process, which has everything imported."""
    monkeypatch.setattr(dg_job, 'METHOD', 'fork')
    monkeypatch.setenv('PYTHONPATH', str(ROOT))


@pytest.fixture(scope='module')
def swept(tmp_path_factory):
    """A sweep that was killed in its second training with all its processes, and run again."""
    folder = tmp_path_factory.mktemp('sweep')
    config, out = write_config(folder / 'tiny.py'), folder / 'killed'
    args = arguments(config, out, '--backend', 'processes')

    def sweep():
        os.setsid()
        dg_job.METHOD = 'fork'
        sys.exit(tool.main(args))

    process = multiprocessing.get_context('fork').Process(target=sweep)
    process.start()
    until = time.monotonic() + 120
    second = out / 'RotatedDigits/erm/30/trial0-draw0/train/last_checkpoint'
    while not second.is_file() and time.monotonic() < until:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    done = {path: path.stat().st_mtime_ns for path in out.rglob('done.json')}
    dg_job.METHOD, before = 'fork', dg_job.METHOD
    try:
        assert tool.main([*args, '--jobs', '2']) == 0
    finally:
        dg_job.METHOD = before
    return config, out, done


def test_a_killed_sweep_goes_on_and_repeats_nothing(swept):
    _, out, done = swept
    assert len(done) == 1
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in done.items())
    assert len(list(out.rglob('done.json'))) == 2  # two held-out angles
    assert len(list(out.rglob('iter_*.pth'))) == 4  # of each the last one and the one before
    # Of each training: the run, two evaluations, and SWAD's.
    for path in out.rglob('dg_records.jsonl'):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(x['step'], x['model']) for x in lines[1:]] == [
            (2, 'last'),
            (4, 'last'),
            (4, 'swad'),
        ]
        assert set(lines[1]['accuracy']) == {
            f'{d}/{p}' for d in ('0', '30', '60') for p in ('train', 'val')
        }


def test_a_second_sweep_in_the_folder_and_ray_that_does_not_start_are_one_line(
    swept, tmp_path, capsys, monkeypatch
):
    config, out = swept[0], tmp_path / 'sweep'
    with tool.claim(out):
        assert tool.main(arguments(config, out)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'dg_sweep: another job is at work in {out}: ')
    ray = pytest.importorskip('ray')

    def refuse(**_):
        raise ConnectionError('no cluster there\nand more')

    monkeypatch.setattr(ray, 'init', refuse)
    assert tool.main(arguments(config, out, '--backend', 'ray')) == 2
    assert capsys.readouterr().err == (
        'dg_sweep: Ray does not start on this machine: no cluster there\n'
    )


def test_ray_and_an_uninterrupted_sweep_give_the_same_table_byte_for_byte(swept, tmp_path):
    pytest.importorskip('ray')
    config, killed, _ = swept
    args = arguments(config, tmp_path, '--backend', 'ray')
    assert tool.main(args) == 0
    for name in ('table.txt', 'table.md', 'results.json'):
        assert (tmp_path / name).read_bytes() == (killed / name).read_bytes(), name
    rows = (killed / 'table.txt').read_text().splitlines()
    assert rows[1].split() == ['Algorithm', '0', '30', 'Avg']
    assert [row.split()[0] for row in rows[2:4]] == ['erm', 'erm'] and '+ SWAD' in rows[3]


def test_stages_come_first_and_a_failing_training_is_named_while_others_go_on(
    tmp_path, forked, capsys
):
    config = write_config(tmp_path / 'tiny.py')
    still = write_config(tmp_path / 'still.py', 'optim_wrapper = dict(optimizer=dict(lr=0.0))')
    bad = write_config(tmp_path / 'bad.py', 'model = dict(head=dict(in_channels=31))')
    args = ['--stage', f'pre={config}', '--algorithms', f'bad={bad}', f'still={still}']
    args += ['--trials', '1', '--test-domains', '30', '--backend', 'processes', '--gpus', '1']
    out = tmp_path / 'out/RotatedDigits'
    assert tool.main([*args, '--out', str(tmp_path / 'out')]) == 1

    log = out / 'bad/30/trial0-draw0/log.txt'
    assert str(log) in capsys.readouterr().err and 'cannot be multiplied' in log.read_text()
    # It starts from the stage's weights; without a learning rate it stays there.
    stage, algorithm = (
        torch.load(out / name / '30/trial0-draw0/train/iter_4.pth', weights_only=False)
        for name in ('pre', 'still')
    )
    for key, value in stage['state_dict'].items():
        assert torch.equal(value, algorithm['state_dict'][key]), key
    rows = (tmp_path / 'out/table.txt').read_text()
    assert 'still' in rows and 'pre' not in rows and 'bad' not in rows


def plan(*args: str):
    return tool.make_plan(tool.parse_args(args))


def test_leave_one_out_adds_the_pairs_and_draws_come_from_the_space(tmp_path):
    config = write_config(tmp_path / 'tiny.py')
    common = ('--algorithms', f'a={config}', f'b={config}', '--trials', '1')
    trainings = plan(*common, '--selection', 'leave-one-out', '--test-domains', '0').trainings
    held = [t.held_out for t in trainings if t.algorithm == 'a']
    assert held == [(('0',),), (('0',), ('30',)), (('0',), ('60',))]
    assert [t.job.env['DG_TEST'] for t in trainings[::2]] == ['0', '0,30', '0,60']

    trainings = plan(*common, '--draws', '3', '--test-domains', '0').trainings
    a, b = ([t.job for t in trainings if t.algorithm == name] for name in 'ab')
    assert [job.options for job in a] == [job.options for job in b]  # both see the same draws
    assert [job.seed for job in a] == [job.seed for job in b]
    assert a[0].options == {}  # the config's own
    for job in a[1:]:
        assert 1e-5 <= job.options['optim_wrapper.optimizer.lr'] <= 10**-3.5
        assert 1e-6 <= job.options['optim_wrapper.optimizer.weight_decay'] <= 1e-2
        assert job.options['train_dataloader.batch_size'] in range(8, 46)
        assert job.options['model.backbone.drop_rate'] in (0, 0.1, 0.5)
    assert a[1].options != a[2].options
    assert len({t.job.key for t in trainings}) == 6


def test_a_job_takes_along_what_its_config_read_from_the_environment(tmp_path, monkeypatch):
    config = write_config(tmp_path / 'tiny.py', "weights = '{{$WEIGHTS:none}}'")
    common = ('--algorithms', f'a={config}', '--trials', '1', '--test-domains', '0')
    (plain,) = plan(*common).trainings
    monkeypatch.setenv('WEIGHTS', '/mine.pth')
    (told,) = plan(*common).trainings
    assert plain.job.inherited == {} and told.job.inherited == {'WEIGHTS': '/mine.pth'}
    assert plain.job.key != told.job.key
    # Where it runs is no input.
    assert tool.with_gpus(told.job, '1').key == told.job.key


def test_a_stage_without_its_checkpoint_is_done_anew_if_something_starts_from_it(tmp_path):
    def job(name, **more):
        folder = tmp_path / name
        (folder / 'train').mkdir(parents=True)
        (folder / 'train/dg_records.jsonl').touch()
        return tool.Job(name, str(folder), 'config.py', **more)

    def finish(job):
        (Path(job.folder) / 'done.json').write_text(json.dumps({'key': job.key}))

    stage = job('stage')
    jobs = [stage, job('full', after='stage', load_from=stage.folder)]
    finish(stage)  # under --no-checkpoints
    assert tool.done_of(jobs) == set()
    checkpoint = Path(stage.folder) / 'train/iter_4.pth'
    checkpoint.touch()
    # Where it stood before it was moved.
    (checkpoint.parent / 'last_checkpoint').write_text('/elsewhere/train/iter_4.pth')
    assert stage.checkpoint == str(checkpoint) and tool.done_of(jobs) == {'stage'}
    checkpoint.unlink()
    finish(jobs[1])
    assert tool.done_of(jobs) == {'stage', 'full'}


def test_adapters_alone_resume_over_the_stage_that_they_started_from(tmp_path):
    jobs = {}
    for name, before in (('stage', None), ('lora', str(tmp_path / 'stage'))):
        train = tmp_path / name / 'train'
        train.mkdir(parents=True)
        jobs[name] = tool.Job(name, str(train.parent), 'config.py', load_from=before)

    def begun():
        cfg = Config(dict(custom_hooks=[dict(type='mmdet_moe.AdapterCheckpointHook')]))
        dg_job.begin(cfg, jobs['lora'])
        return cfg.get('resume', False), cfg.load_from, cfg.custom_hooks[0].get('base')

    def save(name):
        path = tmp_path / name / 'train/iter_4.pth'
        path.touch()
        (path.parent / 'last_checkpoint').write_text(str(path))
        return str(path)

    with pytest.raises(FileNotFoundError, match='stage has no checkpoint to start from'):
        begun()
    stage = save('stage')
    assert begun() == (False, stage, None)
    own = save('lora')
    assert begun() == (True, own, stage)


def test_wrong_command_lines_are_one_line(tmp_path, capsys):
    config = write_config(tmp_path / 'tiny.py')
    out = ['--out', str(tmp_path / 'out')]
    assert tool.main(['--algorithms', f'a={config}', '--test-domains', '45', *out]) == 2
    assert "RotatedDigits has no domain '45'; it has ['0', '30', '60']" in capsys.readouterr().err
    other = ROOT / 'configs/dg/erm_vit_digits.py'
    assert tool.main(['--algorithms', f'a={config}', f'b={other}', *out]) == 2
    assert 'are of different data sets' in capsys.readouterr().err
    plain = write_config(tmp_path / 'plain.py', 'custom_hooks = []')
    assert tool.main(['--algorithms', f'a={plain}', *out]) == 2
    assert 'must evaluate a mmdet_moe.DGDataset' in capsys.readouterr().err


def test_mmpretrains_own_tool_trains_a_config(tmp_path, monkeypatch):
    tools = Path(mmpretrain.__file__).parent / '.mim/tools/train.py'
    if not tools.is_file():
        pytest.skip('this mmpretrain comes without its tools')
    monkeypatch.setenv('DG_TEST', '60')
    config = write_config(tmp_path / 'tiny.py')
    argv = [str(tools), str(config), '--work-dir', str(tmp_path / 'run')]

    def run():  # in a copy of this process, which has everything imported
        sys.argv = argv
        runpy.run_path(str(tools), run_name='__main__')

    process = multiprocessing.get_context('fork').Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == 0
    head = json.loads((tmp_path / 'run/dg_records.jsonl').read_text().splitlines()[0])
    assert head['held_out'] == ['60'] and head['trial'] == 0
