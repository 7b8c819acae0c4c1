"""Two gloo processes: adapters idle on one rank or on both, and Kronecker factors shared by all."""

import os

import pytest
import torch
from moe_testlib import plan_router, two_processes
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmdet_moe.moe import RoutingState, replace_modules

#: Of two images per rank, step by step. Plan: a -> e0, b -> e1, c -> e2.
STEPS = [('ac', 'bc'), ('aa', 'ab'), ('aa', 'bb')]
IDLE_LAST = 2  # no c after the first step


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 4)
        self.state = RoutingState()

    def forward(self, x, domains):
        self.state.begin(domains, training=self.training)
        return self.two(self.one(x).tanh()).square().mean()


def build():
    torch.manual_seed(0)
    model = Net()
    adapters = dict(type='KAdaptation', ranks=[1, 2, 3], size=4, terms=3, dropout=0.0)
    spec = dict(targets='one|two', adapters=adapters, router=plan_router())
    replace_modules(model, [spec], model.state)
    for layer in (model.one, model.two):
        for p in layer.experts.parameters():
            p.data += 0.3 * torch.randn_like(p)
    return model.double()


def batch(step):
    """(4, 8) images of both ranks."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 5, 8, generator=generator).double()


def train(model, own):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    seen = []
    for step, domains in enumerate(STEPS):
        optimizer.zero_grad(set_to_none=True)
        rows, names = own(batch(step), domains)
        model(rows, names).backward()
        optimizer.step()
        seen.append({k.removeprefix('module.'): v.clone() for k, v in model.state_dict().items()})
    return seen


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    model = DistributedDataParallel(build(), find_unused_parameters=True)
    half = slice(2 * rank, 2 * rank + 2)
    seen = train(model, lambda x, domains: (x[half], list(domains[rank])))
    torch.save(seen, f'{folder}/{rank}.pth')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    return two_processes(worker, tmp_path_factory.mktemp('ddp'))


def test_two_ranks_learn_what_one_process_does(ranks):
    alone = train(build(), lambda x, domains: (x, [*domains[0], *domains[1]]))
    for first, second, wanted in zip(*ranks, alone, strict=True):
        assert first.keys() == wanted.keys()
        for key in wanted:
            assert torch.equal(first[key], second[key]), key
            torch.testing.assert_close(first[key], wanted[key], rtol=1e-8, atol=1e-10, msg=key)


def test_an_adapter_idle_on_both_ranks_does_not_move(ranks):
    before, after = ranks[0][0], ranks[0][-1]
    for key in before:
        idle = f'experts.{IDLE_LAST}.' in key or key.endswith('base.weight')
        assert torch.equal(after[key], before[key]) is idle, key
