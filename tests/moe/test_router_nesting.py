"""Routers in routers, and combinations that make no sense."""

import pytest
import torch
from moe_testlib import ToyFFN, moe_of

DOMAINS = {'a': 'e0', 'b': 'e1'}


def damex(**inner):
    return dict(type='DAMEXRouter', plan=DOMAINS, router=inner)


def test_a_remoe_inside_damex_holds_its_sparsity():
    layer, state = moe_of(ToyFFN(), router=damex(type='ReMoERouter', target=1))
    coefficient = layer.router.inner.coefficient
    start = coefficient.item()
    with torch.no_grad():  # every gate open: 2 experts per item where 1 is wanted
        layer.router.inner.gate.fill_(1.0)
    state.begin(['a', 'b'], training=True)
    losses = []
    out = layer(torch.rand(2, 3, 6))
    losses = state.collect()
    (out.sum() + sum(losses.values())).backward()
    assert set(losses) == {'loss_moe_damex', 'loss_moe_remoe'}
    assert coefficient.item() == pytest.approx(1.2 * start)


def test_damex_refuses_what_does_not_score_the_plans_experts():
    for kind in ('SoftMoERouter', 'MoEPPRouter'):
        with pytest.raises(ValueError, match=f'DAMEXRouter: {kind} does not score the 2 experts'):
            moe_of(ToyFFN(), router=damex(type=kind))


def test_expert_choice_refuses_groups_of_one_image():
    router = dict(type='ExpertChoiceRouter', group='image')
    with pytest.raises(ValueError, match="group='image' needs tokens"):
        moe_of(torch.nn.Conv2d(4, 4, 1), router=router, num_experts=2)


def test_an_item_without_places_is_routed_without_nan():
    router = dict(type='TopKRouter', k=1, noise=False)
    layer, state = moe_of(ToyFFN(), router=router, num_experts=2, granularity='image')
    state.begin(num_images=2, training=True)
    out = layer(torch.zeros(2, 0, 6))
    assert out.shape == (2, 0, 6)
    assert not any(value.isnan().any() for value in state.stats().values())
