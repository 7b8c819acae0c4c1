"""What every router promises, whatever its method: one table of routers, one test per promise."""

import copy

import pytest
import torch
from moe_testlib import ToyFFN, learned_routers, moe_of, scatter_experts
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdet_moe.moe import ROUTERS, Router, RoutingState, upcycle_
from mmdet_moe.moe.soft import SlotRouting
from mmdet_moe.planning import ExpertPlan

D, E, B, N = 6, 3, 4, 5
MEANS = {'a': [1.0, 0.0], 'b': [0.0, 1.0], 'mixed': [-1.0, 0.0]}
MIXED = {'a': 'e0', 'b': 'e1', 'mixed': {'e0': 0.25, 'e2': 0.75}}
DOMAINS = ['a', 'b', 'mixed', 'b']
X = torch.randn(B, N, D, generator=torch.Generator().manual_seed(0))


def plan(assignment):
    prototypes = dict(embedder={}, dimension=2, mean=MEANS, concentration=8.0)
    return ExpertPlan.from_assignment(assignment, prototypes=prototypes)


ALL = learned_routers(plan(MIXED))
ONE_EXPERT = learned_routers(plan({'a': 'e0', 'b': 'e0', 'mixed': 'e0'}))
#: Weights of every item sum to 1 and nothing is dropped: experts that are copies do as the dense.
KEEP = {'noisy', 'sinkhorn-2', 'damex', 'plan-prior', 'plan-prior-1'}


def layer_of(name, experts=E, seed=0, **spec):
    torch.manual_seed(seed)
    cfg = dict(ALL[name])
    if experts == 1:
        cfg = dict(ONE_EXPERT[name])
        cfg.update({'k': 1} if 'k' in cfg or name in ('gshard', 'moe++') else {})
        if name == 'damex':
            cfg['router'] = dict(type='TopKRouter', k=1)
    spec.setdefault('granularity', 'token')
    layer, state = moe_of(ToyFFN(D), num_experts=experts, router=cfg, **spec)
    scatter_experts(layer)
    return layer, state


def begin(state, images=B, training=True):
    # At test nobody tells the domains; the embeddings are there for those that ask.
    z = torch.nn.functional.normalize(torch.randn(B, 2, generator=torch.Generator().manual_seed(3)))
    domains = DOMAINS[:images] if training else None
    state.begin(domains, images, embed=lambda: z[:images], training=training)


def step(layer, state, x=X, how=None, autocast=False, seed=5):
    """One forward and backward; the loss, and the gradients by name."""
    torch.manual_seed(seed)
    layer.zero_grad()
    begin(state, len(x))
    x = x.clone().requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
        out = layer(x) if how is None else checkpoint(layer, x, use_reentrant=how == 'reentrant')
        loss = out.float().square().mean() + sum(state.collect().values())
    loss.backward()
    return loss.item(), {k: p.grad for k, p in layer.named_parameters()}


@pytest.fixture(params=ALL)
def name(request):
    return request.param


def test_every_registered_router_is_in_the_table():
    tested = {cfg['type'] for cfg in ALL.values()}
    ours = {k for k, c in ROUTERS.classes.items() if c.__module__.startswith('mmdet_moe.')}
    assert ours - tested == {'PlanRouter', 'SingleRouter'}  # they learn nothing


@pytest.mark.parametrize('granularity', ['token', 'image'])
def test_gradients_reach_the_router_and_the_experts(name, granularity):
    if name == 'soft' and granularity == 'image':
        with pytest.raises(ValueError, match=r"routes by \('token',\), not by 'image'"):
            layer_of(name, granularity=granularity)
        return
    layer, state = layer_of(name, granularity=granularity)
    loss, grads = step(layer, state)
    assert torch.isfinite(torch.tensor(loss))
    own = {k: g for k, g in grads.items() if k.startswith('router.')}
    assert own and any(g is not None and g.abs().sum() > 0 for g in own.values())
    assert all(g is None or g.isfinite().all() for g in grads.values())
    assert any(g is not None for k, g in grads.items() if k.startswith('experts.'))


@pytest.mark.parametrize('how', ['reentrant', 'non-reentrant'])
def test_activation_checkpointing_gives_the_same_gradients_and_buffers(name, how):
    results = []
    for kind in (None, how):
        layer, state = layer_of(name)
        found = [step(layer, state, how=kind, seed=s) for s in (5, 6)]  # buffers moved by then
        results.append((found[-1][0], found[-1][1], layer.state_dict()))
    (loss, grads, buffers), (loss2, grads2, buffers2) = results
    assert loss == pytest.approx(loss2, rel=1e-5)
    torch.testing.assert_close(buffers, buffers2, rtol=0, atol=0)
    for key, grad in grads.items():
        if grad is None:
            assert grads2[key] is None, key
        else:
            torch.testing.assert_close(grads2[key], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('how', [None, 'reentrant', 'non-reentrant'])
def test_under_bfloat16_autocast_the_loss_is_close_and_gradients_are_finite(name, how):
    layer, state = layer_of(name)
    loss, grads = step(layer, state, how=how, autocast=True)
    assert all(g is None or g.isfinite().all() for g in grads.values())
    exact, _ = step(*layer_of(name))
    assert loss == pytest.approx(exact, rel=0.2)


def test_an_empty_batch_gives_an_empty_result_and_finite_losses(name):
    layer, state = layer_of(name)
    for shape in [(0, N, D), (B, 0, D)]:
        begin(state, shape[0])
        out = layer(torch.zeros(shape, requires_grad=True))
        assert out.shape == shape
        losses = state.collect()
        assert all(v.isfinite() for v in losses.values())
        total = out.sum() + sum(losses.values())
        if total.requires_grad:  # a loss of no item at all needs no graph
            total.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_one_expert_works(name):
    layer, state = layer_of(name, experts=1)
    loss, grads = step(layer, state)
    assert torch.isfinite(torch.tensor(loss))
    assert all(g is None or g.isfinite().all() for g in grads.values())


def test_equal_seeds_give_equal_results_and_evaluation_needs_none(name):
    layer, state = layer_of(name)
    other, other_state = layer_of(name)
    loss, grads = step(layer, state)
    loss2, grads2 = step(other, other_state)
    assert loss == loss2
    for key, grad in grads.items():
        assert (grad is None) == (grads2[key] is None)
        assert grad is None or torch.equal(grad, grads2[key]), key
    layer.eval()
    outs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        begin(state, training=False)
        outs.append(layer(X))
        assert state.collect() == {}
    assert torch.equal(*outs)


def test_the_state_dict_carries_everything(name):
    layer, state = layer_of(name)
    for seed in range(3):
        step(layer, state, seed=seed)
    other, other_state = layer_of(name, seed=9)
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert step(layer, state)[0] == step(other, other_state)[0]
    torch.testing.assert_close(layer.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_a_dense_checkpoint_loads_and_keeps_the_function_where_promised(name):
    dense = ToyFFN(D)
    layer, state = layer_of(name)
    layer.load_state_dict(dense.state_dict())
    layer.eval()
    begin(state, training=False)
    same = torch.allclose(layer(X), dense(X), atol=1e-5)
    assert layer.keeps_dense_function == (name in KEEP)
    assert same or name not in KEEP


def test_upcycling_resets_router_and_experts(name):
    layer, state = layer_of(name)
    for seed in range(2):
        step(layer, state, seed=seed)
    fresh, _ = layer_of(name)
    with torch.no_grad():
        for p in layer.router.parameters():
            p.add_(1.0)
    for one in (layer, fresh):
        holder = nn.ModuleDict({'target': one})
        upcycle_(holder, seed=3)
    torch.testing.assert_close(layer.router.state_dict(), fresh.router.state_dict())
    first = layer.experts[0].state_dict()
    for expert in layer.experts:
        torch.testing.assert_close(dict(expert.state_dict()), dict(first))


def test_weights_are_finite_and_where_promised_sum_to_one(name):
    layer, state = layer_of(name)
    found = []

    def watch(module, inputs, routing):
        found.append(routing)

    handle = layer.router.register_forward_hook(watch)
    layer.eval()
    begin(state, training=False)
    layer(X)
    handle.remove()
    routing = found[0]
    assert routing.importance().isfinite().all()
    if isinstance(routing, SlotRouting):
        assert routing.importance().sum().item() == pytest.approx(B * N, rel=1e-5)
    elif name in KEEP:
        sums = torch.zeros(B * N).index_add_(0, routing.items, routing.weights)
        torch.testing.assert_close(sums, torch.ones(B * N))
    stats = state.stats()
    assert stats['target/count'].shape == stats['target/weight'].shape


def test_unknown_arguments_are_named(name):
    with pytest.raises(TypeError, match=r"takes no \['kk'\]"):
        moe_of(ToyFFN(D), num_experts=E, router=dict(ALL[name], kk=1))


def test_a_router_is_one(name):
    layer, _ = layer_of(name)
    assert isinstance(layer.router, Router) and repr(layer)
    state = RoutingState()
    assert copy.deepcopy(layer).state is not state
