"""Killed and resumed training equals training that was never interrupted."""

import multiprocessing
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import mmdet
import mmdet.evaluation
import mmdet.models
import mmdet.visualization
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import IterBasedTrainLoop, Runner

from mmdet_moe.engine.hooks.random_state_hook import (
    RandomStateHook,
    get_random_state,
    set_random_state,
)
from mmdet_moe.registry import DATA_SAMPLERS, HOOKS, LOOPS, TRANSFORMS

ITERS, KILL_AT, SAVE_EVERY, VAL_EVERY = 16, 12, 5, 4


def test_states_survive_a_checkpoint_loaded_with_weights_only(tmp_path):
    random.gauss(0, 1), np.random.standard_normal()  # each keeps the second of a pair
    state = get_random_state()
    torch.save(state, tmp_path / 'state.pth')

    def draw():
        return (
            [random.random(), random.gauss(0, 1), random.gauss(0, 1)],
            np.random.standard_normal(3).tolist(),
            torch.rand(3).tolist(),
        )

    first = draw()
    assert draw() != first
    set_random_state(torch.load(tmp_path / 'state.pth', weights_only=True))
    assert draw() == first


@TRANSFORMS.register_module()
class CountLoads:
    """Appends a line for every image that is read."""

    def __init__(self, path):
        self.path = path

    def __call__(self, results):
        with open(self.path, 'a') as file:
            file.write(f'{results["domain"]}/{results["img_id"]}\n')
        return results


@HOOKS.register_module()
class LogExactly(Hook):
    """Writes every loss to the last bit, with a draw from each generator; kills on demand."""

    def __init__(self, path, kill_at=None):
        self.path, self.kill_at = path, kill_at

    def before_run(self, runner):
        torch.manual_seed(int.from_bytes(os.urandom(4), 'big'))  # nothing may rest on the seed

    def before_train(self, runner):
        if runner.iter == 0:
            random.seed(3), np.random.seed(3), torch.manual_seed(3)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        losses = ' '.join(f'{k}={float(v).hex()}' for k, v in sorted(outputs.items()))
        draws = random.random(), np.random.rand(), torch.rand(1).item()
        domains = ','.join(s.domain for s in data_batch['data_samples'])
        with open(self.path, 'a') as file:
            file.write(f'{runner.iter + 1} {domains} {losses} {draws}\n')
        if runner.iter + 1 == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def after_val_epoch(self, runner, metrics=None):
        torch.rand(5)  # validation may use random numbers


class ClassicIterator:
    """The endless iterator of mmengine 0.10.7 and before: made at once, cannot skip."""

    def __init__(self, dataloader):
        self._dataloader = dataloader
        self._iterator = iter(dataloader)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._iterator)


@LOOPS.register_module()
class ClassicTrainLoop(IterBasedTrainLoop):
    """The train loop of mmengine 0.10.7 and before: draws the batches done before once more."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dataloader_iterator = ClassicIterator(self.dataloader)

    def run(self):
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        for _ in range(self._iter):
            next(self.dataloader_iterator)
        while self._iter < self._max_iters:
            self.runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
            if self._iter % self.val_interval == 0:
                self.runner.val_loop.run()
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model


def config(
    tiny_dataset, folder, loop='IterBasedTrainLoop', sampler='MultiDomainSampler', **changes
):
    retina = Config.fromfile(
        Path(mmdet.__file__).parent / '.mim/configs/_base_/models/retinanet_r50_fpn.py'
    ).model
    retina.backbone.update(depth=18, base_channels=8, init_cfg=None, norm_eval=False)
    retina.backbone.update(frozen_stages=-1)
    retina.neck.update(in_channels=[8, 16, 32, 64], out_channels=8, num_outs=3)
    retina.bbox_head.update(num_classes=5, in_channels=8, feat_channels=8, stacked_convs=1)
    retina.bbox_head.anchor_generator.update(strides=[8, 16, 32])
    train, val = tiny_dataset('train'), tiny_dataset('val')
    train['pipeline'] = [
        {'type': 'CountLoads', 'path': f'{folder}/loads.txt'},
        *train['pipeline'][:-1],
        {'type': 'RandomFlip', 'prob': 0.5},
        train['pipeline'][-1],
    ]
    return Config(
        dict(
            default_scope='mmdet_moe',
            work_dir=f'{folder}/work',
            model=retina,
            train_dataloader=dict(
                batch_size=2,
                num_workers=0,
                sampler=dict(type=sampler),
                dataset=train,
            ),
            val_dataloader=dict(
                batch_size=3,
                num_workers=0,
                sampler=dict(type='DefaultSampler', shuffle=False),
                dataset=val,
            ),
            val_evaluator=dict(
                type='MultiDomainEvaluator',
                label_space=train['label_space'],
                metrics={
                    name: [dict(type='CocoMetric', ann_file=f'{item["data_root"]}val.json')]
                    for name, item in train['domains'].items()
                },
            ),
            train_cfg=dict(type=loop, max_iters=ITERS, val_interval=VAL_EVERY),
            val_cfg={},
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3), clip_grad=dict(max_norm=1)),
            param_scheduler=[
                dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=10),
                dict(type='MultiStepLR', by_epoch=False, milestones=[8, 13]),
            ],
            default_hooks=dict(
                checkpoint=dict(
                    type='CheckpointHook',
                    by_epoch=False,
                    interval=SAVE_EVERY,
                    save_best='macro/coco/bbox_mAP',
                ),
                logger=dict(type='LoggerHook', interval=100),
            ),
            custom_hooks=[
                dict(type='RandomStateHook'),
                dict(type='EMAHook', momentum=0.1),
                dict(type='LogExactly', path=f'{folder}/log.txt', priority='VERY_HIGH'),
            ],
            log_processor=dict(by_epoch=False),
            log_level='ERROR',
            randomness=dict(seed=None),  # resuming must not need a stated seed
            **changes,
        )
    )


def train(cfg):
    torch.set_num_threads(1)
    runner = Runner.from_cfg(cfg)
    # Same start for all runs; initialisation is not what is tested.
    if not cfg.get('resume'):
        generator = torch.Generator().manual_seed(0)
        runner.model.init_weights()
        with torch.no_grad():
            for parameter in runner.model.parameters():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        runner.model.init_weights = lambda: None
        _sampler_seed(runner, 11)
    runner.train()


def _sampler_seed(runner, seed):
    runner.train_dataloader.sampler.seed = seed


def in_process(cfg):
    """Train in a process of its own; its exit code."""
    process = multiprocessing.get_context('fork').Process(target=train, args=(cfg,))
    process.start()
    process.join(120)
    return process.exitcode


def lines(folder):
    """Iteration -> what the last run to reach it wrote."""
    text = (folder / 'log.txt').read_text().splitlines()
    return {int(line.split()[0]): line for line in text}


@DATA_SAMPLERS.register_module()
class ClassicInfiniteSampler(InfiniteSampler):
    """The sampler of mmengine 0.10.7 and before, which cannot skip."""

    @property
    def skip(self):
        raise AttributeError('skip')


@pytest.fixture(autouse=True)
def quick_runner(monkeypatch):
    """Spare the seconds mmengine takes to describe the machine, and, with every checkpoint, to
    format the config with yapf."""
    monkeypatch.setattr(Config, 'pretty_text', property(lambda self: 'cfg = {}'))
    monkeypatch.setattr(Runner, '_log_env', lambda self, env_cfg: None)


@pytest.mark.parametrize(
    'loop, sampler',
    [
        ('IterBasedTrainLoop', 'MultiDomainSampler'),
        ('ClassicTrainLoop', 'MultiDomainSampler'),
        ('ClassicTrainLoop', 'ClassicInfiniteSampler'),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    tiny_dataset, mmdet_moe_scope, tmp_path, loop, sampler
):
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    for folder in (whole, broken):
        folder.mkdir()
    assert in_process(config(tiny_dataset, whole, loop, sampler)) == 0
    cfg = config(tiny_dataset, broken, loop, sampler)
    cfg.custom_hooks[-1].kill_at = KILL_AT
    assert in_process(cfg) == -signal.SIGKILL
    killed = lines(broken)
    assert max(killed) == KILL_AT
    cfg = config(tiny_dataset, broken, loop, sampler, resume=True)
    (broken / 'loads.txt').unlink()
    assert in_process(cfg) == 0
    resumed = lines(broken)
    expected = lines(whole)
    assert sorted(resumed) == sorted(expected) == list(range(1, ITERS + 1))
    for iteration, line in expected.items():
        assert resumed[iteration] == line
        assert killed.get(iteration, line) == line

    # Weights, EMA, optimiser and schedules, to the last bit.
    ours, theirs = (
        torch.load(folder / f'work/iter_{ITERS - 1}.pth', weights_only=False)
        for folder in (broken, whole)
    )
    for part in ('state_dict', 'ema_state_dict'):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][key], theirs[part][key]) for key in ours[part])
    assert ours['param_schedulers'] == theirs['param_schedulers']
    assert torch.equal(
        ours['random_state']['ranks'][0]['torch'], theirs['random_state']['ranks'][0]['torch']
    )
    assert ours['meta']['dataset_meta']['domains'] == ('ink', 'heat', 'blue')

    # Only our sampler can skip on either line; without, the classic one loads all again.
    stopped = KILL_AT // SAVE_EVERY * SAVE_EVERY
    loaded = len((broken / 'loads.txt').read_text().splitlines())
    skips = sampler == 'MultiDomainSampler'
    assert loaded == 2 * (ITERS - stopped if skips else ITERS)


def test_loading_weights_is_not_resuming(tiny_dataset, mmdet_moe_scope, tmp_path):
    """`load_from` starts anew, with its own random numbers."""
    cfg = config(tiny_dataset, tmp_path)
    cfg.train_cfg.max_iters = 5
    assert in_process(cfg) == 0
    first = lines(tmp_path)
    cfg = config(tiny_dataset, tmp_path, load_from=f'{tmp_path}/work/iter_5.pth')
    cfg.train_cfg.max_iters = 2
    (tmp_path / 'log.txt').unlink()
    assert in_process(cfg) == 0
    again = lines(tmp_path)
    assert [line.split(' (')[1] for line in again.values()] == [
        first[iteration].split(' (')[1] for iteration in (1, 2)
    ]


def fake_runner(iteration=4, **loop):
    """As much of a Runner as the hook asks for."""
    loader = SimpleNamespace(batch_sampler=SimpleNamespace(sampler=SimpleNamespace(seed=5)))
    return SimpleNamespace(
        hooks=[CheckpointHook(interval=5, by_epoch=False)],
        iter=iteration,
        max_iters=100,
        train_dataloader=loader,
        train_loop=SimpleNamespace(iter=iteration, dataloader=loader, **loop),
    )


def save_and_restore(rank, folder, queue):
    """One of two processes: save a state, go on, resume."""
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2
    )
    torch.manual_seed(rank)
    hook, runner, checkpoint = RandomStateHook(), fake_runner(), {}
    hook.after_train_iter(runner, 4)
    if rank == 0:  # mmengine saves on the main process only
        hook.before_save_checkpoint(runner, checkpoint)
        torch.save(checkpoint, folder / 'iter_5.pth')
    expected = torch.rand(2).tolist()
    torch.distributed.barrier()
    torch.manual_seed(9)
    hook.after_load_checkpoint(runner, torch.load(folder / 'iter_5.pth', weights_only=True))
    hook.before_train(runner)
    hook.before_train_epoch(runner)
    queue.put((rank, expected, torch.rand(2).tolist()))


def test_every_rank_gets_its_own_states_back(tmp_path):
    context = multiprocessing.get_context('fork')
    queue = context.Queue()
    workers = [
        context.Process(target=save_and_restore, args=(rank, tmp_path, queue)) for rank in (0, 1)
    ]
    for worker in workers:
        worker.start()
    (_, first, again), (_, other, other_again) = sorted(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert first == again and other == other_again and first != other


def test_another_number_of_processes_starts_new_random_numbers():
    hook, runner, checkpoint = RandomStateHook(), fake_runner(), {}
    hook.before_save_checkpoint(runner, checkpoint)
    checkpoint['random_state']['ranks'] *= 2
    state = torch.get_rng_state()
    hook.after_load_checkpoint(runner, checkpoint)
    hook.before_train(runner)
    hook.before_train_epoch(runner)
    assert torch.equal(torch.get_rng_state(), state)
    assert runner.train_dataloader.batch_sampler.sampler.seed == 5
