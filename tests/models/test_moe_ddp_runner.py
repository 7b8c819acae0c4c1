"""A MoE detector under mmengine's Runner in two gloo processes, as tools/train.py launches it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parents[1]

# Every image of this run is of 'ink', which e0 serves: e1 and e2 are idle on both ranks.
SCRIPT = """
import sys
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from tiny_models import retinanet_cfg
from mmdet_moe.planning import ExpertPlan

out, root = sys.argv[1:]
torch.set_num_threads(1)
# mmengine's own call asks for a GPU.
torch.distributed.init_process_group('gloo')
label_space = dict(domains=dict(ink=['cat', 'dog', 'cow'], heat=['car', 'cat'], blue=['bolt']))
plan = ExpertPlan.from_assignment({'ink': 'e0', 'heat': 'e1', 'blue': 'e2'}).to_dict()
model = retinanet_cfg(label_space=label_space)
model.update(plan=plan, moe=[dict(targets=r'bbox_head\\.(cls|reg)_convs\\.\\d',
                                  router=dict(type='PlanRouter'))])
domain = lambda name: dict(
    type='CocoDataset', data_root=f'{root}/{name}/', ann_file='train.json',
    data_prefix=dict(img='train/'))
cfg = Config(dict(
    default_scope='mmdet_moe', work_dir=out, launcher='pytorch', model=model,
    model_wrapper_cfg=dict(
        type='MMDistributedDataParallel', device_ids=None,
        find_unused_parameters=True, broadcast_buffers=False),
    train_dataloader=dict(
        batch_size=2, num_workers=0, persistent_workers=False,
        sampler=dict(type='MultiDomainSampler', weights=dict(ink=1.0, heat=0.0, blue=0.0)),
        dataset=dict(
            type='MultiDomainDataset', label_space=label_space,
            domains={name: domain(name) for name in label_space['domains']},
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True),
                dict(type='Resize', scale=(64, 48), keep_ratio=True),
                dict(type='PackDetInputs')])),
    train_cfg=dict(type='IterBasedTrainLoop', max_iters=3),
    optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.1)),
    visualizer=dict(type='DetLocalVisualizer', vis_backends=[], name='ddp'),
    custom_hooks=[dict(type='RandomStateHook'), dict(type='PlanHook')],
    default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=10)),
    log_level='ERROR', randomness=dict(seed=0)))
runner = Runner.from_cfg(cfg)
# The Runner initialises the weights at the start of training; a second call then does nothing.
runner.model.module.init_weights()
before = {key: value.clone() for key, value in runner.model.module.state_dict().items()}
runner.train()
torch.save(dict(before=before, after=runner.model.module.state_dict()),
           f'{out}/rank{torch.distributed.get_rank()}.pth')
"""


def test_two_processes_train_one_model_and_leave_idle_experts_alone(tmp_path, tiny_domains):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(2):
        env = {
            **os.environ,
            'PYTHONPATH': os.pathsep.join([str(TESTS.parent), str(TESTS)]),
            'MASTER_ADDR': '127.0.0.1',
            'MASTER_PORT': str(port),
            'WORLD_SIZE': '2',
            'RANK': str(rank),
            'LOCAL_RANK': str(rank),
            'OMP_NUM_THREADS': '1',
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, '-c', SCRIPT, str(tmp_path), str(tiny_domains)],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), '\n'.join(
        output[-3000:] for output in outputs
    )
    first, second = (torch.load(tmp_path / f'rank{rank}.pth') for rank in range(2))
    moved = set()
    for key, value in first['after'].items():
        assert torch.equal(value, second['after'][key]), key
        if '.experts.' in key and not torch.equal(value, first['before'][key]):
            moved.add(key.split('.experts.')[1][0])
    assert moved == {'0'}
