"""Every router in DINO, RetinaNet and a ViT: five steps in float32, bfloat16, with activation
checkpointing, and in two processes.

Each run keeps a record of every step, and the tests compare records. One spawn runs all cases of
two processes.
"""

from __future__ import annotations

import copy
import functools
import os
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.runner import autocast
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from moe_testlib import learned_routers, two_processes
from tiny_models import TARGETS, build, colour_plan, raw_batch
from torch import distributed as dist

from mmdet_moe.moe import ROUTERS

STEPS, E = 5, 3
#: An image each; no image is of 'yard', whose expert is idle under the plan. One per rank.
DOMAINS = ['street', 'blood']
KINDS = ['dino', 'retinanet', 'vit']
PLAN = colour_plan()
ROUTER_CFGS = {
    # One variant of a router will do here.
    **{k: v for k, v in learned_routers(PLAN).items() if k not in ('sinkhorn-2', 'plan-prior-1')},
    'plan': dict(type='PlanRouter', plan=PLAN),
}
#: As the shipped configs balance.
BALANCE = {
    **dict.fromkeys(['noisy', 'cosine'], ['ImportanceLoss', 'LoadLoss']),
    **dict.fromkeys(['switch', 'gshard'], ['SwitchLoss']),
}
CASES = [
    (kind, name)
    for kind in KINDS
    for name in ROUTER_CFGS
    # Convolutions have no tokens: see the test of the refusal.
    if (kind, name) != ('retinanet', 'soft')
]


def spec_of(kind, name):
    if kind == 'retinanet':
        # The regression branch gets no gradient from a level without a box.
        targets = r'bbox_head\.cls_convs\.\d'
    elif kind == 'vit':
        targets = r'backbone\.layers\.\d\.ffn'
    elif name in ('soft', 'expert-choice'):  # as in their configs, which say why
        targets = r'encoder\.layers\.0\.ffn'
    else:
        targets = TARGETS['dino']
    balance = [dict(type=loss) for loss in BALANCE.get(name, ())]
    spec = dict(targets=targets, num_experts=E, router=ROUTER_CFGS[name], balance=balance)
    # Between equal experts that all take an item there is nothing to choose, and no gradient.
    return dict(spec, noise=0.1)


#: Two layers in a row, for gates that look at the layer before.
CHANGES = dict(retinanet=dict(head=dict(stacked_convs=2)))


@functools.cache
def dense_weights(kind):
    return build(kind, **CHANGES.get(kind, {})).state_dict()


def fresh(kind, name, **router):
    spec = spec_of(kind, name)
    spec['router'] = {**spec['router'], **router}
    model = build(kind, moe=[spec], init=False, **CHANGES.get(kind, {}))
    model.load_state_dict(copy.copy(dense_weights(kind)))  # into every expert
    return model


class CpuAmpOptimWrapper(OptimWrapper):
    """mmengine's ``AmpOptimWrapper(dtype='bfloat16')``, which refuses to run without a GPU: the
    same context around the forward, without the scaler that bfloat16 has no need of."""

    @contextmanager
    def optim_context(self, model):
        with super().optim_context(model), autocast('cpu', dtype=torch.bfloat16):
            yield


def optim_wrapper(model, cls=OptimWrapper, **options):
    # Momentum would move an expert whose gradient is zero and not None. No adaptive steps: they
    # blow rounding up where a gradient is nearly zero.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    return cls(optimizer, clip_grad=dict(max_norm=1.0), **options)


def parameters(layer):
    """Those of each expert, and of the router."""
    return [*(list(expert.parameters()) for expert in layer.experts), [*layer.router.parameters()]]


def take_step(model, wrapper, batches, run=None):
    """``train_step`` on each of ``batches``; what it logged, who had items, what moved."""
    layers = model.moe_layers()
    before = {
        name: [[p.detach().clone() for p in part] for part in parameters(layer)]
        for name, layer in layers.items()
    }
    logs, counts = [], dict.fromkeys(layers, 0)
    for seed, batch in batches:
        torch.manual_seed(seed)
        log = (run or model).train_step(batch, wrapper)
        logs.append({key: torch.as_tensor(value).item() for key, value in log.items()})
        for name in layers:
            counts[name] = counts[name] + model.routing_state.stats()[f'{name}/count'][:E]
    if run is not None:
        for count in counts.values():
            dist.all_reduce(count)
    moved = {
        name: [
            any(not torch.equal(p, q) for p, q in zip(part, old, strict=True))
            for part, old in zip(parameters(layer), before[name], strict=True)
        ]
        for name, layer in layers.items()
    }
    return dict(logs=logs, counts=counts, moved=moved)


def check(records, learns):
    """What holds however a router trains: finite losses, and what has no item does not move."""
    for record in records:
        for log in record['logs']:
            assert all(torch.isfinite(torch.tensor(value)) for value in log.values()), log
        for name, (*experts, _) in record['moved'].items():
            assert experts == (record['counts'][name] > 0).tolist(), (name, record)
    for name in records[0]['moved']:
        assert any(record['moved'][name][-1] for record in records) is learns, name


def train(kind, name, how='float32'):
    """Records of five steps of one process on both images, and the model."""
    model = fresh(kind, name)
    cls = CpuAmpOptimWrapper if how == 'bfloat16' else OptimWrapper
    if how == 'checkpointed':
        # A ViT names its FFN's identity, and mmengine's wrapper takes no named arguments.
        names = [key.removesuffix('.ffn') if kind == 'vit' else key for key in model.moe_names]
        turn_on_activation_checkpointing(model, names)
    wrapper = optim_wrapper(model, cls)
    records = [
        take_step(model, wrapper, [(step, raw_batch(kind, DOMAINS))]) for step in range(STEPS)
    ]
    return records, model


#: Float32 runs, which the others are compared with.
exactly = functools.cache(train)


def train_on(batches, kind, name, run_on_ranks=False):
    """Records, and the weights of the layers, after five steps on the sum of ``batches``.

    Args:
        batches: The domains of each batch, by a number that its random numbers depend on.
        kind, name: The model and the router.
        run_on_ranks: Whether other ranks have batches, too.
    """
    # ReMoE's coefficient is fixed here, because it moves once per forward, and one process has two
    # of them in a step. How it moves on two ranks: tests/moe/test_constraints_ddp.py.
    model = fresh(kind, name, **({'factor': 1 + 1e-12} if name == 'remoe' else {}))
    run = None
    if run_on_ranks:
        run = MMDistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)
    wrapper = optim_wrapper(model, accumulative_counts=len(batches))
    records = []
    for step in range(STEPS):
        seeded = [(2 * step + i, raw_batch(kind, domains)) for i, domains in batches.items()]
        records.append(take_step(model, wrapper, seeded, run))
    if run_on_ranks:
        every = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        first = every.clone()
        dist.broadcast(first, 0)
        assert torch.equal(every, first), f'{kind}, {name}: ranks have parted'
    layers = model.moe_layers().values()
    return records, [p.detach() for layer in layers for p in layer.parameters()]


IN_TURN = {rank: [domain] for rank, domain in enumerate(DOMAINS)}


def worker(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=rank, world_size=2, timeout=timedelta(minutes=4))
    own = {rank: IN_TURN[rank]}
    results = {case: train_on(own, *case, run_on_ranks=True) for case in CASES}
    torch.save(results, f'{folder}/{rank}.pth')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    return two_processes(worker, tmp_path_factory.mktemp('ddp'))


def learns(name):
    return ROUTERS.get(ROUTER_CFGS[name]['type']).learned


each_case = pytest.mark.parametrize(('kind', 'name'), CASES)


def test_every_registered_router_is_here():
    ours = {k for k, c in ROUTERS.classes.items() if c.__module__.startswith('mmdet_moe.')}
    # SingleRouter routes nothing: it is what a layer of one adapter has (test_moa.py).
    assert {cfg['type'] for cfg in ROUTER_CFGS.values()} == ours - {'SingleRouter'}


@each_case
def test_five_steps_move_the_router_and_the_experts_with_items(kind, name):
    records, model = exactly(kind, name)
    check(records, learns(name))
    # At test, without domains.
    model.eval()
    for item in model.test_step(raw_batch(kind, DOMAINS, told=False)):
        scores = item.pred_score if kind == 'vit' else item.pred_instances.scores
        assert scores.isfinite().all()


@each_case
def test_five_steps_under_bfloat16_autocast(kind, name):
    records, model = train(kind, name, 'bfloat16')
    check(records, learns(name))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    exact, _ = exactly(kind, name)
    assert records[0]['logs'][0]['loss'] == pytest.approx(exact[0]['logs'][0]['loss'], rel=0.1)


@each_case
def test_activation_checkpointing_changes_nothing(kind, name):
    records, model = train(kind, name, 'checkpointed')
    exact, other = exactly(kind, name)
    assert_same(records, exact)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-6)


@each_case
def test_two_ranks_train_one_model_and_equal_one_process(ranks, kind, name):
    (ours, weights), (theirs, others) = (result[kind, name] for result in ranks)
    check(ours, learns(name))
    check(theirs, learns(name))
    torch.testing.assert_close(weights, others, rtol=0, atol=0)
    expected, alone = train_on(IN_TURN, kind, name)
    torch.testing.assert_close(weights, alone, rtol=1e-4, atol=1e-5)
    for step in range(STEPS):
        assert_logs_close([ours[step]['logs'][0], theirs[step]['logs'][0]], expected[step]['logs'])


@pytest.mark.parametrize('name', ['plan', 'plan-prior', 'expert-choice', 'soft'])
def test_two_ranks_equal_one_batch_where_no_image_depends_on_others(ranks, name):
    """A ViT, whose loss is a mean over images; the other routers draw or count over the batch."""
    weights = ranks[0]['vit', name][1]
    _, alone = train_on({0: DOMAINS}, 'vit', name)
    torch.testing.assert_close(weights, alone, rtol=1e-4, atol=1e-5)


def test_soft_moe_is_refused_on_convolutions():
    spec = spec_of('retinanet', 'soft')
    with pytest.raises(ValueError, match="'token' of SoftMoERouter does not suit a ConvModule"):
        build('retinanet', moe=[spec], init=False)
    with pytest.raises(ValueError, match=r"SoftMoERouter routes by \('token',\), not by 'image'"):
        build('retinanet', moe=[dict(spec, granularity='image')], init=False)


def test_items_of_a_retina_head_are_pairs_of_image_and_level():
    records, _ = exactly('retinanet', 'plan')
    # An image for e0 and one for e1, on three levels each.
    for counts in records[0]['counts'].values():
        assert counts.tolist() == [3, 3, 0]


def assert_same(records, expected):
    for got, want in zip(records, expected, strict=True):
        torch.testing.assert_close(got['counts'], want['counts'], rtol=0, atol=0)
        assert got['moved'] == want['moved']
        assert_logs_close(got['logs'], want['logs'])


def assert_logs_close(logs, expected):
    for got, want in zip(logs, expected, strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5)
