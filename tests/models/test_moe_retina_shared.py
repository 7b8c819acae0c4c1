"""RetinaNet's subnets with one gate for both, and with one decision for each image."""

from __future__ import annotations

import copy

import pytest
import torch
from test_moe_retina_head import dense_model, scatter
from test_multi_domain_heads import losses_of, spread
from tiny_models import images, mixed_batch, total_loss

from mmdet_moe.moe import kl_loss

CLS, REG = 'bbox_head.cls_subnet', 'bbox_head.reg_subnet'


def shared_model(share, **kwargs):
    spec = dict(
        targets=r'bbox_head\.(cls|reg)_subnet',
        num_experts=4,
        router=dict(type='TopKRouter', k=2),
        balance=[dict(type='KLLoss', weight=0.25)],
        share_router=share,
    )
    return dense_model(head=dict(type='MoERetinaHead'), moe=[spec], **kwargs)


def experts_called(model, inputs):
    """(expert, images) of each expert's call in a forward, by layer."""
    seen = {CLS: [], REG: []}
    handles = [
        expert.register_forward_pre_hook(
            lambda _, x, calls=calls, e=e: calls.append((e, len(x[0])))
        )
        for name, calls in seen.items()
        for e, expert in enumerate(model.get_submodule(name).experts)
    ]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize('share', ['call', 'image'])
def test_both_subnets_go_by_the_same_decisions(share):
    model = scatter(shared_model(share)).eval()
    seen = experts_called(model, images(3))
    # Three images on three levels, two experts each.
    assert seen[CLS] == seen[REG] and sum(n for _, n in seen[CLS]) == 3 * 3 * 2
    # One set of gate parameters.
    gates = [key for key, _ in model.named_parameters() if '.router.' in key and 'noise' not in key]
    assert len(gates) == 1


def test_one_decision_for_each_image_holds_on_all_levels():
    model = scatter(shared_model('image')).eval()
    seen = experts_called(model, images(1))
    # One image: the same two experts on each of the three levels.
    assert len(seen[CLS]) == 6 and len({e for e, _ in seen[CLS]}) == 2


@pytest.mark.parametrize('share', ['call', 'image'])
def test_shared_gate_has_one_balance_loss_over_all_levels(share):
    model = shared_model(share)
    losses = losses_of(model, *mixed_batch())
    weight = model.routing_state.stats()[f'{CLS}/weight']
    torch.testing.assert_close(losses['loss_moe_kl'], 0.25 * kl_loss(weight))


@pytest.mark.parametrize('share', ['call', 'image'])
def test_experts_compute_what_the_dense_head_did_and_the_gate_learns(share):
    dense = spread(dense_model())
    model = shared_model(share)
    model.load_state_dict(dense.state_dict(), strict=True)
    inputs, samples = mixed_batch()
    expected, got = losses_of(dense, inputs, samples), losses_of(model, inputs, samples)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5, msg=key)
    scatter(model)
    losses = model.loss(inputs, copy.deepcopy(samples))
    losses.pop('loss_moe_kl')
    gate = model.bbox_head.cls_subnet.router.gate
    # Both subnets' losses reach the one gate.
    for part in ('loss_cls', 'loss_bbox'):
        value = total_loss({part: losses[part]})
        (grad,) = torch.autograd.grad(value, gate, retain_graph=True)
        assert grad.isfinite().all() and grad.abs().sum() > 0, part
