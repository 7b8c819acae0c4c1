"""Two gloo processes: experts idle on one rank, or on both, under DistributedDataParallel.

One spawn runs every scenario and writes what it saw; the tests read it. Each scenario is also run
in one process on both ranks' images together, which is what two ranks must amount to.
"""

import copy
import os

import pytest
import torch
from moe_testlib import ToyFFN, plan_router, topk_router, two_processes
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mmdet_moe.moe import RoutingState, replace_modules

#: Domains of the two images of each rank, step by step. Plan: a -> e0, b -> e1, c -> e2.
STEPS = [
    ('ac', 'bc'),  # e0 idle on rank 1, e1 idle on rank 0
    ('aa', 'ab'),  # e2 idle on both, after it had momentum
    ('aa', 'bb'),  # one expert per rank: the plain call
]


class Net(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.ffn = ToyFFN(4)
        self.out = nn.Linear(4, 2)
        self.checkpointed = checkpointed

    def body(self, x):
        return self.ffn(self.conv(x).flatten(2).transpose(1, 2))

    def forward(self, x, domains):
        self.state.begin(domains, training=self.training)
        x = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        loss = self.out(x).square().mean()
        return {'loss_task': loss, **self.state.collect()}


def build(kind):
    torch.manual_seed(0)
    model = Net(checkpointed=kind == 'checkpointed')
    model.state = RoutingState()
    specs = [dict(targets='conv|out', router=plan_router())]
    if kind == 'plan':
        specs.append(dict(targets='ffn', router=plan_router()))
    else:
        balance = [dict(type='ImportanceLoss', weight=0.1)]
        router = topk_router(k=2, noise=False)
        specs.append(dict(targets='ffn', num_experts=4, router=router, balance=balance))
    replace_modules(model, specs, model.state)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


def images(step):
    return torch.randn(2, 2, 3, 3, 3, generator=torch.Generator().manual_seed(step))


def train(kind, rank=None):
    """Parameters after each step; ``rank=None`` is the mean of both ranks in one process."""
    model = build(kind)
    optim = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
    run = model
    if rank is not None:
        run = DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)
    seen = [copy.deepcopy(model.state_dict())]
    for step, domains in enumerate(STEPS):
        optim.zero_grad()
        ranks = [rank] if rank is not None else [0, 1]
        for r in ranks:
            losses = run(images(step)[r], list(domains[r]))
            (sum(losses.values()) / len(ranks)).backward()
        optim.step()
        seen.append(copy.deepcopy(model.state_dict()))
    return seen


def worker(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=rank, world_size=2)
    result = {kind: train(kind, rank) for kind in ('plan', 'topk', 'checkpointed')}
    model = build('plan')
    model.ffn.experts[1].layers[1] = nn.SyncBatchNorm(8)
    try:
        model(images(0)[rank], ['a', 'b'])
        result['sync'] = ''
    except RuntimeError as error:
        result['sync'] = str(error)
    torch.save(result, f'{folder}/{rank}.pth')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    return two_processes(worker, tmp_path_factory.mktemp('ddp'))


@pytest.mark.parametrize('kind', ['plan', 'topk', 'checkpointed'])
def test_two_ranks_equal_one_process_with_both_batches(ranks, kind):
    for step, expected in enumerate(train(kind)):
        for rank in range(2):
            torch.testing.assert_close(ranks[rank][kind][step], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ranks[0][kind][step], ranks[1][kind][step], rtol=0, atol=0)


def test_an_expert_idle_on_one_rank_follows_the_other(ranks):
    before, after = ranks[1]['plan'][0], ranks[1]['plan'][1]
    key = 'conv.experts.0.weight'  # rank 1 had no image of its domain in the first step
    assert not torch.equal(before[key], after[key])


def test_an_expert_idle_on_every_rank_does_not_move(ranks):
    for rank in range(2):
        for step in (1, 2):  # e2 has momentum from the first step, and weight decay
            before, after = ranks[rank]['plan'][step], ranks[rank]['plan'][step + 1]
            idle = [key for key in before if '.experts.2.' in key]
            assert len(idle) == 9
            for key in idle:
                assert torch.equal(before[key], after[key]), key


def test_sync_batch_norm_in_an_expert_is_refused_and_does_not_hang(ranks):
    for result in ranks:
        assert 'ffn.experts.1.layers.1 is a SyncBatchNorm' in result['sync']
