"""Two gloo processes: constraints count the importance of both ranks, and wait for nobody.

One spawn runs every scenario; each is also run in one process on both ranks' images together, which
is what two ranks must amount to.
"""

import os
from datetime import timedelta

import pytest
import torch
from moe_testlib import ToyFFN, topk_router, two_processes
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mmdet_moe.moe import RoutingState, replace_modules

#: Images of each rank, step by step.
STEPS = [(2, 2), (3, 1), (2, 2), (1, 3), (2, 2)]
BALANCE = [
    dict(type='RelativeImportanceConstraint', threshold=0.2),
    dict(type='MeanImportanceConstraint', threshold=0.1),
]


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.ffn = ToyFFN(4)
        self.extra = ToyFFN(4)
        self.kind = kind

    def forward(self, x, rank):
        # 'skipped': rank 1 never runs the second layer. 'empty': it runs it with no token.
        self.state.begin(num_images=x.shape[0], training=True)
        if self.kind == 'checkpointed':
            x = checkpoint(self.ffn, x, use_reentrant=False)
        else:
            x = self.ffn(x)
        loss = x.square().mean()
        if rank == 0 or self.kind not in ('skipped', 'empty'):
            loss = loss + self.extra(x).square().mean()
        elif self.kind == 'empty':
            loss = loss + self.extra(x[:, :0]).square().sum()
        return loss + sum(self.state.collect().values())


def build(kind):
    torch.manual_seed(0)
    model = Net(kind)
    model.state = RoutingState()
    router = topk_router(k=1, noise=False)
    spec = dict(targets='ffn|extra', num_experts=4, router=router, granularity='token')
    replace_modules(model, [dict(spec, balance=BALANCE)], model.state)
    for p in model.parameters():
        p.data += 0.5 * torch.randn_like(p)
    return model


def images(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 4, generator=generator).split(STEPS[step])


def accounts(model):
    return {key: b.clone() for key, b in model.named_buffers() if '.balance.' in key}


def train(kind, rank):
    model = build(kind)
    run = DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)
    seen = []
    for step in range(len(STEPS)):
        run(images(step)[rank], rank).backward()
        seen.append(accounts(model))
    return seen


def alone():
    """The same weights (nothing steps them) on both ranks' images in one process."""
    model, seen = build('plain'), []
    for step in range(len(STEPS)):
        model(torch.cat(images(step)), 0)
        seen.append(accounts(model))
    return seen


def worker(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=rank, world_size=2, timeout=timedelta(minutes=4))
    kinds = ('plain', 'checkpointed', 'skipped', 'empty')
    torch.save({kind: train(kind, rank) for kind in kinds}, f'{folder}/{rank}.pth')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    return two_processes(worker, tmp_path_factory.mktemp('ddp'))


@pytest.mark.parametrize('kind', ['plain', 'checkpointed', 'skipped', 'empty'])
def test_all_ranks_keep_the_same_account(ranks, kind):
    for ours, theirs in zip(ranks[0][kind], ranks[1][kind], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize('kind', ['plain', 'checkpointed'])
def test_two_ranks_count_what_one_process_counts_on_both_batches(ranks, kind):
    expected = alone()
    assert len(expected[0]) == 6
    assert any((step['ffn.balance.0.relative'] > 0.2).any() for step in expected)
    for step, ours in zip(expected, ranks[0][kind], strict=True):
        torch.testing.assert_close(ours, step, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', ['skipped', 'empty'])
def test_a_rank_without_items_takes_part(ranks, kind):
    first = ranks[1][kind][0]
    # Rank 1 had no item for this layer, and knows what rank 0 had.
    assert first['extra.balance.1.batches'].item() == 1
    assert first['extra.balance.0.relative'].abs().sum() > 0
