"""Two gloo processes: what a layer holds over the steps counts the items of both ranks.

Balancing constraints count importance, ReMoE the sparsity; neither waits for a rank's items.
One spawn runs every scenario; each constraint is also run in one process on both ranks' images
together, which is what two ranks must amount to.
"""

import os
from datetime import timedelta

import pytest
import torch
from moe_testlib import ToyFFN, moe_of, topk_router, two_processes
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
#: Items of rank 0, whose every weight is positive, and of rank 1, whose every weight is zero; None:
#: the layer does not run. With the steps of ReMoE's coefficient for E = 4 experts and a target of
#: 1, that is a quarter of the weights.
REMOE_STEPS = [
    (1, 7, -1),  # 4 of 32 weights are positive; rank 0 alone would say +1
    (3, 5, +1),  # 12 of 32; rank 1 alone would say -1
    (2, 6, 0),  # 8 of 32
    (1, 0, +1),  # 4 of 4: rank 1 has an empty batch
    (None, 2, -1),  # 0 of 8
    (None, None, 0),  # nothing was seen
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


def train_remoe(rank):
    """ReMoE's coefficient, from 1, after each step."""
    router = dict(type='ReMoERouter', target=1, coefficient=1.0, factor=1.2)
    layer, state = moe_of(ToyFFN(4), num_experts=4, router=router, granularity='token')
    layer.router.gate.data = torch.eye(4)  # an item's logits are its channels
    seen = []
    for step in REMOE_STEPS:
        state.begin(num_images=1, training=True)
        items = step[rank]
        if items is not None:
            layer(torch.full((1, items, 4), 1.0 if rank == 0 else -1.0))
        state.collect()
        seen.append(layer.router.coefficient.item())
    return seen


def worker(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=rank, world_size=2, timeout=timedelta(minutes=4))
    kinds = ('plain', 'checkpointed', 'skipped', 'empty')
    result = {kind: train(kind, rank) for kind in kinds}
    torch.save({**result, 'remoe': train_remoe(rank)}, f'{folder}/{rank}.pth')
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


def test_remoe_moves_its_coefficient_by_the_sparsity_of_both_ranks(ranks):
    expected, power = [], 0
    for *_, sign in REMOE_STEPS:
        power += sign
        expected.append(pytest.approx(1.2**power, rel=1e-6))
    # 1/1.2, 1, 1, 1.2, 1, 1
    for result in ranks:
        assert result['remoe'] == expected
