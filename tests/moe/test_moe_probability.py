"""Experts that give sigmoid logits are mixed as probabilities, with all digits and safely."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from moe_testlib import scatter_experts
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdet_moe.moe import ProbabilityMoELayer, RoutingContext, RoutingState, mixed_logits


def layer_of(module=None, *, router=None, experts=3, state=None, **options):
    """A layer of copies of ``module`` (default: a 1x1 convolution of 2 channels)."""
    torch.manual_seed(0)
    module = nn.Conv2d(2, 2, 1) if module is None else module
    return ProbabilityMoELayer(
        [copy.deepcopy(module) for _ in range(experts)],
        router or dict(type='TopKRouter', k=2, noise=False),
        RoutingState() if state is None else state,
        in_channels=2,
        **options,
    )


def mix(logits, weights):
    """The layer's arithmetic on given experts' logits (E, ...) and weights (E,)."""
    z, w = torch.as_tensor(logits), torch.as_tensor(weights)
    return mixed_logits((w * z.sigmoid()).sum(0), (w * (-z).sigmoid()).sum(0))


def test_mixture_by_hand():
    # sigma(0) = 1/2, sigma(ln 3) = 3/4: p = 0.4 / 2 + 0.6 * 3/4 = 0.65, y = ln(0.65 / 0.35).
    got = mix([0.0, math.log(3.0)], [0.4, 0.6])
    assert got.item() == pytest.approx(math.log(0.65 / 0.35), abs=1e-6)


def test_weights_that_do_not_sum_to_one_scale_the_probability():
    # One expert, sigma(ln 3) = 3/4, weight 0.2: p = 0.15, y = ln(0.15 / 0.85).
    got = mix([math.log(3.0)], [0.2])
    assert got.item() == pytest.approx(math.log(0.15 / 0.85), abs=1e-6)
    # Above 1 the probability is 1, as near as logits go.
    assert mix([math.log(3.0)], [2.0]).item() == pytest.approx(30 * math.log(10) + math.log(1.5))
    # No expert at all: p = 0.
    assert mixed_logits(torch.zeros(1), torch.zeros(1)).item() == pytest.approx(-30 * math.log(10))


@pytest.mark.parametrize('z', [-60.0, -30.0, -12.0, -0.1, 8.0, 12.0, 30.0, 60.0])
def test_equal_experts_give_what_each_gives_however_sure_it_is(z):
    # 1 - p would be 0 in float32 from z = 17 on.
    weights = torch.tensor([0.1, 0.7, 0.5]).softmax(0)
    assert mix(torch.full((3,), z), weights).item() == pytest.approx(z, rel=1e-5)


@pytest.mark.parametrize('z', [[-1e4, -1e4], [1e4, 1e4], [-1e4, 1e4], [88.0, -88.0], [-104.0, 3.0]])
def test_saturated_scores_have_finite_values_and_gradients(z):
    z = torch.tensor(z, requires_grad=True)
    gate = torch.tensor([0.3, -0.2], requires_grad=True)
    y = mix(z, gate.softmax(0))
    (1e5 * y).backward()  # as large as a loss scale
    assert y.isfinite() and y.abs() < 70
    assert z.grad.isfinite().all() and gate.grad.isfinite().all()


def test_gradients_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(3, 1, generator=generator, dtype=torch.float64, requires_grad=True)

    def logit_of_mixture(z, gate):
        return (gate.softmax(0) * z.sigmoid()).sum(0).logit()

    expected = torch.autograd.grad(logit_of_mixture(z, gate).square().sum(), (z, gate))
    got = torch.autograd.grad(mix(z, gate.softmax(0)).square().sum(), (z, gate))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_layer_mixes_its_experts_as_probabilities():
    layer = layer_of().eval()
    scatter_experts(layer)
    x = torch.randn(4, 2, 3, 3)
    layer.state.begin(num_images=4)
    got = layer(x)
    context = RoutingContext(state=layer.state, num_items=4, training=False)
    routing = layer.router(x.mean((2, 3)), context)
    weights = torch.zeros(4, 3)
    experts = torch.repeat_interleave(torch.arange(3), torch.tensor(routing.counts))
    weights[routing.items, experts] = routing.weights.detach()
    for b in range(4):
        # The experts' own call gives both probabilities, yes and no.
        yes = [expert(x[b : b + 1])[0] for expert in layer.experts]
        p = sum(w * score for w, score in zip(weights[b], yes, strict=True))
        torch.testing.assert_close(got[b : b + 1].sigmoid(), p)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_keeps_sure_scores_and_gives_finite_gradients(dtype):
    dense = nn.Conv2d(2, 2, 1)
    with torch.no_grad():
        # 14 and -20: in half precision 1 - sigma(14) is 0.
        dense.weight.zero_()
        dense.bias.copy_(torch.tensor([14.0, -20.0]))
    layer = layer_of(dense).train()
    x = torch.randn(4, 2, 3, 3)
    layer.state.begin(num_images=4, training=True)
    with torch.autocast('cpu', dtype):
        y = layer(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y[0, :, 0, 0], torch.tensor([14.0, -20.0]), rtol=1e-5, atol=0)
    y.square().mean().backward()
    for key, value in layer.named_parameters():
        assert value.grad is None or value.grad.isfinite().all(), key


def test_reentrant_checkpointing_gives_the_same_gradients():
    x = torch.randn(6, 2, 3, 3)
    grads = []
    for checkpointed in (False, True):
        layer = layer_of(balance=[dict(type='KLLoss', weight=0.5)]).train()
        scatter_experts(layer)
        layer.state.begin(num_images=6, training=True)
        inputs = x.clone().requires_grad_()
        out = checkpoint(layer, inputs, use_reentrant=True) if checkpointed else layer(inputs)
        (out.square().mean() + sum(layer.state.collect().values())).backward()
        grads.append({key: value.grad for key, value in layer.named_parameters()})
    for key, value in grads[0].items():
        torch.testing.assert_close(grads[1][key], value, msg=key)


def test_copies_shared_experts_and_the_dense_warm_up_keep_the_rule():
    dense = nn.Conv2d(2, 2, 1)
    x = torch.randn(4, 2, 3, 3)
    layer = copy.deepcopy(layer_of(dense, shared=[copy.deepcopy(dense)], experts=2)).train()
    for warm_up in (False, True):
        layer.state.begin(num_images=4, training=True)
        layer.state.dense = warm_up
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)


def test_dropped_items_have_probability_zero():
    router = dict(type='TopKRouter', k=1, noise=False, renormalize=True, capacity_factor=0.25)
    layer = layer_of(router=router).train()
    with torch.no_grad():
        layer.router.gate.zero_()  # all to one expert, which takes ceil(0.25 * 4 / 3) = 1 of 4
    layer.state.begin(num_images=4, training=True)
    y = layer(torch.randn(4, 2, 3, 3))
    assert (y[0].abs() < 10).all()
    torch.testing.assert_close(y[1:], torch.full((3, 2, 3, 3), math.log(1e-30)))
    y.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_experts_whose_output_is_added_to_something_are_refused():
    with pytest.raises(ValueError, match=r"'moe' mixes probabilities.*Conv2d.*mix='logit'"):
        layer_of(residual=True)
