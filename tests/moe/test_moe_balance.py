"""Balance losses: values by hand, and no NaN at the edges."""

import math

import pytest
import torch
from moe_testlib import moe_of, plan_router, topk_router
from torch import nn

from mmdet_moe.moe import cv_squared, importance_loss, load_loss


def phi(z):
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def test_importance_is_the_squared_coefficient_of_variation_of_the_column_sums():
    gates = torch.tensor([[0.5, 0.3, 0.2], [0.7, 0.2, 0.1], [0.3, 0.2, 0.5], [0.2, 0.4, 0.4]])
    # Column sums [1.7, 1.1, 1.2], mean 4/3; deviations [.3667, -.2333, -.1333];
    # variance (.134444 + .054444 + .017778) / 3 = .068889; over the squared mean 1.777778: .03875
    assert importance_loss(gates).item() == pytest.approx(0.03875, abs=1e-6)
    # Unbiased: divided by 2 and not by 3.
    assert importance_loss(gates, unbiased=True).item() == pytest.approx(0.058125, abs=1e-6)


def test_importance_at_uniform_use_and_at_collapse():
    uniform = torch.full((8, 4), 0.25)
    collapsed = torch.eye(4)[torch.zeros(8, dtype=torch.long)]
    assert importance_loss(uniform).item() == 0.0
    # All 8 to expert 0: sums [8, 0, 0, 0], mean 2, variance (36 + 3 * 4) / 4 = 12; 12 / 4 = E - 1
    assert importance_loss(collapsed).item() == pytest.approx(3.0)
    # Unbiased variance 48 / 3 = 16; 16 / 4 = E, as in arXiv 2204.10598
    assert importance_loss(collapsed, unbiased=True).item() == pytest.approx(4.0)


def test_load_compares_logits_with_the_kth_noisy_logit():
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.5, 1.5, 0.0]])
    noisy = torch.tensor([[0.8, 0.4, -1.2], [0.9, 1.1, 0.2]])
    # k = 2: thresholds are the 2nd largest noisy logits, .4 and .9; sigma .5
    load = [
        phi((1.0 - 0.4) / 0.5) + phi((0.5 - 0.9) / 0.5),
        phi((0.0 - 0.4) / 0.5) + phi((1.5 - 0.9) / 0.5),
        phi((-1.0 - 0.4) / 0.5) + phi((0.0 - 0.9) / 0.5),
    ]
    mean = sum(load) / 3
    expected = sum((v - mean) ** 2 for v in load) / 3 / mean**2
    assert load_loss(logits, noisy, 0.5, k=2).item() == pytest.approx(expected, rel=1e-5)
    assert load_loss(logits, noisy, torch.full((2, 3), 0.5), k=2).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_load_at_full_collapse_is_that_of_one_expert():
    # Expert 0 wins each item by 100 sigma: load [6, ~0, ~0, ~0] -> E - 1 = 3; the threshold is
    # expert 0's own noisy logit, which equals its clean one: Phi(0) = .5 each, load [3, 0, 0, 0].
    logits = torch.tensor([[100.0, 0.0, 0.0, 0.0]]).repeat(6, 1)
    assert load_loss(logits, logits.clone(), 1.0, k=1).item() == pytest.approx(3.0)


@pytest.mark.parametrize('items', [0, 1, 5])
@pytest.mark.parametrize('experts', [1, 2, 4])
@pytest.mark.parametrize('scale', [0.0, 1.0, 1e4])
def test_no_nan_at_balance_collapse_one_expert_or_an_empty_batch(items, experts, scale):
    logits = torch.zeros(items, experts)
    logits[:, 0] = scale
    logits.requires_grad_()
    noisy = logits + 0.1
    raw = torch.full((items, experts), -200.0, requires_grad=True)  # softplus underflows to 0
    sigma = torch.nn.functional.softplus(raw)
    value = (
        importance_loss(logits.softmax(1))
        + load_loss(logits, noisy, sigma, k=1)
        + cv_squared(logits.sum(0), unbiased=True) * 0
    )
    value.backward()
    assert math.isfinite(value.item())
    assert logits.grad.isfinite().all() and (raw.grad is None or raw.grad.isfinite().all())


def test_losses_follow_the_list_of_the_config():
    layer, state = moe_of(
        nn.Linear(4, 4),
        num_experts=3,
        router=topk_router(k=1),
        balance=[dict(type='ImportanceLoss', weight=0.5), dict(type='LoadLoss', weight=0.25)],
    )
    x = torch.randn(5, 4)
    state.begin(num_images=5, training=True)
    torch.manual_seed(0)
    layer(x)
    losses = state.collect()
    assert sorted(losses) == ['loss_moe_importance', 'loss_moe_load']
    logits = x @ layer.router.gate.t()
    importance = importance_loss(logits.softmax(1)).item()
    assert losses['loss_moe_importance'].item() == pytest.approx(0.5 * importance, rel=1e-4)
    layer.eval()
    state.begin(num_images=5)
    layer(x)
    assert state.collect() == {}


@pytest.mark.parametrize(
    'router, balance, message',
    [
        (plan_router(), dict(type='ImportanceLoss'), 'PlanRouter learns nothing'),
        (topk_router(k=1, noise=False), dict(type='LoadLoss'), 'LoadLoss needs a router with'),
        (topk_router(k=1), dict(type='ImportanceLoss', weight=-1), 'weight must be >= 0'),
        (topk_router(k=1), dict(type='LoadLos'), "did you mean 'LoadLoss'"),
        (topk_router(k=1), dict(type='LoadLoss', wieght=1), 'takes no .*wieght'),
    ],
)
def test_losses_that_cannot_work_are_refused_when_built(router, balance, message):
    with pytest.raises((ValueError, KeyError, TypeError), match=message):
        moe_of(nn.Linear(4, 4), num_experts=3, router=router, balance=[balance])
