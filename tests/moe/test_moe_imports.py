"""mmdet_moe.moe needs torch only."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys

BLOCKED = ('mmengine', 'mmcv', 'mmdet', 'mmpretrain')


class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in BLOCKED:
            raise ImportError(f'{name} is blocked')


sys.meta_path.insert(0, Block())

import torch
from torch import nn

from mmdet_moe.moe import RoutingState, check_datasets, replace_modules, upcycle_

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(2), nn.Linear(16, 2))
state = RoutingState()
plan = dict(a='e0', b='e1')
replace_modules(model, [
    dict(targets='[01]', router=dict(type='PlanRouter', plan=plan)),
    dict(targets='3', num_experts=3, router=dict(type='TopKRouter', k=2),
         balance=[dict(type='ImportanceLoss'), dict(type='LoadLoss')]),
], state)
check_datasets(model, ['a', 'b'])
upcycle_(model)
optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
x = torch.randn(4, 3, 4, 4)
for _ in range(20):
    state.begin(['a', 'b', 'b', 'a'], training=True)
    loss = (model(x) - 1).square().mean() + sum(state.collect().values())
    optim.zero_grad()
    loss.backward()
    optim.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
print('trained', not any(name.partition('.')[0] in BLOCKED for name in sys.modules))
"""


def test_the_core_imports_and_trains_without_mmengine_mmcv_and_mmdet():
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['trained', 'True']
