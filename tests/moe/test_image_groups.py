"""Capacity and loss of each image, weights with a detached sum, narrow FFNs."""

import pytest
import torch
from torch import nn

from mmdet_moe.moe import (
    CosineRouter,
    GShardRouter,
    ImportanceLoss,
    RoutingContext,
    RoutingState,
    SwitchLoss,
    SwitchRouter,
    replace_modules,
)
from mmdet_moe.moe.routers.gated import drop_over_capacity, gshard_capacity


def context_of(images, tokens, training=True):
    state = RoutingState()
    state.begin(num_images=images, training=training)
    return RoutingContext(state, images * tokens, training, tokens)


def router_with(logits, **options):
    """A GShard router that gives these logits for the items of an identity matrix."""
    logits = torch.tensor(logits)
    router = GShardRouter(*logits.shape, second='all', **options)
    with torch.no_grad():
        router.gate.copy_(logits.t())
    return router, torch.eye(len(logits))


def test_gshards_capacity():
    # floor(1.25 · 197 / 6) = floor(41.04); floor(2 · 197 / 6) = floor(65.67)
    assert gshard_capacity(197, 6, 1.25) == 41 and gshard_capacity(197, 6, 2.0) == 65
    # Never more than there are, never less than 4.
    assert gshard_capacity(10, 2, 4.0) == 10 and gshard_capacity(12, 6, 1.0) == 4
    assert gshard_capacity(3, 6, 1.0) == 4


def test_every_group_fills_experts_of_its_own():
    # Two groups of three, one place at each expert: first choices 0 0 1 | 1 0 0, then second ones.
    choices = torch.tensor([[0, 1], [0, 1], [1, 0], [1, 0], [0, 1], [0, -1]])
    kept = drop_over_capacity(choices, 1, 2, per_group=3)
    assert kept.tolist() == [[0, -1], [-1, -1], [1, -1], [1, -1], [0, -1], [-1, -1]]
    # By priority within the group.
    priority = torch.tensor([0.1, 0.2, 0.3, 0.0, 0.5, 0.6])
    kept = drop_over_capacity(choices, 1, 2, priority, per_group=3)
    assert kept[:, 0].tolist() == [-1, 0, 1, 1, -1, 0]
    # A capacity of each expert.
    kept = drop_over_capacity(choices[:, :1], torch.tensor([0, 2]), 2, per_group=3)
    assert kept.flatten().tolist() == [-1, -1, 1, 1, -1, -1]


@pytest.mark.parametrize(('training', 'kept'), [(True, 4), (False, 5)])
def test_an_image_does_not_care_who_stands_beside_it(training, kept):
    # Expert 0 is everybody's first choice of 3, expert 1 the second: floor(c · 10 / 2) is 4, or 5.
    router, x = router_with(
        [[2.0, 0.0]] * 20,
        capacity_factor=0.8,
        test_capacity_factor=1.0,
        group='image',
        capacity_rule='gshard',
    )
    routing = router(x, context_of(2, 10, training))
    assert routing.counts == [2 * kept, 2 * kept]
    places = list(range(kept))
    assert sorted(routing.items[: 2 * kept].tolist()) == places + [10 + t for t in places]
    (alone,) = {tuple(router(x[:10], context_of(1, 10, training)).counts)}
    assert alone == (kept, kept)


def test_images_as_items_have_no_capacity_of_each_image():
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    spec = dict(targets='0', num_experts=2, router=dict(type='GShardRouter', group='image'))
    with pytest.raises(ValueError, match="group='image' needs tokens as items"):
        replace_modules(model, [spec], RoutingState())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(group='token'), r"group must be one of \('batch', 'image'\), got 'token'"),
        (dict(capacity_rule='floor'), r"one of \('topk', 'gshard'\), got 'floor'"),
        (dict(renormalize='yes'), "renormalize must be a bool or 'detached', got 'yes'"),
    ],
)
def test_an_unknown_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SwitchRouter(4, 2, **options)


def test_the_switch_loss_of_each_image():
    """Two images of two tokens, p as here; first choices: image 0 both to expert 0, image 1 one
    each. L = mean over images of 2 · sum f P = (2 · 1 · .7 + 2 · (.5 · .55 + .5 · .45)) / 2."""
    p = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.9, 0.1], [0.2, 0.8]])
    router, x = router_with(p.log().tolist())
    losses = []
    for group in ('image', 'batch'):
        context = context_of(2, 2)
        (value,) = SwitchLoss(weight=1.0, group=group)(router(x, context), context).values()
        losses.append(value.item())
    assert losses[0] == pytest.approx((1.4 + 1.0) / 2)
    # Of the batch: f = 3/4, 1/4 and P = .625, .375.
    assert losses[1] == pytest.approx(2 * (0.75 * 0.625 + 0.25 * 0.375))


def test_the_switch_loss_of_each_image_over_calls_and_without_items():
    p = torch.tensor([[0.8, 0.2], [0.6, 0.4]])
    router, x = router_with(p.log().tolist())
    loss, context = SwitchLoss(weight=1.0, group='image'), context_of(1, 2)
    first, second = (loss(router(x, context), context)['switch'] for _ in range(2))
    assert first.item() == pytest.approx(1.4) and second.item() == pytest.approx(0.0, abs=1e-6)
    empty = context_of(0, 2)
    (value,) = SwitchLoss(group='image')(router(x[:0], empty), empty).values()
    assert value.item() == 0
    with pytest.raises(ValueError, match="group must be one of .*'level'"):
        SwitchLoss(group='level')
    with pytest.raises(ValueError, match="goes with choices='first'"):
        SwitchLoss(group='image', choices='all')


@pytest.mark.parametrize('k', [1, 2])
def test_a_detached_sum_gives_weights_of_sum_1_and_a_gradient(k):
    """w_j = p_j / sg(sum p): d sum_j a_j w_j / d logits = sum_j a_j dp_j / sum p."""
    torch.manual_seed(0)
    router = CosineRouter(4, 3, k, noise=False, renormalize='detached').double()
    router.reset_parameters()
    assert router.keeps_dense_function
    x, a = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    context = context_of(1, 5)
    routing = router(x, context)
    torch.testing.assert_close(routing.to_dense().sum(1), torch.ones(5).double())
    experts = torch.arange(3).repeat_interleave(torch.tensor(routing.counts))
    (routing.weights * a[routing.items, experts]).sum().backward()
    got = router.project.weight.grad.clone()
    router.zero_grad()
    p = router.logits(x).softmax(1)
    chosen = p.topk(k, dim=1)
    mine = a.gather(1, chosen.indices) * chosen.values
    (mine / chosen.values.detach().sum(1, keepdim=True)).sum().backward()
    torch.testing.assert_close(got, router.project.weight.grad)
    assert got.abs().sum() > 0
    if k == 1:
        with pytest.raises(ValueError, match="renormalize='detached' every weight is 1"):
            ImportanceLoss(of='weights').check(router)


def ffn():
    return nn.Sequential(nn.Linear(4, 12), nn.GELU(), nn.Linear(12, 4))


@pytest.mark.parametrize(
    ('width', 'k', 'hidden'),
    [('iso', 2, 6), ('iso', 3, 4), ('iso', 1, 12), (5, 2, 5), (0.25, 2, 3)],
)
def test_a_narrow_ffn_keeps_its_first_hidden_channels(width, k, hidden):
    model = nn.Sequential(ffn())
    dense = [p.detach().clone() for p in model.parameters()]
    spec = dict(targets='0', num_experts=3, width=width, router=dict(type='TopKRouter', k=k))
    spec['granularity'] = 'token'
    replace_modules(model, [dict(spec, in_channels=4, channel_dim=-1)], RoutingState())
    layer = model[0]
    w1, b1, w2, b2 = layer.experts[2].parameters()
    assert torch.equal(w1, dense[0][:hidden]) and torch.equal(b1, dense[1][:hidden])
    assert torch.equal(w2, dense[2][:, :hidden]) and torch.equal(b2, dense[3])
    assert bool(layer.altered) is (hidden != 12)
    model.eval()
    layer.state.begin(num_images=2)
    assert model(torch.randn(2, 3, 4)).shape == (2, 3, 4)


def test_an_impossible_width_of_an_ffn_is_refused():
    spec = dict(targets='0', num_experts=3, router=dict(type='TopKRouter', k=2), in_channels=4)
    with pytest.raises(ValueError, match='a whole number of 1 to 12 inner channels.*got 13'):
        replace_modules(nn.Sequential(ffn()), [dict(spec, width=13)], RoutingState())
    free = dict(spec, router=dict(type='ReMoERouter'), width='iso')
    with pytest.raises(ValueError, match="width='iso' needs a router with a fixed number"):
        replace_modules(nn.Sequential(ffn()), [free], RoutingState())
    odd = nn.Sequential(nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(12, 4)))
    with pytest.raises(ValueError, match='no feed-forward network of two linear layers'):
        replace_modules(odd, [dict(spec, width=6)], RoutingState())
