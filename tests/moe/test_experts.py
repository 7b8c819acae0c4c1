"""Narrow experts, other norms, bypasses and fresh draws, on a residual block of torch's own."""

import copy
import math

import pytest
import torch
from moe_testlib import item_by_item, moe_of, plan_router, scatter_experts, topk_router
from torch import nn

from mmdet_moe.moe import upcycle_, upcycle_from_checkpoints

X = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """conv1, bn1, conv2, bn2 and a shortcut."""

    def __init__(self, taken=8, given=16, inner=16, stride=2):
        super().__init__()
        self.conv1 = nn.Conv2d(taken, inner, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, given, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(given)
        self.downsample = None
        if stride != 1 or taken != given:
            self.downsample = nn.Sequential(
                nn.Conv2d(taken, given, 1, stride=stride, bias=False), nn.BatchNorm2d(given)
            )

    def forward(self, x):
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (out + (x if self.downsample is None else self.downsample(x))).relu()


def block_layer(module=None, **spec):
    torch.manual_seed(0)
    spec.setdefault('router', topk_router(k=2, noise=False))
    if spec['router']['type'] != 'PlanRouter':
        spec.setdefault('num_experts', 3)
    return moe_of(Block() if module is None else module, **spec)


# -- width ---------------------------------------------------------------------------------------


def test_iso_width_by_hand():
    # Dense, per output place: 9 * 8 * 16 + 9 * 16 * 16 + 8 * 16 = 3584 multiply-adds. An expert of
    # inner width w: 9 * 8 w + 9 * 16 w + 128 = 216 w + 128; twice that is 3584 at w = 7.7.
    layer, state = block_layer(width='iso')
    for expert in layer.experts:
        assert expert.conv1.weight.shape == (8, 8, 3, 3)
        assert expert.conv2.weight.shape == (16, 8, 3, 3)
        assert expert.bn1.num_features == 8 and expert.bn2.num_features == 16
    # A shared expert runs for every item too: 3 (216 w + 128) = 3584 at w = 4.9.
    assert block_layer(width='iso', shared_experts=1)[0].experts[0].bn1.num_features == 5
    state.begin(num_images=4, training=True)
    assert layer(X).shape == (4, 16, 3, 3)


def test_narrow_weights_are_the_first_of_the_dense_ones():
    dense = Block()
    nn.init.normal_(dense.bn1.running_mean)
    before = copy.deepcopy(dense.state_dict())
    layer, _ = block_layer(dense, width=5)
    for expert in layer.experts:
        assert torch.equal(expert.conv1.weight, dense.conv1.weight[:5])
        assert torch.equal(expert.conv2.weight, dense.conv2.weight[:, :5])
        assert torch.equal(expert.bn1.running_mean, dense.bn1.running_mean[:5])
        assert torch.equal(expert.downsample[0].weight, dense.downsample[0].weight)
    for key, value in dense.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert block_layer(width=0.25)[0].experts[0].bn1.num_features == 4


def test_narrow_experts_do_not_keep_the_dense_function_and_say_why_they_cannot_be_filled():
    layer, _ = block_layer(width=5)
    assert not layer.keeps_dense_function
    assert block_layer()[0].keeps_dense_function
    message = 'their inner width is 5 and not 16, so a dense checkpoint cannot fill them'
    with pytest.raises(ValueError, match=message):
        layer.load_state_dict(Block().state_dict())
    holder = nn.ModuleDict({'target': layer})
    state_dict = {f'target.{key}': value for key, value in Block().state_dict().items()}
    with pytest.raises(ValueError, match=message):
        upcycle_from_checkpoints(holder, {0: state_dict})
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))  # its own loads


@pytest.mark.parametrize(
    'spec, message',
    [
        (dict(width=17), 'a whole number of 1 to 16 inner channels'),
        (dict(width=0), 'a whole number of 1 to 16'),
        (dict(width=1.5), r'a share of them in \(0, 1\], got 1.5'),
        (dict(width='half'), "width must be 'iso'"),
        (dict(width=True), "width must be 'iso'"),
        (dict(width='iso', router=dict(type='ReMoERouter')), 'a fixed number of experts'),
        (dict(width=2, module=nn.Conv2d(8, 8, 3)), 'Conv2d, has no residual blocks'),
        (
            dict(width='iso', module=Block(8, 64, 4, 1), router=topk_router(k=3)),
            'their shortcuts alone cost too much',
        ),
    ],
)
def test_impossible_widths_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        block_layer(**spec)


def test_grouped_convolutions_are_refused():
    block = Block()
    block.conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=4)
    with pytest.raises(ValueError, match='conv2 of a Block is a Conv2d; .* without groups'):
        block_layer(block, width=8)


# -- bypass --------------------------------------------------------------------------------------


def test_residual_form_adds_the_identity_where_the_shape_stays():
    layer, state = block_layer(Block(8, 8, 4, 1), router=plan_router(), bypass=True)
    scatter_experts(layer)
    layer.eval()
    state.begin(domains=['a', 'b', 'c', 'a'])
    weights = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
    torch.testing.assert_close(layer(X), X + item_by_item(layer, X, weights))
    assert not layer.keeps_dense_function and not list(layer.bypass.parameters())


def test_residual_form_projects_where_the_shape_changes():
    layer, state = block_layer(router=plan_router(), bypass=True)
    layer.eval()
    conv, norm = layer.bypass
    assert conv.weight.shape == (16, 8, 1, 1) and conv.stride == (2, 2) and conv.bias is None
    state.begin(domains=['a'] * 4)
    torch.testing.assert_close(layer(X), norm(conv(X)) + layer.experts[0](X))
    # A dense checkpoint has no bypass: it keeps its own.
    layer.load_state_dict(Block().state_dict())


def test_a_bypass_starts_from_the_seed_whatever_the_model_drew_before():
    found = []
    for draws in (0, 7):
        layer, _ = block_layer(bypass=True)
        torch.randn(draws)
        nn.init.ones_(layer.bypass[0].weight)
        upcycle_(nn.ModuleDict({'target': layer}))
        found.append(layer.bypass[0].weight.detach().clone())
    assert torch.equal(*found) and found[0].std() > 0.1


def test_statistics_of_a_bypass_move_once_under_checkpointing():
    from torch.utils.checkpoint import checkpoint

    moved = []
    for how in (None, True, False):
        layer, state = block_layer(bypass=True)
        x = X.clone().requires_grad_()
        state.begin(num_images=4, training=True)
        out = layer(x) if how is None else checkpoint(layer, x, use_reentrant=how)
        loss = out.square().mean() + sum(state.collect().values())
        loss.backward()
        moved.append(layer.bypass[1].running_mean.clone())
    assert torch.equal(moved[0], moved[1]) and torch.equal(moved[0], moved[2])


def test_dense_warm_up_runs_the_first_expert_beside_the_bypass():
    layer, state = block_layer(Block(8, 8, 4, 1), bypass=True)
    layer.train()
    state.dense = True
    state.begin(num_images=4, training=True)
    layer_out = layer(X)
    torch.testing.assert_close(layer_out, X + layer.experts[0](X))


def test_a_bypass_needs_maps():
    with pytest.raises(ValueError, match=r'Linear, does not take maps \(B, C, H, W\) to maps'):
        block_layer(nn.Linear(8, 8), bypass=True)


# -- norms ---------------------------------------------------------------------------------------


def test_frozen_norms_stay_in_evaluation_mode_and_do_not_learn():
    dense = Block()
    nn.init.normal_(dense.bn1.running_mean)
    layer, state = block_layer(dense, expert_norm='frozen')
    holder = nn.ModuleDict({'target': layer}).train()
    before = copy.deepcopy(layer.state_dict())
    optimiser = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1.0)
    state.begin(num_images=4, training=True)
    holder['target'](X).square().mean().backward()
    optimiser.step()
    moved = {key for key, value in layer.state_dict().items() if not value.equal(before[key])}
    assert any('conv1' in key for key in moved)
    assert not any('bn' in key or 'downsample.1' in key for key in moved)
    assert layer.keeps_dense_function
    assert all(p.requires_grad for p in dense.parameters())  # the model it came from keeps its own


def test_group_norms_take_the_places_and_affine_parameters_of_batch_norms():
    dense = Block()
    nn.init.normal_(dense.bn2.weight)
    layer, state = block_layer(dense, expert_norm=dict(type='GN', num_groups=4))
    for expert in layer.experts:
        assert not any(isinstance(m, nn.BatchNorm2d) for m in expert.modules())
        assert isinstance(expert.downsample[1], nn.GroupNorm) and expert.bn1.num_groups == 4
        assert torch.equal(expert.bn2.weight, dense.bn2.weight)
    assert not layer.keeps_dense_function
    # An image's result does not depend on its batch.
    state.begin(num_images=4, training=True)
    whole = layer(X)
    state.begin(num_images=1, training=True)
    torch.testing.assert_close(layer(X[:1]), whole[:1], rtol=1e-4, atol=1e-5)
    # Running statistics of a dense checkpoint have no place, and are no error.
    other = Block()
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.experts[2].conv1.weight, other.conv1.weight)


def test_iso_width_leaves_whole_groups():
    layer, _ = block_layer(width='iso', expert_norm=dict(type='GN', num_groups=4))
    assert layer.experts[0].bn1.num_channels == 8


def test_an_idle_expert_keeps_its_running_statistics():
    layer, state = block_layer(router=plan_router())
    before = copy.deepcopy(layer.experts[1].state_dict())
    state.begin(domains=['a', 'c', 'a', 'c'], training=True)
    layer(X)
    for key, value in layer.experts[1].state_dict().items():
        assert torch.equal(value, before[key]), key
    assert layer.experts[0].bn1.num_batches_tracked == 1


@pytest.mark.parametrize(
    'norm, message',
    [
        ('eval', "expert_norm must be 'frozen' or dict"),
        (dict(type='GN'), "expert_norm must be 'frozen' or dict"),
        (dict(type='LN', num_groups=2), "expert_norm must be 'frozen' or dict"),
        (dict(type='GN', num_groups=5), 'the 16 channels of its bn1 do not make 5 groups'),
    ],
)
def test_impossible_norms_are_refused(norm, message):
    with pytest.raises(ValueError, match=message):
        block_layer(expert_norm=norm)
    with pytest.raises(ValueError, match='Conv2d, has no batch norm'):
        block_layer(nn.Conv2d(8, 8, 1), expert_norm='frozen')


# -- fresh draws ---------------------------------------------------------------------------------


def test_independent_experts_have_the_scale_of_the_first_and_nothing_else():
    dense = Block(64, 64, 64, 1)
    nn.init.kaiming_normal_(dense.conv1.weight)
    nn.init.zeros_(dense.bn2.weight)  # zero_init_residual
    nn.init.normal_(dense.bn1.weight, 1.0, 0.1)
    layer, _ = block_layer(dense, noise='independent')
    upcycle_(nn.ModuleDict({'target': layer}))
    weights = [expert.conv1.weight.detach().flatten() for expert in layer.experts]
    for weight in weights:
        # Mean 0 and std sqrt(2 / (9 * 64)) = 0.059, of 36864 numbers.
        assert weight.std().item() == pytest.approx(math.sqrt(2 / 576), rel=0.02)
        assert abs(weight.mean().item()) < 0.002
    found = torch.corrcoef(torch.stack([*weights, dense.conv1.weight.detach().flatten()]))
    assert (found - torch.eye(4)).abs().max() < 0.03
    for expert in layer.experts:
        assert not expert.bn2.weight.any() and not expert.bn2.bias.any()
        assert torch.equal(expert.bn1.weight, dense.bn1.weight)
    assert not layer.keeps_dense_function


def test_independent_draws_follow_the_seed_not_the_random_state():
    found = []
    for seed, random_state in ((0, 1), (0, 2), (1, 1)):
        layer, _ = block_layer(noise='independent', noise_seed=seed)
        torch.manual_seed(random_state)  # another on every rank
        upcycle_(nn.ModuleDict({'target': layer}))
        found.append(layer.experts[1].conv2.weight.detach().clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_other_words_for_noise_are_refused():
    with pytest.raises(ValueError, match="noise must be a number or 'independent', got 'none'"):
        block_layer(noise='none')
