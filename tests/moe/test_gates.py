"""GAP-FC and Conv-GAP-FC: what the gates compute, where they go, what they refuse."""

import pytest
import torch
from moe_testlib import MIXED, moe_of, topk_router
from torch import nn
from torch.nn import functional as F

from mmdet_moe.moe import RoutingState, replace_modules, upcycle_
from mmdet_moe.moe.routers.gated import mean_of_conv
from mmdet_moe.planning import ExpertPlan

X = torch.randn(4, 3, 6, 5, generator=torch.Generator().manual_seed(0))


def conv_layer(router, **spec):
    torch.manual_seed(0)
    return moe_of(nn.Conv2d(3, 8, 3, padding=1), num_experts=3, router=router, **spec)


def logits_of(layer, state, x=X):
    found = []
    handle = layer.router.register_forward_hook(lambda m, i, routing: found.append(routing))
    layer.eval()
    state.begin(num_images=len(x))
    layer(x)
    handle.remove()
    return found[0].logits


def test_gap_fc_is_a_linear_map_of_the_mean_over_places():
    layer, state = conv_layer(topk_router(bias=True))
    with torch.no_grad():
        layer.router.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    expected = X.mean((2, 3)) @ layer.router.gate.t() + torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(logits_of(layer, state), expected)
    assert layer.router.bias.shape == (3,) and conv_layer(topk_router())[0].router.bias is None


def test_conv_gap_fc_is_the_papers_formula():
    layer, state = conv_layer(topk_router(kind='conv', projection=16))
    (conv,) = layer.router.convs
    assert conv.weight.shape == (16, 3, 3, 3)
    # z = FC(GAP(Conv3x3(x))), no activation.
    expected = F.conv2d(X, conv.weight, conv.bias, padding=1).mean((2, 3)) @ layer.router.gate.t()
    torch.testing.assert_close(logits_of(layer, state), expected)


def test_two_convolutions_with_a_relu_between_and_one_after():
    layer, state = conv_layer(
        topk_router(kind='conv', projection=8, convs=2, activation='relu', bias=True)
    )
    first, second = layer.router.convs
    hidden = F.conv2d(X, first.weight, first.bias, padding=1).relu()
    hidden = F.conv2d(hidden, second.weight, second.bias, padding=1).relu()
    torch.testing.assert_close(
        logits_of(layer, state), F.linear(hidden.mean((2, 3)), layer.router.gate)
    )


@pytest.mark.parametrize('size', [(6, 5), (1, 1), (1, 4), (3, 2)])
def test_the_mean_of_a_convolution_needs_no_convolution(size):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    weight, bias = torch.randn(4, 3, 3, 3).double(), torch.randn(4).double()
    expected = F.conv2d(x, weight, bias, padding=1).mean((2, 3))
    torch.testing.assert_close(mean_of_conv(x, weight, bias), expected)


ROUTERS = {
    'noisy': topk_router(k=2),
    'fixed': topk_router(k=2, noise='fixed'),
    'switch': dict(type='SwitchRouter'),
    'gshard': dict(type='GShardRouter'),
    'expert-choice': dict(type='ExpertChoiceRouter'),
    'sinkhorn': dict(type='SinkhornRouter'),
    'base': dict(type='BASERouter'),
    'remoe': dict(type='ReMoERouter', coefficient=1.0),
    'plan-prior': dict(
        type='PlanPriorRouter', domains='always', plan=ExpertPlan.from_assignment(MIXED)
    ),
}


@pytest.mark.parametrize('name', ROUTERS)
def test_every_gated_router_takes_the_conv_gate_and_teaches_it(name):
    router = dict(ROUTERS[name], kind='conv', projection=8)
    layer, state = conv_layer(router)
    for seed in range(2):  # plan prior's gate starts at zero: the convolution hears of it later
        torch.manual_seed(seed)
        state.begin(['a', 'b', 'mixed', 'a'], training=True)
        loss = layer(X).square().mean() + sum(state.collect().values())
        loss.backward()
        with torch.no_grad():
            for p in layer.parameters():
                p -= 0.0 if p.grad is None else 0.1 * p.grad
    assert layer.router.convs[0].weight.grad.abs().sum() > 0
    assert layer.router.gate.grad.abs().sum() > 0


def test_damex_hands_the_maps_to_a_conv_gate():
    inner = topk_router(kind='conv', projection=8)
    layer, state = conv_layer(dict(type='DAMEXRouter', plan=MIXED, router=inner))
    state.begin(['a', 'b', 'mixed', 'a'], training=True)
    layer(X)
    state.collect()['loss_moe_damex'].backward()
    assert layer.router.inner.convs[0].weight.grad.abs().sum() > 0


def test_learned_noise_sees_what_the_conv_gate_scores():
    layer, state = conv_layer(topk_router(kind='conv', projection=8))
    assert layer.router.noise == 'learned' and layer.router.noise_gate.shape == (3, 8)
    state.begin(num_images=4, training=True)
    layer(X).square().mean().backward()
    assert layer.router.noise_gate.grad.abs().sum() > 0


def test_gates_are_float32_under_autocast_and_empty_batches_pass():
    layer, state = conv_layer(topk_router(kind='conv', projection=8, noise=False))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        logits = logits_of(layer, state)
    assert logits.dtype == torch.float32
    state.begin(num_images=0, training=True)
    layer.train()
    assert layer(X[:0]).shape == (0, 8, 6, 5)


def test_upcycling_resets_the_whole_gate():
    one, two = (conv_layer(topk_router(kind='conv', projection=8, bias=True))[0] for _ in range(2))
    with torch.no_grad():
        for p in one.router.parameters():
            p.add_(1.0)
    for layer in (one, two):
        upcycle_(nn.ModuleDict({'target': layer}))
    torch.testing.assert_close(one.router.state_dict(), two.router.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    'module, granularity, kind',
    [
        (nn.Linear(3, 4), 'token', 'Linear'),
        (nn.Linear(3, 4), 'image', 'Linear'),
        (nn.Sequential(nn.Linear(3, 4)), 'token', 'Sequential'),
    ],
)
def test_conv_gate_is_refused_at_construction_where_items_are_no_maps(module, granularity, kind):
    message = f"conv gate of TopKRouter needs maps .* of a {kind} by '{granularity}' are none"
    router = topk_router(kind='conv')
    with pytest.raises(ValueError, match=message):
        moe_of(module, num_experts=3, router=router, granularity=granularity)


def test_conv_gate_says_so_where_only_the_input_shows_it():
    layer, state = moe_of(
        nn.Sequential(nn.Conv1d(3, 4, 1)), num_experts=3, router=topk_router(kind='conv')
    )
    state.begin(num_images=2)
    with pytest.raises(ValueError, match=r"conv gate of 'target' takes maps .* \(2, 3, 7\)"):
        layer(torch.randn(2, 3, 7))
    layer, state = conv_layer(topk_router(kind='conv'))
    state.begin(num_images=2)
    with pytest.raises(ValueError, match='made for 3 channels and got 5'):
        layer(torch.randn(2, 5, 4, 4))


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(kind='cosine', bias=True), 'the cosine one has its own'),
        (dict(kind='conv', convs=3), 'convs must be 1 or 2, got 3'),
        (dict(kind='conv', activation='tanh'), "None or one of .*relu.*, got 'tanh'"),
        (dict(convs=2), "the conv gate's, kind is 'linear'"),
        (dict(kind='mlp'), "kind must be one of .*conv.*, got 'mlp'"),
    ],
)
def test_impossible_gates_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        conv_layer(topk_router(**options))


# Padding


@pytest.mark.parametrize('router', [
    dict(type='TopKRouter', noise=False),
    dict(type='TopKRouter', noise=False, kind='conv', projection=4),
    dict(type='TopKRouter', noise=False, kind='conv', projection=4, convs=2, activation='relu'),
], ids=['linear', 'conv', 'two convs'])  # fmt: skip
@pytest.mark.parametrize('share', [None, 'image'])
def test_a_gate_does_not_see_the_padding_of_the_batch(router, share):
    torch.manual_seed(0)
    model, state = nn.Sequential(nn.Conv2d(3, 3, 1)), RoutingState()
    spec = dict(targets='0', num_experts=4, router=router, share_router=share)
    replace_modules(model, [{k: v for k, v in spec.items() if v is not None}], state)
    nn.init.normal_(model[0].router.gate)
    seen = []
    model[0].router.register_forward_hook(lambda m, i, routing: seen.append(routing.logits))
    small, large = torch.randn(1, 3, 6, 8), torch.randn(1, 3, 12, 10)
    batch = torch.full((2, 3, 12, 10), 7.0)  # whatever is in the padding
    batch[:1, :, :6, :8], batch[1:] = small, large
    extents = [(6 / 12, 8 / 10), (1.0, 1.0)]
    state.begin(num_images=2, images=batch, extents=extents)
    model(batch)
    for image in (small, large):
        state.begin(num_images=1, images=image, extents=[(1.0, 1.0)])
        model(image)
    if (
        share == 'image' and 'kind' in router
    ):  # pooled to the batch's sides, and so not the same map
        assert not torch.allclose(seen[0], seen[0].flip(0))
    else:
        torch.testing.assert_close(seen[0], torch.cat(seen[1:]))
    state.begin(num_images=2, images=batch)
    model(batch)
    assert not torch.allclose(seen[-1][0], seen[0][0]), 'the padding would have counted'
