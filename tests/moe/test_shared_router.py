"""One router for several layers: one decision, one set of parameters, one loss."""

import copy

import pytest
import torch
from moe_testlib import scatter_experts, topk_router, two_processes
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdet_moe.moe import RoutingState, replace_modules, upcycle_

B, C = 4, 3
IMAGES = torch.randn(B, C, 8, 8, generator=torch.Generator().manual_seed(0))


class TwoHeads(nn.Module):
    """Two convolutions side by side on every level, as the subnets of a RetinaNet."""

    def __init__(self, levels=(8, 4)):
        super().__init__()
        self.stem = nn.Conv2d(C, C, 3, padding=1)
        self.first = nn.Conv2d(C, 2, 3, padding=1)
        self.second = nn.Conv2d(C, 5, 3, padding=1)
        self.levels = levels
        self.how = {}

    def run(self, name, x):
        head = getattr(self, name)
        if name not in self.how:
            return head(x)
        return checkpoint(head, x, use_reentrant=self.how[name])

    def forward(self, images):
        x = self.stem(images)
        total = 0.0
        for i, size in enumerate(self.levels):
            level = nn.functional.adaptive_avg_pool2d(x, size) * (1 + i)
            a, b = self.run('first', level), self.run('second', level)
            total = total + a.square().mean() + b.sin().mean()
        return total


def shared(how='call', router=None, balance=(), seed=0, levels=(8, 4), **spec):
    torch.manual_seed(seed)
    model, state = TwoHeads(levels), RoutingState()
    router = topk_router(k=2, kind='conv', projection=4) if router is None else router
    spec = dict(num_experts=3, router=router, balance=list(balance), share_router=how, **spec)
    replace_modules(model, [dict(targets='first|second', **spec)], state)
    upcycle_(model)
    for layer in (model.first, model.second):
        scatter_experts(layer)
    with torch.no_grad():  # no near ties
        model.first.router.gate.mul_(100)
    return model, state


def step(model, state, seed=3):
    torch.manual_seed(seed)
    model.zero_grad()
    state.begin(num_images=B, training=True, images=IMAGES)
    loss = model(IMAGES)
    losses = state.collect()
    loss = loss + sum(losses.values())
    loss.backward()
    return losses, {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def watch(layer):
    """Which experts every item of every call of a layer went to."""
    seen = []
    account = layer._account

    def note(routing, context, decided):
        seen.append((routing.items.tolist(), routing.counts, decided))
        return account(routing, context, decided)

    layer._account = note
    return seen


def test_calls_of_the_other_layers_follow_the_firsts_decision_call_by_call():
    model, state = shared()
    one, two = watch(model.first), watch(model.second)
    step(model, state)
    assert [decided for *_, decided in one] == [True, True]
    assert [decided for *_, decided in two] == [False, False]
    assert [routing[:2] for routing in one] == [routing[:2] for routing in two]
    assert one[0][:2] != one[1][:2]
    stats = state.stats()
    # Each layer counts its own: 2 levels x 4 images x k = 2.
    for name in ('first', 'second'):
        assert stats[f'{name}/count'].sum() == 16
        assert stats[f'{name}/weight'].sum().item() == pytest.approx(8.0)
    assert torch.equal(stats['first/count'], stats['second/count'])


def test_global_gate_decides_once_on_the_input_image():
    model, state = shared('image', image_size=4)
    assert model.first.router.in_channels == 3
    given = []
    model.first.router.register_forward_pre_hook(lambda m, inputs: given.append(inputs[0]))
    one, two = watch(model.first), watch(model.second)
    step(model, state)
    (pooled,) = given  # of four calls
    # 8 x 8 pooled to 4 x 4: means of 2 x 2.
    torch.testing.assert_close(pooled[1, 2, 0, 0], IMAGES[1, 2, :2, :2].mean())
    assert len({str(routing[:2]) for routing in one + two}) == 1
    assert [decided for *_, decided in one + two] == [True, False, False, False]


def test_gradients_of_all_layers_reach_the_one_router():
    """By hand: without noise the decision's weights are used by both heads, so the gate's gradient
    is the sum of what each head alone would give it."""
    grads = []
    for heads in ('both', 'first', 'second'):
        model, state = shared(router=topk_router(k=2, noise=False))
        if heads != 'both':
            other = model.second if heads == 'first' else model.first
            for expert in other.experts:  # a constant head teaches nothing
                nn.init.zeros_(expert.weight)
                nn.init.zeros_(expert.bias)
        grads.append(step(model, state)[1]['first.router.gate'])
    torch.testing.assert_close(grads[0], grads[1] + grads[2])


@pytest.mark.parametrize('how', ['call', 'image'])
def test_losses_and_constraints_act_once(how):
    balance = [
        dict(type='ImportanceLoss', weight=1.0, of='weights'),
        dict(type='RelativeImportanceConstraint', threshold=0.1),
    ]
    router = topk_router(k=2, noise=False)
    model, state = shared(how, router=router, balance=balance)
    losses, _ = step(model, state)
    # All importance of the forward: both levels in 'call', one decision in 'image'; / by I bar.
    calls = 2 if how == 'call' else 1
    weight = state.stats()['first/weight'] * calls / 2
    expected = weight.var(unbiased=False) / weight.mean() ** 2
    assert losses['loss_moe_importance'].item() == pytest.approx(expected.item(), rel=1e-4)
    relative = model.first.balance[1].relative
    torch.testing.assert_close(relative, (weight - weight.mean()) / weight.mean())
    assert model.second.balance is model.first.balance


def test_one_set_of_parameters_in_state_dict_optimiser_and_copies():
    model, state = shared(balance=[dict(type='RelativeImportanceConstraint')])
    keys = [k for k in model.state_dict() if 'router' in k or 'balance' in k]
    assert keys and all(k.startswith('first.') for k in keys)
    assert len([k for k, _ in model.named_parameters() if 'router' in k]) == len(keys) - 1
    assert model.second.router is model.first.router and not model.second.owns_router
    twin = copy.deepcopy(model)
    assert twin.second.router is twin.first.router is not model.first.router
    assert twin.second.balance is twin.first.balance is not model.first.balance
    assert twin.second.state is twin.first.state is not state
    step(model, state)
    step(twin, twin.first.state)
    theirs = twin.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, theirs[key]), key
    other, other_state = shared(balance=[dict(type='RelativeImportanceConstraint')], seed=5)
    other.load_state_dict(model.state_dict())
    ours, theirs = step(model, state)[1], step(other, other_state)[1]
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def test_a_dense_checkpoint_fills_both_layers():
    model, _ = shared()
    dense = TwoHeads()
    model.load_state_dict(dense.state_dict())
    for name in ('first', 'second'):
        for expert in getattr(model, name).experts:
            assert torch.equal(expert.weight, getattr(dense, name).weight)


@pytest.mark.parametrize('how', ['call', 'image'])
@pytest.mark.parametrize('names', [['first'], ['second'], ['first', 'second']])
def test_checkpointing_repeats_the_decision_exactly(how, names):
    balance = [
        dict(type='ImportanceLoss', weight=1.0),
        dict(type='RelativeImportanceConstraint', threshold=0.1),
    ]
    results = []
    for checkpointed in ([], names):
        model, state = shared(how, balance=balance)
        model.how = dict.fromkeys(checkpointed, False)
        for seed in (3, 4):
            _, grads = step(model, state, seed)
        results.append((grads, model.state_dict()))
    (grads, buffers), (grads2, buffers2) = results
    torch.testing.assert_close(buffers, buffers2, rtol=0, atol=0)
    assert set(grads) == set(grads2)
    for key, grad in grads.items():
        torch.testing.assert_close(grads2[key], grad, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize('how', ['call', 'image'])
def test_under_bfloat16_autocast_gradients_are_finite_and_close(how):
    router = topk_router(k=3, noise=False)  # all experts: rounding moves no selection
    model, state = shared(how, router=router)
    _, exact = step(model, state)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        _, grads = step(model, state)
    gate = 'first.router.gate'
    assert all(grad.isfinite().all() for grad in grads.values())
    torch.testing.assert_close(grads[gate], exact[gate], rtol=0.2, atol=0.02)


@pytest.mark.parametrize('how', ['call', 'image'])
@pytest.mark.parametrize('name', ['first', 'second'])
def test_reentrant_checkpointing_is_refused(how, name):
    model, state = shared(how)
    model.how = {name: True}
    with pytest.raises(RuntimeError, match=f'{name!r} shares its router .* use_reentrant=False'):
        step(model, state)


def test_a_recomputation_that_could_be_two_calls_is_refused():
    model, state = shared(levels=(4, 4))
    step(model, state)  # without a checkpoint it is clear
    model.how = {'first': False}
    step(model, state)  # whoever decides decides again
    model.how = {'second': False}
    with pytest.raises(RuntimeError, match='called 2 times .* cannot tell which call'):
        step(model, state)


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="share must be one of .*, got 'batch'"):
        shared('batch')
    with pytest.raises(ValueError, match="decides once per image, the granularity is 'patch'"):
        shared('image', granularity='patch', grid=2)
    model, state = shared('image')
    state.begin(num_images=B)
    with pytest.raises(RuntimeError, match=r'RoutingState.begin\(..., images=inputs\)'):
        model(IMAGES)
    model, state = shared()
    state.begin(num_images=B)
    model.first(IMAGES)
    with pytest.raises(ValueError, match='decided about 4 items, and has 2'):
        model.second(IMAGES[:2])


def _train_shared(rank, port, folder):
    torch.distributed.init_process_group(
        'gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    balance = [dict(type='KLLoss', weight=0.5), dict(type='RelativeImportanceConstraint')]
    model, state = shared(balance=balance)
    ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(2):
        torch.manual_seed(2 * seed + rank)
        optimiser.zero_grad()
        state.begin(num_images=B, training=True)
        loss = ddp(torch.randn(B, C, 8, 8))
        (loss + sum(state.collect().values())).backward()
        optimiser.step()
    torch.save(model.state_dict(), f'{folder}/{rank}.pth')
    torch.distributed.destroy_process_group()


def test_ranks_stay_equal_under_ddp(tmp_path):
    one, two = two_processes(_train_shared, tmp_path)
    fresh = shared(balance=[dict(type='RelativeImportanceConstraint')])[0].state_dict()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=0, msg=key)
    assert not torch.equal(one['first.router.gate'], fresh['first.router.gate'])
