"""Training: gradients of the auxiliary losses, checkpointing, AMP, EMA, idle experts."""

import copy

import pytest
import torch
from moe_testlib import ToyFFN, moe_of, plan_router, topk_router
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdet_moe.moe import RoutingState, replace_modules

BALANCE = [dict(type='ImportanceLoss', weight=0.5), dict(type='LoadLoss', weight=0.5)]


class Blocks(nn.Module):
    """Convolution and batch norm by image, FFN and output by token; each can be checkpointed."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.ffn = ToyFFN()
        self.out = nn.Linear(6, 5)

    def body(self, x):
        x = self.bn(self.conv(x)).flatten(2).transpose(1, 2)
        return self.ffn(x)

    def forward(self, x, reentrant=None):
        if reentrant is None:
            x = self.body(x)
        else:
            # A reentrant checkpoint needs an input that asks for a gradient.
            x = checkpoint(self.body, x.requires_grad_(), use_reentrant=reentrant)
        return self.out(x)


def learned(seed=0):
    torch.manual_seed(seed)
    model, state = Blocks(), RoutingState()
    replace_modules(
        model,
        [
            dict(targets='conv|ffn|out', num_experts=3, router=topk_router(k=2), balance=BALANCE),
            dict(targets='bn', router=plan_router()),
        ],
        state,
    )
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model, state


X = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(1))
DOMAINS = ['a', 'c', 'a', 'c', 'c']


def loss_of(model, state, x=X, reentrant=None, leaf=False):
    state.begin(DOMAINS[: len(x)], training=True)
    out = model(x.clone().requires_grad_(leaf), reentrant)
    losses = state.collect()
    assert sorted(losses) == ['loss_moe_importance', 'loss_moe_load']
    return out.square().mean() + losses['loss_moe_importance'] + 3 * losses['loss_moe_load']


def grads_of(model):
    return {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()}


def assert_same_grads(one, two, **tolerance):
    assert {k for k, g in one.items() if g is None} == {k for k, g in two.items() if g is None}
    for key, grad in one.items():
        if grad is not None:
            torch.testing.assert_close(grad, two[key], **tolerance)


@pytest.mark.parametrize('reentrant', [True, False])
@pytest.mark.parametrize('scale', [1.0, 1024.0])
def test_gradients_under_checkpointing_equal_those_without(reentrant, scale):
    """Of everything: experts, gates, noise gates; with the two losses weighted differently."""
    results = []
    for how in (None, reentrant):
        model, state = learned()
        torch.manual_seed(7)
        loss = loss_of(model, state, reentrant=how)
        (loss * scale).backward()
        results.append((loss.item(), grads_of(model), model.state_dict(), state.stats()))
    (loss, grads, buffers, stats), (loss2, grads2, buffers2, stats2) = results
    assert loss == pytest.approx(loss2, rel=1e-6)
    assert_same_grads(grads, grads2, rtol=1e-5, atol=1e-6 * scale)
    # The recomputation counts nothing and moves no running statistics.
    torch.testing.assert_close(buffers, buffers2, rtol=0, atol=0)
    torch.testing.assert_close(stats, stats2)


def test_the_auxiliary_gradient_is_really_there():
    """The same, but against the plain sum of the losses with the output's loss left out."""
    model, state = learned()
    torch.manual_seed(7)
    loss_of(model, state, reentrant=True).backward()
    with_task = grads_of(model)
    grads = []
    for reentrant in (None, True):
        model, state = learned()
        torch.manual_seed(7)
        state.begin(DOMAINS, training=True)
        out = model(X.clone(), reentrant)
        (0 * out.sum() + sum(state.collect().values())).backward()
        grads.append(grads_of(model))
    gate = 'ffn.router.gate'
    assert grads[0][gate].abs().sum() > 1e-4
    torch.testing.assert_close(grads[0][gate], grads[1][gate])
    assert not torch.allclose(grads[0][gate], with_task[gate])


@pytest.mark.parametrize('target', ['ffn', 'conv'])
def test_gradients_under_mmengines_activation_checkpointing(target):
    engine = pytest.importorskip('mmengine.runner.activation_checkpointing')
    results = []
    for on in (False, True):
        model, state = learned()
        if on:
            engine.turn_on_activation_checkpointing(model, target)
        torch.manual_seed(7)
        loss_of(model, state, leaf=True).backward()
        results.append(grads_of(model))
    assert_same_grads(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('reentrant', [None, True, False])
def test_accumulated_and_scaled_losses_give_the_mean_gradient(reentrant):
    """Two halves of a batch, each divided by 2, under a loss scale of 256: as GradScaler does."""
    halves = [X[:2], X[2:4]]
    model, state = learned()
    torch.manual_seed(7)
    (sum(loss_of(model, state, x) for x in halves) / 2).backward()
    expected = grads_of(model)
    model, state = learned()
    torch.manual_seed(7)
    for x in halves:
        (loss_of(model, state, x, reentrant) / 2 * 256.0).backward()
    for p in model.parameters():
        p.grad = None if p.grad is None else p.grad / 256.0
    assert_same_grads(expected, grads_of(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('reentrant', [None, True, False])
def test_bfloat16_autocast(reentrant):
    model, state = learned()
    torch.manual_seed(7)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = loss_of(model, state, reentrant=reentrant)
    loss.backward()
    grads = grads_of(model)
    assert all(g is None or g.isfinite().all() for g in grads.values())
    model, state = learned()
    torch.manual_seed(7)
    exact = loss_of(model, state)
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    cosine = torch.nn.functional.cosine_similarity
    for key in ('ffn.router.gate', 'out.router.gate'):
        assert cosine(grads[key], model.get_parameter(key).grad, dim=1).mean() > 0.9


def test_losses_are_handed_out_once():
    model, state = learned()
    state.begin(DOMAINS, training=True)
    model(X)
    assert len(state.collect()) == 2
    assert state.collect() == {} and state.sealed


def test_evaluation_and_no_grad_leave_no_graph():
    model, state = learned()
    with torch.no_grad():
        state.begin(DOMAINS, training=True)
        model(X)
        assert not any(v.requires_grad for v in state.collect().values())
    model.eval()
    state.begin(DOMAINS)
    model(X)
    assert state.collect() == {} and len(state.stats()) == 12


def test_a_loss_that_is_no_scalar_is_named():
    state = RoutingState()
    with pytest.raises(ValueError, match="loss 'x' of MoE layer 'conv' has shape .2,."):
        state.add_losses('conv', {'x': torch.zeros(2)})


# Idle experts


@pytest.mark.parametrize(
    'optimiser',
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
    ],
    ids=['adamw', 'sgd'],
)
@pytest.mark.parametrize(
    'module, shape',
    [
        (nn.Conv2d(4, 4, 1), (2, 4, 3, 3)),
        (nn.BatchNorm2d(4), (2, 4, 3, 3)),
        (nn.GroupNorm(2, 4), (2, 4, 3, 3)),
        (nn.LayerNorm(4), (2, 3, 4)),
        (nn.Linear(4, 4), (2, 3, 4)),
        (ToyFFN(4), (2, 3, 4)),
        (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), (2, 4, 3, 3)),
    ],
    ids=['conv', 'bn', 'gn', 'ln', 'linear', 'ffn', 'stage'],
)
def test_an_idle_expert_does_not_move(optimiser, module, shape):
    """Not by weight decay, and not by the momentum of the steps in which it worked."""
    layer, state = moe_of(module)
    optim = optimiser(layer.parameters())
    for domains, idle in [('ab', 2), ('bc', 0), ('ca', 1), ('bb', 2)]:
        before = [copy.deepcopy(expert.state_dict()) for expert in layer.experts]
        state.begin(list(domains), training=True)
        optim.zero_grad()
        (layer(torch.randn(shape)) - 1).square().sum().backward()
        assert all(p.grad is None for p in layer.experts[idle].parameters())
        optim.step()
        for e, expert in enumerate(layer.experts):
            worked = domains.count('abc'[e])
            for key, value in expert.state_dict().items():
                if worked and value.is_floating_point():
                    assert not torch.equal(value, before[e][key]), (e, key)
                if not worked:
                    assert torch.equal(value, before[e][key]), (e, key)


def test_the_step_is_that_of_a_dense_module_where_a_batch_has_one_expert():
    dense = ToyFFN(4)
    layer, state = moe_of(dense)
    ours = torch.optim.AdamW(layer.parameters(), lr=0.01)
    theirs = torch.optim.AdamW(dense.parameters(), lr=0.01)
    for _ in range(3):
        x = torch.randn(2, 3, 4)
        state.begin(['b', 'b'], training=True)
        for module, optim in ((layer, ours), (dense, theirs)):
            optim.zero_grad()
            module(x).square().sum().backward()
            optim.step()
    torch.testing.assert_close(
        dict(layer.experts[1].state_dict()), dict(dense.state_dict()), rtol=0, atol=0
    )


# Copies


def test_deepcopy_in_the_middle_of_training_and_ema():
    """The state holds graph tensors, which cannot be copied; the copy starts empty."""
    model, state = learned()
    state.begin(DOMAINS, training=True)
    loss = model(X).square().mean()  # losses not collected yet: graphs alive in the state
    ema = copy.deepcopy(model)
    loss = loss + sum(state.collect().values())
    loss.backward()
    other = ema.conv.state
    assert other is not state and other is ema.ffn.state is ema.bn.state
    assert other.domains is None and other.collect() == {}
    with torch.no_grad():
        for target, source in zip(ema.parameters(), model.parameters(), strict=True):
            target.lerp_(source, 0.1)
    ema.load_state_dict(model.state_dict())
    ema.eval(), model.eval()
    state.begin(DOMAINS)
    other.begin(DOMAINS)
    torch.testing.assert_close(ema(X), model(X), rtol=0, atol=0)


def test_mmengines_ema_follows_the_experts():
    averaged = pytest.importorskip('mmengine.model.averaged_model')
    model, state = learned()
    ema = averaged.ExponentialMovingAverage(model, momentum=0.25, update_buffers=True)
    ema.update_parameters(model)  # the first update copies
    key = 'ffn.experts.0.layers.0.weight'
    old = ema.module.get_parameter(key).clone()
    loss_of(model, state).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    new = model.get_parameter(key)
    assert not torch.equal(old, new)
    ema.update_parameters(model)
    torch.testing.assert_close(ema.module.get_parameter(key), 0.75 * old + 0.25 * new)


def test_training_goes_on_bit_for_bit_from_a_checkpoint():
    def steps(model, state, optim, number, generator):
        losses = []
        for _ in range(number):
            x = torch.randn(5, 4, 4, 4, generator=generator)
            optim.zero_grad()
            loss = loss_of(model, state, x)
            loss.backward()
            optim.step()
            losses.append(loss.item())
        return losses

    model, state = learned()
    optim = torch.optim.AdamW(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(2)
    torch.manual_seed(3)
    steps(model, state, optim, 2, generator)
    kept = copy.deepcopy((model.state_dict(), optim.state_dict(), generator.get_state()))
    random = torch.get_rng_state()
    expected = steps(model, state, optim, 3, generator)

    model, state = learned(seed=9)
    optim = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.load_state_dict(kept[0])
    optim.load_state_dict(kept[1])
    generator = torch.Generator()
    generator.set_state(kept[2])
    torch.set_rng_state(random)
    assert steps(model, state, optim, 3, generator) == expected


def test_a_recomputation_gives_batch_norms_their_momentum_and_counters_back():
    model, state = learned()
    loss_of(model, state, reentrant=True).backward()
    for bn, images in zip(model.bn.experts, [1, 0, 1], strict=True):
        assert bn.momentum == 0.1 and bn.training
        assert bn.num_batches_tracked.item() == images
