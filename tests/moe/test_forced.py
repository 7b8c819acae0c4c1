"""Forced routing computes what it says, on every granularity, and leaves nothing behind."""

import pytest
import torch
from moe_testlib import (
    MIXED,
    learned_routers,
    moe_of,
    plan_router,
    scatter_experts,
    topk_router,
)
from torch import nn

from mmdet_moe.moe import RoutingState, forced_routing, moe_layers, replace_modules
from mmdet_moe.planning import ExpertPlan


def learned(module=None, experts=3, **spec):
    """A layer with three different experts behind a top-2 router."""
    torch.manual_seed(0)
    router = spec.pop('router', topk_router(k=2))
    layer, state = moe_of(module or nn.Conv2d(2, 2, 1), num_experts=experts, router=router, **spec)
    scatter_experts(layer)
    with torch.no_grad():
        if hasattr(layer.router, 'gate'):
            layer.router.gate.normal_()
    return layer.eval(), state


def run(layer, state, x):
    state.begin(num_images=x.shape[0])
    return layer(x)


@pytest.fixture
def maps():
    return torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1))


def test_one_expert_alone_is_that_expert(maps):
    layer, state = learned()
    with forced_routing(layer, expert=2):
        out = run(layer, state, maps)
    assert torch.equal(out, layer.experts[2](maps))


def test_equal_weights_are_the_mean_of_all_experts(maps):
    layer, state = learned()
    with forced_routing(layer, equal=True):
        out = run(layer, state, maps)
    mean = sum(expert(maps) for expert in layer.experts) / 3
    torch.testing.assert_close(out, mean)
    # 4 images x 1/3
    assert state.stats()[f'{layer.name}/weight'].tolist() == pytest.approx([4 / 3] * 3)


@pytest.mark.parametrize('k', [1, 2, 3])
def test_k_experts_are_weighed_by_the_softmax_over_their_logits(maps, k):
    layer, state = learned()
    logits = maps.mean((2, 3)) @ layer.router.gate.t()
    kept = logits.argsort(dim=1, descending=True)[:, :k]
    expected = []
    for image, row, chosen in zip(maps, logits, kept, strict=True):
        weights = row[chosen].exp() / row[chosen].exp().sum()
        pairs = zip(weights, chosen.tolist(), strict=True)
        expected.append(sum(w * layer.experts[e](image) for w, e in pairs))
    with forced_routing(layer, k=k):
        out = run(layer, state, maps)
    torch.testing.assert_close(out, torch.stack(expected))


MEANS = {'a': [1.0, 0.0], 'b': [0.0, 1.0], 'c': [-1.0, 0.0]}
PLAN = ExpertPlan.from_assignment(
    {'a': 'e0', 'b': 'e1', 'c': 'e2'},
    prototypes=dict(embedder={}, dimension=2, mean=MEANS, concentration=8.0),
)
#: Router -> its own k; without one, the n at which all its experts have their weights.
OWN = {
    **dict.fromkeys(['noisy', 'gshard', 'sinkhorn-2', 'damex', 'moe++'], 2),
    **dict.fromkeys(['cosine', 'switch', 'sinkhorn', 'base', 'plan-prior', 'plan-prior-1'], 1),
    'remoe': 3,
}
ROUTERS = {
    **{name: router for name, router in learned_routers(PLAN).items() if name in OWN},
    'top-1': topk_router(k=1),
    'top-2 of all': topk_router(k=2, renormalize=False),
}


@pytest.mark.parametrize('name', ROUTERS)
def test_the_routers_own_k_changes_nothing(maps, name):
    layer, state = learned(router=ROUTERS[name])

    def run():
        embeddings = torch.nn.functional.normalize(torch.tensor([[1.0, 0.2]] * 4), dim=1)
        state.begin(domains=['a', 'b', 'c', 'a'], embed=lambda: embeddings)
        return layer(maps), state.stats()

    plain, stats = run()
    k = OWN.get(name) or ROUTERS[name]['k']
    with forced_routing(layer, k=k):
        out, forced_stats = run()
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(forced_stats[f'{layer.name}/weight'], stats[f'{layer.name}/weight'])


def test_other_k_take_the_weights_of_the_routers_own_rule(maps):
    # Logits ln 4, ln 2, ln 2: softmax 1/2, 1/4, 1/4; sigmoids 4/5, 2/3, 2/3.
    def weights(n, **router):
        layer, state = learned(router=dict(bias=True, **router))
        with torch.no_grad():
            layer.router.gate.zero_()
            layer.router.bias.copy_(torch.tensor([4.0, 2, 2]).log())
        seen = []
        state.observers.append(lambda name, routing, context: seen.append(routing.to_dense()))
        with forced_routing(layer, k=n):
            run(layer, state, maps[:1])
        return sorted(seen[0][0].tolist(), reverse=True)

    # The k = 1 router has entries of the full softmax, whatever n is asked for: sum < 1.
    assert weights(2, type='TopKRouter', k=1) == pytest.approx([1 / 2, 1 / 4, 0])
    assert weights(3, type='SwitchRouter', k=1) == pytest.approx([1 / 2, 1 / 4, 1 / 4])
    # One that renormalises: 1/2 and 1/4 of 3/4.
    assert weights(2, type='SwitchRouter', k=3) == pytest.approx([2 / 3, 1 / 3, 0])
    assert weights(1, type='TopKRouter', k=2) == pytest.approx([1, 0, 0])
    # Sigmoids sum to more than 1; ReLU takes the logits.
    assert weights(2, type='SinkhornRouter', k=1) == pytest.approx([4 / 5, 2 / 3, 0])
    assert weights(2, type='BASERouter') == pytest.approx([4 / 5, 2 / 3, 0])
    assert weights(1, type='SinkhornRouter', k=2) == pytest.approx([1 / 2, 0, 0])
    assert weights(1, type='ReMoERouter') == pytest.approx([1.3863, 0, 0], abs=1e-4)
    assert weights(2, type='ExpertChoiceRouter') == pytest.approx([1 / 2, 1 / 4, 0])


def test_free_experts_are_among_the_best_and_zero_ones_take_nothing(maps):
    layer, state = learned(
        experts=2, router=dict(type='MoEPPRouter', k=1, zero=1, copy=1, constant=0)
    )
    # p = 1/2 for the zero expert, 1/4 for e0, 1/8 for e1 and the copy.
    logits = torch.tensor([[2.0, 1, 1, 4]]).log().expand(4, 4)
    layer.router.logits = lambda x: logits
    with forced_routing(layer, k=1):
        assert run(layer, state, maps).abs().max() == 0
    with forced_routing(layer, k=2):
        torch.testing.assert_close(run(layer, state, maps), layer.experts[0](maps))
    with forced_routing(layer, k=4):  # 1/4, 1/8 and 1/8 of 1/2
        e0, e1 = (expert(maps) for expert in layer.experts)
        torch.testing.assert_close(run(layer, state, maps), e0 / 2 + e1 / 4 + maps / 4)


def test_a_layer_found_under_an_alias_is_forced_by_its_name(maps):
    model = nn.Module()
    model.a = nn.Sequential(nn.Conv2d(2, 2, 1))
    model.b = model.a
    state = RoutingState()
    spec = dict(targets=r'b\.0', num_experts=2, router=topk_router(k=1))
    assert replace_modules(model, [spec], state) == ['b.0']
    (layer,) = moe_layers(model.eval()).values()
    state.begin(num_images=4)
    with forced_routing(model, expert=1, layers='b.0'):
        assert torch.equal(model.a(maps), layer.experts[1](maps))


def test_tokens_are_forced_one_by_one():
    layer, state = learned(nn.Linear(4, 4), granularity='token', router=topk_router(k=1))
    x = torch.randn(2, 5, layer.router.in_channels)
    with forced_routing(layer, expert=1):
        state.begin(num_images=2)
        out = layer(x)
    torch.testing.assert_close(out, layer.experts[1](x))
    assert state.stats()[f'{layer.name}/count'].tolist() == [0, 10, 0]


def test_a_plan_gives_its_largest_weights_and_no_more(maps):
    layer, state = moe_of(nn.Conv2d(2, 2, 1), router=plan_router(MIXED))
    scatter_experts(layer)
    state.begin(domains=['mixed'] * 4)
    with forced_routing(layer, k=1):
        # mixed: e0 .25, e2 .75; the best one takes it all.
        torch.testing.assert_close(layer(maps), layer.experts[2](maps))
    with forced_routing(layer, k=3), pytest.raises(ValueError, match='gives no logits.*k=3'):
        layer(maps)


def test_soft_moe_has_no_best_k_but_single_experts():
    layer, state = learned(nn.Linear(4, 4), router=dict(type='SoftMoERouter'))
    x = torch.randn(2, 3, 4)
    with forced_routing(layer, expert=0):
        state.begin(num_images=2)
        torch.testing.assert_close(layer(x), layer.experts[0](x))
    with forced_routing(layer, k=1), pytest.raises(ValueError, match='neither logits nor a choice'):
        layer(x)


def test_named_layers_only_and_the_router_again_after_an_error(maps):
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    state = RoutingState()
    replace_modules(model, [dict(targets='[01]', num_experts=2, router=topk_router(k=1))], state)
    for layer in moe_layers(model).values():
        scatter_experts(layer)
    model.eval()
    state.begin(num_images=4)
    plain = model(maps)
    with pytest.raises(RuntimeError, match='stop'), forced_routing(model, expert=1, layers=['1']):
        state.begin(num_images=4)
        model(maps)
        stats = state.stats()
        raise RuntimeError('stop')
    assert stats['1/count'].tolist() == [0, 4]
    assert all(layer.forced is None for layer in moe_layers(model).values())
    state.begin(num_images=4)
    assert torch.equal(model(maps), plain)


def test_contexts_nest(maps):
    layer, state = learned()
    with forced_routing(layer, expert=0):
        with forced_routing(layer, expert=1):
            assert torch.equal(run(layer, state, maps), layer.experts[1](maps))
        assert torch.equal(run(layer, state, maps), layer.experts[0](maps))


@pytest.mark.parametrize(
    ('what', 'message'),
    [
        ({}, 'exactly one'),
        (dict(expert=0, equal=True), 'exactly one'),
        (dict(expert=3), 'experts 0 to 2, not 3'),
        (dict(k=4), 'k must be 1 to 3'),
        (dict(k=1, layers=['nowhere']), r"no MoE layer is called \['nowhere'\]"),
    ],
)
def test_what_cannot_be_forced_is_refused_by_name(what, message):
    layer, _ = learned()
    with pytest.raises(ValueError, match=message), forced_routing(layer, **what):
        pass


def test_observers_see_every_call_once_and_the_forced_routing(maps):
    layer, state = learned()
    seen = []
    state.observers.append(lambda name, routing, context: seen.append((name, routing.to_dense())))
    run(layer, state, maps)
    layer(maps)
    with forced_routing(layer, expert=1):
        layer(maps)
    assert [name for name, _ in seen] == [layer.name] * 3
    # Top-2 of 3: two weights an image, which sum to 1.
    assert (seen[0][1] > 0).sum(1).tolist() == [2] * 4
    torch.testing.assert_close(seen[0][1].sum(1), torch.ones(4))
    assert seen[2][1].tolist() == [[0, 1, 0]] * 4


def test_observers_do_not_see_recomputations():
    layer, state = learned(nn.Conv2d(2, 2, 1))
    layer.train()
    seen = []
    state.observers.append(lambda *call: seen.append(call))
    x = torch.randn(2, 2, 3, 3, requires_grad=True)
    state.begin(num_images=2, training=True)
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)
    loss = out.sum() + sum(state.collect().values())
    loss.backward()
    assert len(seen) == 1


def test_dense_weights_of_a_soft_layer_sum_to_one():
    layer, state = learned(nn.Linear(4, 4), router=dict(type='SoftMoERouter', slots=2))
    seen = []
    state.observers.append(lambda name, routing, context: seen.append(routing))
    state.begin(num_images=2)
    layer(torch.randn(2, 3, 4))
    dense = seen[0].to_dense()
    assert dense.shape == (6, 3)
    torch.testing.assert_close(dense.sum(1), torch.ones(6))
    torch.testing.assert_close(dense.sum(0), seen[0].importance())
