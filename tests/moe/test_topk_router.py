"""Noisy top-k: logits, noise and weights as the formulas say."""

import math

import pytest
import torch
from torch.nn import functional as F

from mmdet_moe.moe import RoutingContext, RoutingState, TopKRouter, build_router


def route(router, x, training=False):
    return router(x, RoutingContext(RoutingState(), x.shape[0], training))


def dense_weights(routing):
    out = torch.zeros(routing.num_items, routing.num_experts)
    experts = [e for e, count in enumerate(routing.counts) for _ in range(count)]
    out[routing.items, experts] = routing.weights.detach()
    return out


def test_linear_logits_choose_k_and_renormalise():
    router = TopKRouter(2, 3, k=2)
    with torch.no_grad():
        router.gate.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    routing = route(router, torch.tensor([[1.0, 2.0]]))
    # Logits 1, 2, 3: experts 1 and 2 with softmax(2, 3) = 1 / (1 + e), e / (1 + e)
    e = math.e
    torch.testing.assert_close(
        dense_weights(routing), torch.tensor([[0.0, 1 / (1 + e), e / (1 + e)]])
    )
    assert router.keeps_dense_function and routing.noisy_logits is None


def test_without_renormalising_the_weights_are_those_of_the_softmax_over_all():
    router = TopKRouter(2, 3, k=1)
    assert not router.renormalize and not router.keeps_dense_function
    with torch.no_grad():
        router.gate.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    routing = route(router, torch.tensor([[1.0, 2.0]]))
    total = math.exp(1) + math.exp(2) + math.exp(3)
    assert dense_weights(routing).tolist() == [[0, 0, pytest.approx(math.exp(3) / total)]]


def test_cosine_logits_are_bounded_by_the_temperature():
    router = TopKRouter(5, 4, k=1, kind='cosine', projection=8)
    x = torch.randn(6, 5) * 100
    logits = route(router, x).logits
    projected = router.project(x)
    expected = 2.0 * F.cosine_similarity(projected[:, None], router.expert_embeddings[None], dim=2)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        router.temperature.fill_(50.0)  # exp(50) is far beyond: clamped to 100
    assert route(router, x).logits.abs().max() <= 100.01


def test_learned_noise_is_softplus_of_its_gate_and_fixed_noise_one_over_e():
    torch.manual_seed(0)
    x = torch.randn(4000, 3)
    router = TopKRouter(3, 4, k=2)
    routing = route(router, x, training=True)
    # The noise gate starts at 0: softplus(0) = ln 2
    assert routing.noise_std.unique().tolist() == pytest.approx([math.log(2)])
    noise = routing.noisy_logits - routing.logits
    assert noise.std().item() == pytest.approx(math.log(2), rel=0.03)
    routing = route(TopKRouter(3, 4, k=2, noise='fixed', noise_std=2.0), x, training=True)
    assert (routing.noisy_logits - routing.logits).std().item() == pytest.approx(0.5, rel=0.03)


def test_no_noise_when_testing_or_when_switched_off():
    x = torch.randn(5, 3)
    for router, training in [(TopKRouter(3, 4), False), (TopKRouter(3, 4, noise=False), True)]:
        assert route(router, x, training).noisy_logits is None


def test_under_autocast_the_router_computes_in_float32():
    router = TopKRouter(8, 4, k=2)
    x = torch.randn(6, 8)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        routing = route(router, x)
    assert routing.logits.dtype == torch.float32
    torch.testing.assert_close(routing.logits, route(router, x).logits)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(k=5), 'k must be 1 to 4 experts, got 5'),
        (dict(kind='mlp'), "kind must be one of .* got 'mlp'"),
        (dict(noise='pink'), "noise must be a bool or one of .* got 'pink'"),
        (dict(noise_std=0), 'noise_std must be > 0'),
        (dict(num_experts=0), 'num_experts must be >= 1'),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TopKRouter(**{'in_channels': 3, 'num_experts': 4, **arguments})


def test_other_channels_than_made_for_are_named():
    with pytest.raises(ValueError, match='was made for 3 channels and got 5'):
        route(TopKRouter(3, 4), torch.randn(2, 5))


def test_routers_build_from_dicts():
    cfg = dict(type='mmdet_moe.TopKRouter', k=1, _scope_='mmdet_moe')
    router = build_router(cfg, num_experts=3, in_channels=4, colour='ignored')
    assert isinstance(router, TopKRouter) and router.num_experts == 3
    assert build_router(router) is router
    assert isinstance(build_router(dict(type=TopKRouter, in_channels=2, num_experts=2)), TopKRouter)
    with pytest.raises(KeyError, match="did you mean 'TopKRouter'"):
        build_router(dict(type='TopkRouter'))
    with pytest.raises(KeyError, match='has no type'):
        build_router(dict(k=1))
    with pytest.raises(TypeError, match=r"takes no \['kk'\]"):
        build_router(dict(type='TopKRouter', kk=1), num_experts=3, in_channels=4)
    with pytest.raises(TypeError, match='must be a dict with a type'):
        build_router('TopKRouter')
