"""Switch, KL, entropy and variance losses by hand; the calls of one forward are balanced as one."""

import math
from types import SimpleNamespace

import pytest
import torch
from moe_testlib import moe_of, topk_router
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdet_moe.moe import (
    BALANCE,
    Routing,
    RoutingContext,
    RoutingState,
    entropy_loss,
    importance_loss,
    kl_loss,
    switch_loss,
    variance_loss,
)

LN2, LN4 = math.log(2.0), math.log(4.0)
UNIFORM = torch.full((8, 4), 0.25)
COLLAPSED = torch.eye(4)[torch.zeros(8, dtype=torch.long)]
#: Two items for each of four experts, each item sure of its own.
SHARP = torch.eye(4)[torch.arange(8) % 4]


def test_switch_is_one_at_uniform_use_and_e_at_collapse():
    # f = [.5, .5], P = [.75, .25]: 2 (.375 + .125) = 1, whatever P, since f is uniform.
    assert switch_loss(torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25])).item() == 1.0
    # f = [1, 0], P = [.75, .25]: 2 * .75 = 1.5
    assert switch_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.75, 0.25])).item() == 1.5
    assert loss_of('SwitchLoss', SHARP) == pytest.approx(1.0)
    assert loss_of('SwitchLoss', COLLAPSED) == pytest.approx(4.0)


def test_switch_counts_the_first_choice_or_every_choice():
    # Items [.6 .3 .1] and [.2 .7 .1], k = 2: first choices 0 and 1, so f = [.5 .5 0];
    # P = [.4 .5 .1]; 3 (.2 + .25) = 1.35.
    p = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]])
    assert loss_of('SwitchLoss', p, k=2) == pytest.approx(1.35)
    # All four choices are 0 1 1 0: f = [.5 .5 0] again. With k = 1 of the other kind the same.
    assert loss_of('SwitchLoss', p, k=2, choices='all') == pytest.approx(1.35)
    # Items [.6 .3 .1] and [.5 .1 .4]: first f = [1 0 0], P_0 = .55 -> 3 * .55 = 1.65;
    # all: 0 1 0 2, f = [.5 .25 .25], P = [.55 .2 .25] -> 3 (.275 + .05 + .0625) = 1.1625.
    p = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4]])
    assert loss_of('SwitchLoss', p, k=2) == pytest.approx(1.65)
    assert loss_of('SwitchLoss', p, k=2, choices='all') == pytest.approx(1.1625)


def test_kl_is_zero_at_uniform_use_and_ln_e_at_collapse():
    assert kl_loss(torch.full((4,), 2.0)).item() == pytest.approx(0.0, abs=1e-7)
    assert kl_loss(torch.tensor([8.0, 0.0, 0.0, 0.0])).item() == pytest.approx(LN4)
    # Two of four: P = [.5 .5 0 0]: 2 * .5 ln(4 * .5) = ln 2
    assert kl_loss(torch.tensor([4.0, 4.0, 0.0, 0.0])).item() == pytest.approx(LN2)
    # P = [.5 .25 .25]: .5 ln 1.5 + 2 * .25 ln .75
    expected = 0.5 * math.log(1.5) + 0.5 * math.log(0.75)
    assert kl_loss(torch.tensor([2.0, 1.0, 1.0])).item() == pytest.approx(expected)


def test_kl_is_of_the_combine_weights_as_in_the_paper():
    # k = 1 of [.6 .3 .1] and [.2 .7 .1] with the gate as weight: I = [.6 .7 0], P = [6 7 0] / 13
    p = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]])
    expected = 6 / 13 * math.log(18 / 13) + 7 / 13 * math.log(21 / 13)
    assert loss_of('KLLoss', p, k=1) == pytest.approx(expected)
    # Of the probabilities: P = [.4 .5 .1]
    expected = 0.4 * math.log(1.2) + 0.5 * math.log(1.5) + 0.1 * math.log(0.3)
    assert loss_of('KLLoss', p, k=1, of='probabilities') == pytest.approx(expected)


def test_entropy_wants_all_experts_over_the_batch_and_few_for_each_item():
    # Mean gate uniform in both: -ln 4. Items: all undecided (ln 4), or sure (0).
    assert entropy_loss(UNIFORM).item() == pytest.approx(-LN4)
    assert entropy_loss(SHARP).item() == pytest.approx(-LN4)
    assert entropy_loss(UNIFORM, 1.0).item() == pytest.approx(0.0, abs=1e-6)
    assert entropy_loss(UNIFORM, 0.5).item() == pytest.approx(-0.5 * LN4)
    assert entropy_loss(SHARP, 1.0).item() == pytest.approx(-LN4)
    assert entropy_loss(COLLAPSED, 1.0).item() == pytest.approx(0.0, abs=1e-6)


def test_entropy_without_the_items_is_the_kl_loss_but_for_a_constant():
    p = torch.randn(6, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0)).softmax(1)
    assert entropy_loss(p).item() + LN4 == pytest.approx(kl_loss(p.sum(0)).item())


def test_variance_rewards_items_that_differ():
    assert variance_loss(UNIFORM).item() == pytest.approx(0.0, abs=1e-7)
    assert variance_loss(COLLAPSED).item() == pytest.approx(0.0, abs=1e-7)
    # Each expert has weight 1 for a quarter of the items: variance .25 * .75 each, 4 of them.
    assert variance_loss(SHARP).item() == pytest.approx(-0.75)
    # [.6 .4], [.2 .8]: means .4 and .6, deviations .2: variance .04 each
    assert variance_loss(torch.tensor([[0.6, 0.4], [0.2, 0.8]])).item() == pytest.approx(-0.08)
    # Of the weights, k = 1: [.6 0], [0 .8]: .09 + .16
    assert loss_of('VarianceLoss', torch.tensor([[0.6, 0.4], [0.2, 0.8]]), k=1) == pytest.approx(
        -0.25
    )


FUNCTIONS = {
    'importance': importance_loss,
    'switch': lambda p: switch_loss(torch.tensor([0.5, 0.2, 0.3], dtype=p.dtype), p.mean(0)),
    'kl': lambda p: kl_loss(p.sum(0)),
    'entropy': lambda p: entropy_loss(p, 0.7),
    'variance': variance_loss,
}


@pytest.mark.parametrize('name', FUNCTIONS)
def test_gradients_agree_with_finite_differences(name):
    logits = torch.randn(5, 3, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: FUNCTIONS[name](z.softmax(1)), logits)


LOSSES = [
    dict(type='ImportanceLoss'),
    dict(type='ImportanceLoss', of='weights', unbiased=True),
    dict(type='SwitchLoss'),
    dict(type='SwitchLoss', choices='all'),
    dict(type='KLLoss'),
    dict(type='KLLoss', of='probabilities'),
    dict(type='EntropyLoss', item_weight=1.0),
    dict(type='VarianceLoss'),
]


@pytest.mark.parametrize('loss', LOSSES, ids=lambda cfg: '-'.join(map(str, cfg.values())))
def test_no_nan_at_balance_collapse_one_expert_or_an_empty_batch(loss):
    for experts in (1, 2, 4):
        for items in (0, 1, 5):
            for scale in (0.0, 1.0, 1e4, math.inf):  # inf: all but the first are blocked
                logits = torch.zeros(items, experts)
                logits[:, 0] = 0.0 if scale == math.inf else scale
                if scale == math.inf:
                    logits[:, 1:] = -math.inf
                logits.requires_grad_()
                value = value_of(loss, logits.softmax(1), k=1)
                assert math.isfinite(value.item())
                if value.requires_grad:
                    value.backward()
                    assert logits.grad.isfinite().all()


# Several calls in one forward


class Head(nn.Module):
    """A layer that runs on three levels, as a detection head does."""

    def __init__(self, layer, kind):
        super().__init__()
        self.layer = layer
        self.kind = kind

    def forward(self, levels):
        outs = []
        for x in levels:
            if self.kind == 'plain':
                outs.append(self.layer(x))
            else:
                outs.append(checkpoint(self.layer, x, use_reentrant=self.kind == 'reentrant'))
        return torch.cat(outs)


BALANCE_LIST = [
    dict(type='ImportanceLoss', weight=0.5),
    dict(type='LoadLoss', weight=0.5),
    dict(type='SwitchLoss', weight=0.5),
    dict(type='KLLoss', weight=0.5),
    dict(type='EntropyLoss', weight=0.5, item_weight=0.5),
    dict(type='VarianceLoss', weight=0.5),
]


def head(kind, balance=BALANCE_LIST):
    torch.manual_seed(0)
    router = topk_router(k=2, noise='fixed')
    layer, state = moe_of(nn.Linear(4, 4), num_experts=4, router=router, balance=balance)
    with torch.no_grad():
        layer.router.gate.copy_(torch.randn(4, 4))
    return Head(layer, kind), state


def run(model, state, levels):
    state.begin(num_images=levels[0].shape[0], training=True)
    out = model(levels)
    losses = state.collect()
    (out.square().mean() + sum(losses.values())).backward()
    grads = {key: p.grad for key, p in model.named_parameters()}
    return {key: value.item() for key, value in losses.items()}, grads


@pytest.fixture
def still(monkeypatch):
    """Noise of value 0, though its deviation is not: the load is smooth, and nothing is random."""
    monkeypatch.setattr(torch, 'randn_like', torch.zeros_like)


def levels_of(*sizes):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, 4, generator=generator, requires_grad=True) for n in sizes]


@pytest.mark.parametrize('kind', ['plain', 'reentrant', 'not reentrant'])
def test_a_layer_called_three_times_is_balanced_over_all_calls_together(kind, still):
    levels = levels_of(4, 4, 4)
    model, state = head(kind)
    losses, grads = run(model, state, levels)
    whole, whole_state = head('plain')
    expected, expected_grads = run(whole, whole_state, [torch.cat(levels).detach()])
    assert len(losses) == 6
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-6)


def test_a_level_may_have_experts_of_its_own():
    # Each of three levels uses one expert: uneven level by level (importance E - 1 = 2 each, if it
    # were taken of each), even over the forward.
    state = RoutingState()
    loss = BALANCE.build(dict(type='ImportanceLoss', weight=1.0))
    state.begin(num_images=2, training=True)
    values = []
    for level in range(3):
        p = torch.eye(3)[torch.full((2,), level)]
        routing = Routing.from_topk(None, torch.full((2, 1), level), 3, probabilities=p)
        values.append(loss(routing, context_of(state, 2))['importance'].item())
    # After one level sums [2 0 0]: 2; after two [2 2 0]: variance 8/9 / (4/3)^2 = .5; then 0.
    assert values == pytest.approx([2.0, 0.5 - 2.0, 0.0 - 0.5], abs=1e-6)


def test_sums_of_one_forward_do_not_reach_the_next(still):
    model, state = head('plain')
    levels = levels_of(4, 4)
    first, _ = run(model, state, levels)
    second, _ = run(model, state, levels)
    assert second == pytest.approx(first, rel=1e-5, abs=1e-6)


def test_an_empty_level_changes_nothing(still):
    levels = levels_of(4, 4)
    model, state = head('plain')
    losses, _ = run(model, state, [levels[0], levels[0][:0], levels[1]])
    whole, whole_state = head('plain')
    expected, _ = run(whole, whole_state, levels)
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    'router, balance, message',
    [
        (dict(k=1, renormalize=True), dict(type='KLLoss'), 'every weight is 1'),
        (dict(k=1), dict(type='KLLoss', of='gates'), "of must be one of .* got 'gates'"),
        (dict(k=1), dict(type='SwitchLoss', choices='top'), 'choices must be one of'),
        (dict(k=1), dict(type='EntropyLoss', item_weight=-1.0), 'item_weight must be >= 0'),
    ],
)
def test_losses_that_cannot_work_are_refused_when_built(router, balance, message):
    with pytest.raises(ValueError, match=message):
        moe_of(nn.Linear(4, 4), num_experts=3, router=topk_router(**router), balance=[balance])


def test_one_loss_object_cannot_balance_two_layers():
    loss = BALANCE.build(dict(type='ImportanceLoss'))
    spec = dict(num_experts=3, router=topk_router(k=1), balance=[loss])
    moe_of(nn.Linear(4, 4), **spec)
    with pytest.raises(ValueError, match='ImportanceLoss balances another layer already'):
        moe_of(nn.Linear(4, 4), **spec)


def test_a_loss_that_needs_probabilities_says_so():
    loss = BALANCE.build(dict(type='SwitchLoss'))
    routing = Routing.from_dense(torch.eye(3))
    with pytest.raises(ValueError, match="SwitchLoss at 'here': the router gave no probabilities"):
        loss(routing, context_of(RoutingState(), 3))
    slots = SimpleNamespace(probabilities=None)  # what Soft MoE gives
    with pytest.raises(ValueError, match="'here': its router selects nothing to balance"):
        BALANCE.build(dict(type='ImportanceLoss'))(slots, context_of(RoutingState(), 3))


# Helpers


def context_of(state, items):
    return RoutingContext(state, num_items=items, training=True, layer='here')


def value_of(cfg, p, k=1):
    """A loss of weight 1 on top-k routing with the gates as weights."""
    loss = BALANCE.build({**cfg, 'weight': 1.0})
    weights, indices = p.topk(k, dim=1)
    routing = Routing.from_topk(weights, indices, p.shape[1], probabilities=p)
    (value,) = loss(routing, context_of(RoutingState(), p.shape[0])).values()
    return value


def loss_of(kind, p, k=1, **options):
    return value_of(dict(type=kind, **options), p, k).item()
