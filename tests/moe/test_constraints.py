"""Hard constraints: values by hand, the controller in a simulation, resuming, and the edges."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from moe_testlib import ToyFFN, moe_of, plan_router, topk_router
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdet_moe.moe import (
    BALANCE,
    ROUTERS,
    MeanImportanceConstraint,
    RelativeImportanceConstraint,
    Router,
    Routing,
    RoutingContext,
    RoutingState,
    TopKRouter,
)

KINDS = ['RelativeImportanceConstraint', 'MeanImportanceConstraint']
RELATIVE = dict(type='RelativeImportanceConstraint', threshold=0.5)
MEAN = dict(type='MeanImportanceConstraint', threshold=0.3)


class Bench:
    """Constraints in training, without a layer around them."""

    def __init__(self, *constraints):
        self.constraints = constraints
        self.state = RoutingState()
        for constraint in constraints:
            self.state.register(constraint)

    def context(self, items, recompute=False):
        return RoutingContext(
            self.state,
            num_items=items,
            training=True,
            recompute=recompute,
            layer='here',
            balance=self.constraints,
        )

    def call(self, weights):
        """One call of the layer: the logits' mask, after which the items get ``weights``."""
        weights = torch.as_tensor(weights, dtype=torch.float32)
        context = self.context(weights.shape[0])
        logits = context.constrain(torch.zeros_like(weights))
        for constraint in self.constraints:
            assert constraint(Routing.from_dense(weights), context) == {}
        return logits[0].isinf().tolist() if len(logits) else None

    def batch(self, *calls):
        """One forward; what was closed in each call."""
        self.state.begin(training=True)
        closed = [self.call(weights) for weights in calls]
        self.state.collect()
        return closed[0] if len(closed) == 1 else closed


def relative(experts=4, **kwargs):
    return RelativeImportanceConstraint(num_experts=experts, **kwargs)


def mean(experts=4, **kwargs):
    return MeanImportanceConstraint(num_experts=experts, **kwargs)


def all_to(expert, items=8, experts=4):
    return torch.eye(experts)[torch.full((items,), expert)]


def test_relative_importance_accumulates_the_excess_and_closes_for_the_next_batch():
    constraint = relative(threshold=0.5)
    bench = Bench(constraint)
    # I = [8 0 0 0], B/E = 2: R = [3 -1 -1 -1]
    assert bench.batch(all_to(0)) == [False] * 4
    assert constraint.relative.tolist() == pytest.approx([3, -1, -1, -1])
    # Expert 0 is closed, all go to 1: R = [2 2 -2 -2]
    assert bench.batch(all_to(1)) == [True, False, False, False]
    assert constraint.relative.tolist() == pytest.approx([2, 2, -2, -2])
    assert bench.batch(all_to(2)) == [True, True, False, False]  # R = [1 1 1 -3]
    assert bench.batch(all_to(3)) == [True, True, True, False]  # R = 0: all even again
    assert constraint.relative.tolist() == pytest.approx([0, 0, 0, 0], abs=1e-6)
    # I = [5 1 1 1]: R_0 = 3/2, the others -1/2
    assert bench.batch([[1, 0, 0, 0]] * 4 + [[0.25] * 4] * 4) == [False] * 4
    assert constraint.relative.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5])


def test_mean_importance_closes_while_the_running_mean_is_too_high():
    constraint = mean(threshold=0.3)
    bench = Bench(constraint)
    # M = [1 0 0 0]: 1 - 1/4 > .3
    assert bench.batch(all_to(0)) == [False] * 4
    assert constraint.mean.tolist() == pytest.approx([1, 0, 0, 0])
    # M = [1/2 1/2 0 0]: 1/2 - 1/4 = .25, open again. The batch's size does not weigh.
    assert bench.batch(all_to(1, items=2)) == [True, False, False, False]
    assert constraint.mean.tolist() == pytest.approx([0.5, 0.5, 0, 0])
    # M = [2/3 1/3 0 0]: 2/3 - 1/4 = .417 > .3
    assert bench.batch(all_to(0)) == [False] * 4
    assert constraint.mean.tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert constraint.batches.item() == 3
    assert bench.batch(all_to(1)) == [True, False, False, False]


@pytest.mark.parametrize('threshold, closed', [(2.99, True), (3.0, False)])
def test_closed_means_greater_than_the_threshold(threshold, closed):
    bench = Bench(relative(threshold=threshold))
    bench.batch(all_to(0))  # R_0 = 3 exactly
    assert bench.batch(all_to(0))[0] is closed


def test_importance_is_the_sum_of_combine_weights_not_of_items():
    constraint = relative(2)
    Bench(constraint).batch([[0.9, 0.1], [0.7, 0.3]])
    # I = [1.6 .4], mean 1: R = [.6 -.6], though each expert has two items.
    assert constraint.relative.tolist() == pytest.approx([0.6, -0.6])


def test_weights_that_do_not_sum_to_one_count_by_their_share():
    # k = 1 with the gate as weight: I = [.6 .3 0], mean .3: R = [1 0 -1], sum 0 as ever.
    constraints = relative(3), mean(3)
    Bench(*constraints).batch([[0.6, 0, 0], [0, 0.3, 0]])
    assert constraints[0].relative.tolist() == pytest.approx([1, 0, -1], abs=1e-6)
    assert constraints[1].mean.tolist() == pytest.approx([2 / 3, 1 / 3, 0])


def test_the_calls_of_one_forward_are_one_batch():
    # Three levels with one expert each: I = [8 8 8 0], mean 6: R = [1/3 1/3 1/3 -1].
    constraint = relative(threshold=0.3)
    bench = Bench(constraint)
    closed = bench.batch(all_to(0), all_to(1), all_to(2))
    assert closed == [[False] * 4] * 3  # nothing is decided between the calls
    assert constraint.relative.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, -1])
    closed = bench.batch(all_to(3), all_to(3)[:0], all_to(3))
    assert closed == [[True, True, True, False], None, [True, True, True, False]]
    # I = [0 0 0 16], mean 4: R = [-2/3 -2/3 -2/3 2]
    assert constraint.relative.tolist() == pytest.approx([-2 / 3, -2 / 3, -2 / 3, 2])


# Never all


@pytest.mark.parametrize('k', [1, 2, 3])
def test_at_least_so_many_experts_stay_open_those_with_the_least_account(k):
    for kind in (relative, mean):
        constraint = kind(threshold=0.0)
        constraint.min_open = k
        account = constraint.relative if kind is relative else constraint.mean
        account.copy_(torch.tensor([4.0, 2.0, 3.0, 1.0]))  # all are over the threshold
        # Ranks from the least account: experts 3, 1, 2, 0.
        assert constraint.blocked().tolist() == [True, k < 2, k < 3, False]


def test_two_constraints_together_leave_an_expert_open():
    first, second = relative(threshold=0.0), mean(threshold=0.0)
    first.relative.copy_(torch.tensor([1.0, 1.0, 1.0, -3.0]))  # closes 0, 1, 2
    second.mean.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))  # alone it would close 3
    assert second.blocked().tolist() == [False, False, False, True]
    assert Bench(first, second).batch(all_to(3)) == [True, True, True, False]


def test_no_sequence_of_batches_closes_all():
    generator = torch.Generator().manual_seed(0)
    for k in (1, 2):
        constraints = relative(threshold=0.0), mean(threshold=0.0)
        for constraint in constraints:
            constraint.min_open = k
        bench = Bench(*constraints)
        for _ in range(200):
            weights = torch.rand(3, 4, generator=generator) ** 8
            assert bench.batch(weights).count(False) >= k


# When


def test_nothing_happens_in_evaluation():
    layer, state = layer_of([RELATIVE, MEAN])
    train(layer, state, steps=2)
    before = copy.deepcopy(layer.state_dict())
    layer.eval()
    state.begin(num_images=6)
    layer(torch.randn(6, 4))
    state.collect()
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    context = RoutingContext(state, num_items=6, training=False, balance=tuple(layer.balance))
    assert layer.balance[0].blocked().any()
    assert context.constrain(torch.zeros(6, 4)).isfinite().all()


def test_a_forward_that_is_not_collected_does_not_count():
    constraint = relative()
    bench = Bench(constraint)
    bench.state.begin(training=True)
    bench.call(all_to(0))
    bench.batch(all_to(1))
    assert constraint.relative.tolist() == pytest.approx([-1, 3, -1, -1])


def test_the_second_collect_does_not_count_again():
    constraint = relative()
    bench = Bench(constraint)
    bench.batch(all_to(0))
    bench.state.collect()
    assert constraint.relative.tolist() == pytest.approx([3, -1, -1, -1])


@pytest.mark.parametrize('reentrant', [True, False])
def test_recomputation_repeats_the_mask_and_does_not_count_again(reentrant):
    def trained(checkpointed):
        layer, state = layer_of([dict(RELATIVE, threshold=0.0), MEAN], make=lambda: ToyFFN(4))
        optim = torch.optim.SGD(layer.parameters(), lr=0.1)
        for step in range(4):
            x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(step))
            x.requires_grad_()
            state.begin(num_images=2, training=True)
            out = checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
            loss = out.square().mean() + sum(state.collect().values())
            optim.zero_grad()
            loss.backward()
            optim.step()
        return layer.state_dict()

    torch.testing.assert_close(trained(True), trained(False), rtol=1e-5, atol=1e-6)


def test_a_layer_that_does_not_run_adds_nothing():
    layer, state = layer_of([RELATIVE, MEAN])
    before = copy.deepcopy(layer.state_dict())
    state.begin(num_images=2, training=True)
    state.collect()
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_constraints_of_a_copied_model_go_on_in_the_copy_alone():
    layer, state = layer_of([RELATIVE])
    train(layer, state, steps=1)
    twin = copy.deepcopy(layer)
    before = layer.balance[0].relative.clone()
    train(twin, twin.state, steps=1)
    assert torch.equal(layer.balance[0].relative, before)
    assert not torch.equal(twin.balance[0].relative, before)


# The controller


def simulate(bench, steps, seed, experts=4, items=16, until=0):
    """A collapsed router, k = 1: logits [3 2 1 0] and noise; the share of each expert per step."""
    generator = torch.Generator().manual_seed(seed)
    wish = torch.arange(experts - 1, -1, -1.0)
    seen = []
    for step in range(steps):
        logits = wish + 0.5 * torch.randn(items, experts, generator=generator)
        if step < until:
            continue
        bench.state.begin(training=True)
        context = bench.context(items)
        choice = context.constrain(logits).argmax(1)
        weights = torch.eye(experts)[choice]
        for constraint in bench.constraints:
            constraint(Routing.from_dense(weights), context)
        bench.state.collect()
        seen.append(weights.mean(0))
    return torch.stack(seen)


def test_without_a_constraint_the_simulated_router_is_collapsed():
    share = simulate(Bench(), 200, seed=0).mean(0)
    # Expert 0 loses to 1 where N(0, .5 sqrt 2) > 1: 7.9 %
    assert share[0] > 0.85
    assert share[3] < 0.01


def test_the_relative_constraint_balances_a_collapsed_router():
    # |R_e| stays below threshold + (E - 1) (one batch of everything): after n steps the mean share
    # is 1/E within (|R| / n) / E, here 3.5 / 2000 / 4 = .04 %.
    constraint = relative(threshold=0.5)
    seen = simulate(Bench(constraint), 2000, seed=1)
    assert seen.mean(0).tolist() == pytest.approx([0.25] * 4, rel=0.02)
    # In every window of 100 steps, too.
    for window in seen.split(100):
        assert window.mean(0).tolist() == pytest.approx([0.25] * 4, abs=0.03)


@pytest.mark.parametrize('experts, k, noise, skew', [
    (4, 2, 'fixed', 1.0), (4, 2, 'learned', 1.0), (4, 3, 'fixed', 1.0), (10, 2, 'learned', 1.0),
])  # fmt: skip
def test_the_relative_constraint_balances_a_router_of_several_experts(experts, k, noise, skew):
    """A real router that insists: bias skew · [E-1, ..., 1, 0] on the logits, 2000 steps."""
    state = RoutingState()
    constraint = relative(experts, threshold=0.5)
    state.register(constraint)
    router = TopKRouter(1, experts, k=k, noise=noise, bias=True)
    with torch.no_grad():
        router.gate.zero_()
        router.bias.copy_(skew * torch.arange(experts - 1, -1, -1.0))
    torch.manual_seed(0)
    total, items = torch.zeros(experts), torch.zeros(16, 1)
    for _ in range(2000):
        state.begin(training=True)
        context = RoutingContext(state, 16, training=True, layer='here', balance=(constraint,))
        with torch.no_grad():
            routing = router(items, context)
        constraint(routing, context)
        state.collect()
        total += routing.importance() / 16
    assert (total / 2000 * experts).tolist() == pytest.approx([1.0] * experts, rel=0.02)
    assert constraint.relative.abs().max() < 10 * experts  # an account that stays bounded


def test_a_closed_expert_is_not_even_the_second_choice():
    layer, state = layer_of([dict(RELATIVE, threshold=0.5)], k=2)
    layer.balance[0].relative.copy_(torch.tensor([2.0, 1.0, 1.0, -4.0]))  # only expert 3 is open
    train(layer, state, steps=1)
    counts = state.stats()['target/count']
    assert counts[:3].tolist() == [0, 0, 0] and counts[3] > 0
    assert state.stats()['target/weight'][3].item() == pytest.approx(counts[3].item())
    assert all(p.grad is None for e in range(3) for p in layer.experts[e].parameters())


def test_the_mean_constraint_only_caps():
    constraint = mean(threshold=0.3)
    share = simulate(Bench(constraint), 2000, seed=1).mean(0)
    # Expert 0 is held at 1/4 + .3; expert 1 takes nearly all the rest and is below its own cap.
    assert share[0].item() == pytest.approx(0.55, abs=0.01)
    assert share[1].item() > 0.35
    assert share[3].item() < 0.02


# Resuming


@pytest.mark.parametrize('kind', [relative, mean])
def test_resuming_half_way_gives_the_identical_trajectory(kind):
    whole = simulate(Bench(kind()), 120, seed=2)
    first = kind()
    simulate(Bench(first), 60, seed=2)
    second = kind()
    second.load_state_dict(first.state_dict())
    rest = simulate(Bench(second), 120, seed=2, until=60)
    assert torch.equal(rest, whole[60:])


def test_the_account_is_in_the_state_dict_of_the_layer():
    layer, state = layer_of([dict(type='ImportanceLoss'), RELATIVE, MEAN])
    train(layer, state, steps=3)
    keys = [key for key in layer.state_dict() if key.startswith('balance')]
    assert keys == ['balance.1.relative', 'balance.2.mean', 'balance.2.batches']
    other, _ = layer_of([dict(type='ImportanceLoss'), RELATIVE, MEAN])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.balance[1].relative, layer.balance[1].relative)
    assert other.balance[2].batches.item() == 3


# Edges


@pytest.mark.parametrize('kind', [relative, mean])
def test_one_expert_is_never_closed(kind):
    constraint = kind(1, threshold=0.0)
    bench = Bench(constraint)
    for _ in range(3):
        assert bench.batch(torch.ones(4, 1)) == [False]
    assert constraint.account().tolist() == [0.0]


@pytest.mark.parametrize('kind', [relative, mean])
@pytest.mark.parametrize(
    'weights', [torch.zeros(0, 4), torch.zeros(3, 4), torch.full((3, 4), math.nan), None]
)
def test_an_empty_batch_or_one_with_nan_does_not_count(kind, weights):
    constraint = kind()
    bench = Bench(constraint)
    bench.batch(all_to(0))
    before = copy.deepcopy(constraint.state_dict())
    if weights is None:
        weights = torch.full((3, 4), 1.0)
        weights[0, 0] = math.inf
    bench.batch(weights)
    torch.testing.assert_close(dict(constraint.state_dict()), dict(before), rtol=0, atol=0)


def test_a_closed_expert_leaves_all_losses_and_gradients_finite():
    balance = [
        dict(type='ImportanceLoss'),
        dict(type='LoadLoss'),
        dict(type='SwitchLoss'),
        dict(type='KLLoss'),
        dict(type='EntropyLoss', item_weight=1.0),
        dict(type='VarianceLoss'),
        dict(RELATIVE, threshold=0.0),
        dict(MEAN, threshold=0.0),
    ]
    layer, state = layer_of(balance, k=2)
    closed = 0
    for step in range(6):
        closed += layer.balance[6].blocked().sum().item()
        losses = train(layer, state, steps=1, seed=step)
        assert all(math.isfinite(value) for value in losses.values()), losses
        for key, p in layer.named_parameters():
            assert p.grad is None or p.grad.isfinite().all(), key
    assert closed
    assert layer.router.gate.grad.abs().sum() > 0


def test_a_closed_expert_gets_no_item():
    layer, state = layer_of([dict(RELATIVE, threshold=0.0)], k=1)
    for step in range(5):
        closed = layer.balance[0].blocked()
        train(layer, state, steps=1, seed=step)
        assert state.stats()['target/count'][closed].sum() == 0
    assert closed.any()


@ROUTERS.register
class _ProudRouter(Router):
    """Asks nobody."""

    def forward(self, items, context):
        return Routing.from_topk(None, torch.zeros(len(items), 1).long(), self.num_experts)


def test_a_router_that_asks_nobody_is_refused_in_training():
    layer, state = moe_of(
        nn.Linear(4, 4), num_experts=4, router=dict(type='_ProudRouter'), balance=[RELATIVE]
    )
    state.begin(num_images=3, training=True)
    with pytest.raises(ValueError, match='never calls context.constrain'):
        layer(torch.randn(3, 4))


@pytest.mark.parametrize('kind', KINDS)
def test_mistakes_in_the_config_are_one_clear_line(kind):
    def build(router=None, **cfg):
        router = router or topk_router(k=1)
        balance = [dict(type=kind, **cfg)]
        return moe_of(nn.Linear(4, 4), num_experts=3, router=router, balance=balance)

    build()
    with pytest.raises(ValueError, match=f'{kind}: threshold must be >= 0, got -1'):
        build(threshold=-1)
    with pytest.raises(ValueError, match='is for 4 experts, the router has 3'):
        build(num_experts=4)
    with pytest.raises(TypeError, match=r"takes no \['weight'\]"):
        build(weight=0.5)
    with pytest.raises(ValueError, match='PlanRouter learns nothing'):
        build(router=plan_router())
    constraint = BALANCE.build(dict(type=kind), num_experts=4)
    free = SimpleNamespace(num_experts=4, extra_experts=[nn.Identity()])
    with pytest.raises(ValueError, match='evens out all experts, SimpleNamespace has free ones'):
        BALANCE.build(dict(type=kind), num_experts=4).check(free)
    with pytest.raises(ValueError, match=r'logits must have shape \(T, 4\), got \(2, 3\)'):
        constraint.constrain(torch.zeros(2, 3), Bench(constraint).context(2))


# Helpers


def layer_of(balance, k=1, make=lambda: nn.Linear(4, 4)):
    torch.manual_seed(0)
    layer, state = moe_of(make(), num_experts=4, router=topk_router(k=k), balance=balance)
    with torch.no_grad():
        layer.router.gate.copy_(torch.randn(4, 4))
    return layer, state


def train(layer, state, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        state.begin(num_images=6, training=True)
        out = layer(torch.randn(6, 4, generator=generator))
        losses = state.collect()
        (out.square().mean() + sum(losses.values())).backward()
    return {key: value.item() for key, value in losses.items()}
