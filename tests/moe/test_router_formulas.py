"""Each router against its formula, with the arithmetic written out."""

import math

import pytest
import torch
from moe_testlib import ToyFFN, moe_of, scatter_experts
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdet_moe.moe import (
    ImportanceLoss,
    KLLoss,
    RoutingContext,
    RoutingState,
    SwitchLoss,
    TargetError,
    replace_modules,
    upcycle_,
)
from mmdet_moe.moe.routers import (
    BASERouter,
    DAMEXRouter,
    ExpertChoiceRouter,
    GShardRouter,
    MoEPPRouter,
    PlanPriorRouter,
    ReMoERouter,
    SinkhornRouter,
    SoftMoERouter,
    SwitchRouter,
    TopKRouter,
)
from mmdet_moe.moe.routers.damex import soft_cross_entropy
from mmdet_moe.moe.routers.gated import drop_over_capacity, expert_capacity, router_z_loss
from mmdet_moe.moe.routers.moe_pp import heterogeneous_capacity, heterogeneous_load_loss
from mmdet_moe.moe.routers.remoe import l1_loss, sparsity_step
from mmdet_moe.moe.routers.sinkhorn import balanced_assignment, sinkhorn
from mmdet_moe.planning import ExpertPlan

MEANS = {'a': [1.0, 0.0], 'b': [0.0, 1.0], 'mixed': [-1.0, 0.0]}
MIXED = {'a': 'e0', 'b': 'e1', 'mixed': {'e0': 0.25, 'e2': 0.75}}


def context_of(items, training=False, per_image=1, state=None):
    return RoutingContext(state or RoutingState(), items, training, per_image)


def dense_weights(routing):
    out = torch.zeros(routing.num_items, routing.num_experts)
    experts = [e for e, count in enumerate(routing.counts) for _ in range(count)]
    weights = torch.ones(len(experts)) if routing.weights is None else routing.weights.detach()
    out[routing.items, experts] = weights.float()
    return out


def with_logits(router, logits):
    """``router`` with a gate that gives these logits for the items of an identity matrix."""
    with torch.no_grad():
        router.gate.copy_(torch.tensor(logits).t())
    return torch.eye(len(logits))


# Capacity, z-loss, jitter


def test_capacity_is_rounded_up_and_never_more_than_all():
    # 1.25 · 10 · 2 / 4 = 6.25 -> 7; 1.1 · 10 is 11.000000000000002 in floats, and 11 here
    assert expert_capacity(10, 4, 2, 1.25) == 7
    assert expert_capacity(10, 1, 1, 1.1) == 10 and expert_capacity(100, 10, 1, 1.1) == 11
    assert expert_capacity(0, 4, 2, 1.0) == 0


def test_first_choices_come_before_second_ones_and_earlier_items_before_later():
    choices = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 0]])
    # Expert 0: items 0, 1 of the first choices fill it. Expert 1: item 3, then item 0.
    kept = drop_over_capacity(choices, 2, 2)
    assert kept.tolist() == [[0, 1], [0, -1], [-1, -1], [1, -1]]


def test_by_priority_the_strongest_items_are_kept():
    choices = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 0]])
    # Order 2, 0, 3, 1. Expert 0: items 2, 0. Expert 1: item 3, then item 2.
    kept = drop_over_capacity(choices, 2, 2, torch.tensor([0.5, 0.1, 0.9, 0.2]))
    assert kept.tolist() == [[0, -1], [-1, -1], [0, 1], [1, -1]]


def test_what_is_dropped_already_takes_no_place_and_experts_may_differ():
    choices = torch.tensor([[0, -1], [-1, 1], [0, 1]])
    assert drop_over_capacity(choices, 1, 2).tolist() == [[0, -1], [-1, 1], [-1, -1]]
    kept = drop_over_capacity(choices, torch.tensor([2, 0]), 2)
    assert kept.tolist() == [[0, -1], [-1, -1], [0, -1]]
    assert drop_over_capacity(torch.zeros(0, 2, dtype=torch.long), 0, 2).shape == (0, 2)


def test_the_capacity_is_the_factors_of_training_or_testing():
    router = SwitchRouter(2, 2, capacity_factor=0.5, test_capacity_factor=1.0)
    x = with_logits(router, [[2.0, 0.0], [3.0, 0.0]])
    assert router(x, context_of(2, training=True)).counts == [1, 0]  # ceil(.5 · 2 · 1 / 2) = 1
    assert router(x, context_of(2)).counts == [1, 0]
    assert not router.keeps_dense_function
    best = SwitchRouter(2, 2, capacity_factor=0.5, prioritised=True)
    x = with_logits(best, [[2.0, 0.0], [3.0, 0.0]])
    assert best(x, context_of(2, training=True)).items.tolist() == [1]
    assert best(x, context_of(2)).counts == [2, 0]
    with pytest.raises(ValueError, match='there is no capacity_factor'):
        SwitchRouter(2, 2, prioritised=True)


def test_priority_is_the_gates_even_where_every_weight_is_one():
    # k = 1, renormalised: weights 1, 1, 1; probabilities of the first choice .73, .95, .88.
    logits = [[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]]
    router = TopKRouter(
        3, 2, k=1, noise=False, renormalize=True, capacity_factor=2 / 3, prioritised=True
    )
    x = with_logits(router, logits)
    routing = router(x, context_of(3, training=True))  # ceil(2/3 · 3 · 1 / 2) = 1 place
    assert routing.items.tolist() == [1] and routing.weights.tolist() == [1.0]


def test_z_loss_is_the_mean_squared_log_sum_exp():
    # logsumexp(0, 0) = ln 2, logsumexp(ln 3, 0) = ln 4
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    expected = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    assert router_z_loss(logits).item() == pytest.approx(expected)
    assert router_z_loss(torch.zeros(0, 3)).item() == 0
    router = TopKRouter(2, 2, k=1, noise=False, z_loss=0.5)
    x = with_logits(router, logits.tolist())
    losses = router(x, context_of(2, training=True)).losses
    assert losses['router_z'].item() == pytest.approx(0.5 * expected)
    assert router(x, context_of(2)).losses == {}


def test_jitter_multiplies_what_the_gate_sees_in_training_only():
    torch.manual_seed(0)
    router = TopKRouter(1, 2, k=1, noise=False, jitter=0.25)
    with torch.no_grad():
        router.gate.copy_(torch.tensor([[1.0], [0.0]]))
    x = torch.full((500, 1), 2.0)
    seen = router(x, context_of(500, training=True)).logits[:, 0]
    assert 1.5 <= seen.min() < 1.52 and 2.48 < seen.max() <= 2.5
    assert (router(x, context_of(500)).logits[:, 0] == 2).all()


# Switch, GShard


def test_switch_takes_the_probability_as_weight_and_gshard_renormalises():
    logits = [[math.log(5), math.log(3), math.log(2)]]  # p = .5, .3, .2
    router = SwitchRouter(1, 3)
    weights = dense_weights(router(with_logits(router, logits), context_of(1)))
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.0, 0.0]]))
    router = GShardRouter(1, 3)
    weights = dense_weights(router(with_logits(router, logits), context_of(1)))
    torch.testing.assert_close(weights, torch.tensor([[0.625, 0.375, 0.0]]))


def test_the_second_expert_is_kept_with_probability_weight_over_threshold():
    torch.manual_seed(0)
    router = GShardRouter(1, 2)
    with torch.no_grad():  # p = .95, .05: kept with probability .05 / .2 = 1/4
        router.gate.copy_(torch.tensor([[math.log(19)], [0.0]]))
    x = torch.ones(4000, 1)
    counts = router(x, context_of(4000, training=True)).counts
    assert counts[0] == 4000 and counts[1] / 4000 == pytest.approx(0.25, abs=0.03)
    assert router(x, context_of(4000)).counts == [4000, 4000]


# Expert choice


def test_every_expert_takes_its_best_items_of_each_image():
    router = ExpertChoiceRouter(2, 2, capacity_factor=1.0)
    with torch.no_grad():
        router.gate.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    # Two images of two tokens; C = ceil(1 · 2 / 2) = 1 token per expert and image.
    x = torch.tensor([[3.0, 0.0], [2.0, 0.0], [0.0, 5.0], [0.0, 1.0]])
    weights = dense_weights(router(x, context_of(4, per_image=2)))
    s = [math.exp(a) / (math.exp(a) + 1) for a in (3, 2, 5, 1)]
    expected = torch.tensor([[s[0], 0], [0, 1 - s[1]], [0, s[2]], [1 - s[3], 0]])
    torch.testing.assert_close(weights, expected)
    # Over the batch: two tokens per expert, wherever they are.
    router.group = 'batch'
    assert (dense_weights(router(x, context_of(4, per_image=2))) > 0).sum(0).tolist() == [2, 2]


def test_an_expert_that_a_constraint_closes_chooses_nothing():
    layer, state = moe_of(
        ToyFFN(4),
        num_experts=2,
        granularity='token',
        router=dict(type='ExpertChoiceRouter'),
        balance=[dict(type='RelativeImportanceConstraint', threshold=0.5)],
    )
    layer.balance[0].relative.copy_(torch.tensor([1.0, -1.0]))  # expert 0 had too much
    state.begin(num_images=2, training=True)
    layer(torch.randn(2, 3, 4)).sum().backward()
    assert state.stats()['target/count'].tolist() == [0, 6]  # ceil(2 · 3 / 2) = 3 of each image
    assert all(p.grad is None for p in layer.experts[0].parameters())


# Sinkhorn, BASE


def test_sinkhorn_makes_rows_and_columns_even():
    logits = 3 * torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    scaled = sinkhorn(logits, 200).exp()
    torch.testing.assert_close(scaled.sum(0), torch.full((4,), 3.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scaled.sum(1), torch.ones(12), rtol=1e-3, atol=1e-3)
    logits[:, 1] = -torch.inf
    scaled = sinkhorn(logits, 200).exp()
    torch.testing.assert_close(scaled.sum(0), torch.tensor([4.0, 0, 4, 4]), rtol=1e-4, atol=1e-4)
    assert sinkhorn(torch.full((2, 3), 1e4), 3).isfinite().all()


def test_sinkhorn_balances_in_training_and_is_greedy_at_test():
    router = SinkhornRouter(4, 2)
    # All like expert 0 best, the last two by less.
    logits = [[5.0, 0.0], [5.0, 0.0], [1.0, 0.0], [1.0, 0.0]]
    x = with_logits(router, logits)
    routing = router(x, context_of(4, training=True))
    assert routing.counts == [2, 2]
    expected = torch.tensor([5.0, 5.0, 0.0, 0.0]).sigmoid()  # of the raw logit of the chosen
    torch.testing.assert_close(dense_weights(routing).sum(1), expected)
    assert router(x, context_of(4)).counts == [4, 0]


def test_base_assigns_evenly_for_the_largest_total():
    scores = torch.tensor([[9.0, 8.0], [7.0, 0.0], [6.0, 5.0], [3.0, 1.0]])
    # Two each. 0 -> {1, 3}: 7 + 3 + 8 + 5 = 23; {0, 1}: 9 + 7 + 5 + 1 = 22; {1, 2}: 22
    assert balanced_assignment(scores).tolist() == [1, 0, 1, 0]
    # Interleaved groups of two: items 0, 2 and items 1, 3.
    assert balanced_assignment(scores, 2).tolist() in ([0, 0, 1, 1], [1, 0, 0, 1])
    counts = balanced_assignment(torch.randn(11, 4)).bincount(minlength=4)
    assert counts.max() <= 3 and counts.sum() == 11
    scores[:, 0] = -torch.inf
    assert balanced_assignment(scores).tolist() == [1, 1, 1, 1]
    router = BASERouter(4, 2)
    x = with_logits(router, [[5.0, 0.0]] * 4)
    assert router(x, context_of(4, training=True)).counts == [2, 2]
    assert router(x, context_of(4)).counts == [4, 0]


# ReMoE


def test_remoe_weighs_the_l1_norm_by_use():
    weights = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    # Means 2 and 1: plain 3. Use 1 and 1/2, times E / k = 2: 2·2·1 + 1·2·.5 = 5
    assert l1_loss(weights, 1.0, balanced=False).item() == 3
    assert l1_loss(weights, 1.0).item() == 5
    assert l1_loss(torch.zeros(0, 2), 1.0).item() == 0


def test_remoe_moves_its_coefficient_once_per_forward_towards_the_target():
    n = torch.tensor
    # Target density 1/4 of 16: 5 pairs are too many, 3 too few, 4 right, nothing seen is right
    steps = [sparsity_step(n(p), n(e), 0.25).item() for p, e in [(5, 16), (3, 16), (4, 16), (0, 0)]]
    assert steps == [1, -1, 0, 0]
    layer, state = moe_of(
        ToyFFN(4),
        granularity='token',
        num_experts=4,
        router=dict(type='ReMoERouter', coefficient=1.0),
    )
    router = layer.router
    x = torch.ones(2, 3, 4)
    for gate, calls, expected in [(1.0, 1, 1.2), (1.0, 3, 1.44), (-1.0, 1, 1.2)]:
        with torch.no_grad():
            router.gate.fill_(gate)
        state.begin(num_images=2, training=True)
        for _ in range(calls):
            layer(x)
        state.collect()
        assert router.coefficient.item() == pytest.approx(expected)
    layer.eval()
    state.begin(num_images=2)
    layer(x)
    state.collect()
    assert router.coefficient.item() == pytest.approx(1.2)
    assert ReMoERouter(4, 4).coefficient.item() == pytest.approx(1e-8)


def test_balance_losses_of_remoe_are_of_its_relu_gates():
    router = ReMoERouter(2, 2)
    x = with_logits(router, [[1.0, -1.0], [2.0, 1.0]])
    context = context_of(2)
    routing = router(x, context)
    assert routing.probabilities is None
    # Importance 1 + 2 and 0 + 1: mean 2, variance 1, over the squared mean 1/4
    loss = ImportanceLoss(weight=1.0)(routing, context)['importance']
    assert loss.item() == pytest.approx(0.25)
    with pytest.raises(
        ValueError, match='SwitchLoss is a loss of probabilities, which ReMoERouter'
    ):
        SwitchLoss().check(router)


# DAMEX, plan prior


def test_damex_loss_is_the_cross_entropy_to_the_plans_row():
    router = DAMEXRouter(MIXED, dict(type='TopKRouter', k=1, noise=False), in_channels=1)
    with torch.no_grad():
        router.inner.gate.copy_(torch.tensor([[math.log(5)], [math.log(3)], [math.log(2)]]))
    state = RoutingState()
    state.begin(['b', 'mixed', None], training=True)
    # Two tokens per image. b: -ln .3; mixed: -.25 ln .5 - .75 ln .2; no domain: teaches nothing.
    expected = (-math.log(0.3) - 0.25 * math.log(0.5) - 0.75 * math.log(0.2)) / 2
    routing = router(torch.ones(6, 1), context_of(6, True, 2, state))
    assert routing.losses['damex'].item() == pytest.approx(0.1 * expected)
    state.begin([None, None], training=True)
    assert router(torch.ones(2, 1), context_of(2, True, 1, state)).losses['damex'].item() == 0
    router.unknown = 'error'
    with pytest.raises(ValueError, match='image 0 of the batch, domain None: not one of'):
        router(torch.ones(2, 1), context_of(2, True, 1, state))
    blocked = torch.tensor([[0.0, -torch.inf]])
    assert soft_cross_entropy(blocked, torch.tensor([[0.0, 1.0]])).item() == 0


def prior_router(**kwargs):
    prototypes = dict(embedder={}, dimension=2, mean=MEANS, concentration=50.0)
    return PlanPriorRouter(2, ExpertPlan.from_assignment(MIXED, prototypes=prototypes), **kwargs)


def test_the_plan_prior_starts_as_the_plan_and_needs_no_domain_at_test():
    x = torch.randn(3, 2)
    plan = torch.tensor([[0.0, 1.0, 0.0], [0.25, 0.0, 0.75], [1.0, 0.0, 0.0]])
    z = torch.tensor([[0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]])
    for training in (True, False):
        state = RoutingState()
        state.begin(['b', 'mixed', 'a'] if training else None, 3, embed=lambda: z)
        router = prior_router(smoothing=1e-3)
        assert router.k == 2 and router.keeps_dense_function
        weights = dense_weights(router(x, context_of(3, training, state=state)))
        torch.testing.assert_close(weights, plan, rtol=0, atol=2e-3)
        # One expert each: the plan's best, with weight exactly 1 and a gradient all the same.
        router = prior_router(k=1)
        routing = router(x, context_of(3, training, state=state))
        assert dense_weights(routing).tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
        routing.weights.sum().backward()
        assert router.gate.grad.abs().sum() > 0


def test_damex_around_a_plan_prior_asks_for_embeddings_and_hands_options_on():
    plan = ExpertPlan.from_assignment({'a': 'e0', 'b': 'e1'}, prototypes=dict(
        embedder=dict(type='FrozenEmbedder'), dimension=2, concentration=5.0,
        mean={'a': [1.0, 0.0], 'b': [0.0, 1.0]},
    ))  # fmt: skip
    router = DAMEXRouter(plan, dict(type='PlanPriorRouter', plan=plan), in_channels=2)
    assert router.needs_embeddings
    top1 = DAMEXRouter(plan, dict(type='TopKRouter', k=1, renormalize=True), in_channels=2)
    with pytest.raises(ValueError, match='has nothing to move'):
        KLLoss(of='weights').check(top1)


def test_the_plan_prior_leaves_the_plan_where_the_gate_outweighs_it():
    router = prior_router(k=1, smoothing=0.01, domains='always')
    state = RoutingState()
    state.begin(['b'])
    # Prior of b: e1 .99 + .01/3, others .01/3: ln(.99333 / .00333) = ln 298 = 5.697
    for gate, expert in [(5.6, 1), (5.8, 2)]:
        with torch.no_grad():
            router.gate.copy_(torch.tensor([[0.0, 0.0], [0.0, 0.0], [gate, 0.0]]))
        weights = dense_weights(router(torch.tensor([[1.0, 0.0]]), context_of(1, state=state)))
        assert weights.argmax().item() == expert


def test_a_plan_prior_that_could_not_be_tested_is_refused():
    with pytest.raises(ValueError, match='has no prototypes'):
        PlanPriorRouter(2, MIXED)
    assert PlanPriorRouter(2, MIXED, domains='always').num_experts == 3


# MoE++


def test_moe_pp_mixes_free_experts_and_leaves_zeros_out():
    layer, state = moe_of(
        nn.Linear(2, 2), num_experts=1, router=dict(type='MoEPPRouter', k=3, hidden=2, constant=1)
    )
    router = layer.router  # experts: 0 linear, 1 copy, 2 constant, 3 zero
    x = torch.tensor([[1.0, -1.0]])
    with torch.no_grad():
        router.gate_in.zero_()
        router.gate_out.zero_()
        router.free[1].vector.fill_(4.0)
        router.free[1].mix.zero_()  # alpha = 1/2, 1/2: (x + v) / 2
    logits = torch.tensor([[0.0, math.log(2), math.log(3), math.log(4)]])
    router.logits = lambda x: logits  # p = .1, .2, .3, .4: chosen zero, constant, copy
    state.begin(num_images=1)
    layer.eval()
    # Without the zero: copy .2 / .5, constant .3 / .5
    expected = 0.4 * x + 0.6 * (x + 4.0) / 2
    torch.testing.assert_close(layer(x), expected)
    assert state.stats()['target/count'].tolist() == [0, 1, 1, 0]


def test_moe_pp_load_loss_and_capacity():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.1, 0.4]])
    chosen = torch.tensor([[0, 1], [0, 2]])
    # f = 1, .5, .5; P = .5, .2, .3; eta = 1, .75, .75: .5 + .075 + .1125
    assert heterogeneous_load_loss(p, chosen, 1, 0.75).item() == pytest.approx(0.6875)
    assert heterogeneous_load_loss(torch.zeros(0, 3), chosen[:0], 1, 0.75).item() == 0
    # 2 experts, 2 free, tau .5: 12 · 2 / (.5 · 2 + 2) = 8 for free ones, 4 for the others
    assert heterogeneous_capacity(12, 2, 4, 2, 0.5, 1.0) == (4, 8)


def test_moe_pp_adds_the_logits_of_the_layer_before():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    state = RoutingState()
    spec = dict(targets=r'\d', num_experts=2, router=dict(type='MoEPPRouter'))
    replace_modules(model, [spec], state)
    one, two = model[0].router, model[1].router
    seen = []
    for router in (one, two):
        router.register_forward_hook(lambda m, i, routing: seen.append(routing.logits.detach()))
    x = torch.randn(4, 3)
    with torch.no_grad():
        for router in (one, two):
            router.residual.copy_(2 * torch.eye(6))
    state.begin(num_images=4)
    hidden = model[0](x)
    model[1](hidden)
    torch.testing.assert_close(seen[0], one.logits(x))  # the first has none before it
    torch.testing.assert_close(seen[1], two.logits(hidden) + 2 * seen[0])


def test_moe_pp_z_loss_is_of_the_logits_it_selects_from():
    model, state = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), RoutingState()
    spec = dict(targets=r'\d', num_experts=2, router=dict(type='MoEPPRouter', z_loss=1.0))
    replace_modules(model, [spec], state)
    seen = []
    for layer in model:
        nn.init.normal_(layer.router.residual, std=10.0)
        nn.init.normal_(layer.router.gate_out)
        layer.router.register_forward_hook(lambda m, i, routing: seen.append(routing.logits))
    state.begin(num_images=4, training=True)
    model(torch.randn(4, 3))
    expected = sum(router_z_loss(logits) for logits in seen)  # the second with its residual
    torch.testing.assert_close(state.collect()['loss_moe_router_z'], expected)
    state.begin(num_images=4)
    model.eval()(torch.randn(4, 3))
    assert not any(state._chains['moe++'].calls.values())  # nothing is computed again in evaluation


def test_moe_pp_drops_by_priority():
    router = MoEPPRouter(
        2, 2, k=1, zero=0, copy=0, constant=0, capacity_factor=0.5, prioritised=True, tau=1.0
    )
    logits = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    # gamma·tau·k·T / (tau·E) = .5 · 4 / 2 = 1 place; of items 0, 1, 2 the surest is 1.
    routing = router.route(torch.zeros(4, 2), logits, context_of(4, training=True))
    assert routing.items.tolist() == [1, 3]
    with pytest.raises(ValueError, match='there is no capacity_factor'):
        MoEPPRouter(2, 2, prioritised=True)


@pytest.mark.parametrize('reentrant', [None, True, False])
def test_moe_pp_starts_over_on_each_level_of_a_head(reentrant):
    """Two layers on three levels with as many images each, like RetinaNet's convolutions."""
    torch.manual_seed(0)
    model, state = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), RoutingState()
    spec = dict(targets=r'\d', num_experts=2, router=dict(type='MoEPPRouter'))
    replace_modules(model, [spec], state)
    for layer in model:
        nn.init.normal_(layer.router.gate_out)
        nn.init.normal_(layer.router.residual)
    one, two = model[0].router, model[1].router
    seen = []
    for router in (one, two):
        router.register_forward_hook(lambda m, i, routing: seen.append(routing.logits.detach()))
    hidden = []
    model[0].register_forward_hook(lambda m, i, out: hidden.append(out.detach()))
    levels = [torch.randn(4, 3).requires_grad_() for _ in range(3)]
    state.begin(num_images=4, training=True)

    def run(x):
        return model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)

    total = sum(run(x).square().sum() for x in levels)
    first_pass = list(seen)
    for level, x in enumerate(levels):
        mine, after = first_pass[2 * level : 2 * level + 2]
        torch.testing.assert_close(mine, one.logits(x).detach())  # none before it, on any level
        added = after - two.logits(hidden[level]).detach()
        torch.testing.assert_close(added, mine @ two.residual.detach().t())
    (total + sum(state.collect().values())).backward()
    if reentrant is not None:  # backward runs the last level first, and each call finds its own
        again = seen[len(first_pass) :]
        assert [a.tolist() for a in again] == [
            x.tolist() for level in (2, 1, 0) for x in first_pass[2 * level : 2 * level + 2]
        ]


@pytest.mark.parametrize('reentrant', [True, False])
def test_moe_pp_recomputes_with_the_logits_it_got_in_the_first_pass(reentrant):
    """Two layers, each checkpointed alone: in backward the second runs before the first."""
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model, state = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), RoutingState()
        spec = dict(targets=r'\d', num_experts=2, router=dict(type='MoEPPRouter'))
        replace_modules(model, [spec], state)
        with torch.no_grad():
            for layer in model:
                layer.router.gate_out.normal_()
                layer.router.residual.normal_()
        state.begin(num_images=4, training=True)
        x = torch.randn(4, 3).requires_grad_()
        for layer in model:
            x = checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
        (x.square().sum() + sum(state.collect().values())).backward()
        results.append({k: p.grad for k, p in model.named_parameters()})
    one, two = results
    assert one['1.router.residual'].abs().sum() > 0
    for key, grad in one.items():
        assert (grad is None) == (two[key] is None), key
        if grad is not None:
            torch.testing.assert_close(two[key], grad)


def test_moe_pp_refuses_a_module_that_changes_the_number_of_channels():
    with pytest.raises(ValueError, match='takes 2 channels and gives 3'):
        moe_of(nn.Linear(2, 3), num_experts=2, router=dict(type='MoEPPRouter'))


@pytest.mark.parametrize('shape', [(2, 4, 3, 3), (2, 5, 4)])
def test_moe_pp_constants_find_the_channels(shape):
    module = nn.Conv2d(4, 4, 1) if len(shape) == 4 else ToyFFN(4)
    layer, state = moe_of(
        module, num_experts=2, router=dict(type='MoEPPRouter', k=6), granularity='image'
    )
    state.begin(num_images=2, training=True)
    out = layer(torch.randn(shape))
    assert out.shape == shape
    out.sum().backward()
    assert layer.router.free[1].vector.grad.abs().sum() > 0


# Soft MoE


def test_soft_moe_is_two_softmaxes():
    torch.manual_seed(0)
    layer, state = moe_of(
        ToyFFN(4), num_experts=2, router=dict(type='SoftMoERouter', slots=3, scale=5.0)
    )
    scatter_experts(layer)
    x = torch.randn(2, 7, 4)
    state.begin(num_images=2)
    out = layer(x)
    normal = nn.functional.normalize
    router = layer.router
    for b in range(2):
        logits = 5.0 * normal(x[b], dim=1) @ normal(router.slot_embeddings, dim=1).t()  # (N, E·S)
        slots = logits.softmax(0).t() @ x[b]
        done = torch.cat([layer.experts[e](slots[3 * e : 3 * e + 3]) for e in range(2)])
        torch.testing.assert_close(out[b], logits.softmax(1) @ done, rtol=1e-5, atol=1e-5)


def test_soft_moe_refuses_balance_losses_when_it_is_built():
    router = dict(type='SoftMoERouter', slots=3)
    with pytest.raises(ValueError, match='ImportanceLoss has nothing to balance, SoftMoERouter'):
        moe_of(ToyFFN(4), num_experts=2, router=router, balance=[dict(type='ImportanceLoss')])


def test_soft_moe_at_its_largest_scale_has_no_empty_sum():
    router = SoftMoERouter(2, 1, scale=40.0)
    with torch.no_grad():
        router.slot_embeddings.copy_(torch.tensor([[1.0, 0.0]]))
        router.scale.fill_(1e6)
    x = torch.tensor([[-1.0, 0.0], [-1.0, 0.0]])  # as far from the slot as can be
    affinity = router(x, context_of(2, per_image=2)).affinity
    assert (affinity > 0).all() and (1 / affinity).isfinite().all()


# Shared experts


def test_a_shared_expert_is_mixed_with_the_routed_ones():
    dense = ToyFFN(4)
    layer, state = moe_of(
        dense,
        num_experts=2,
        router=dict(type='TopKRouter', k=1, renormalize=True, noise=False),
        shared_experts=2,
        shared_weight=0.25,
        granularity='token',
    )
    x = torch.randn(2, 3, 4)
    state.begin(num_images=2)
    torch.testing.assert_close(layer(x), dense(x))  # copies: the dense function is kept
    assert {'shared.0.scale', 'shared.1.scale'} <= set(layer.state_dict())
    with torch.no_grad():
        for expert in layer.experts:
            expert.scale.fill_(0.0)  # routed: the identity x alone
        layer.shared[0].scale.fill_(0.0)
    # Mean of the shared: x + f / 2 with f what dense adds; in all x + .25 · f / 2
    torch.testing.assert_close(layer(x), x + 0.125 * (dense(x) - x))


def test_shared_experts_load_dense_checkpoints_and_are_upcycled():
    dense, other = ToyFFN(4), ToyFFN(4)
    layer, _ = moe_of(
        dense, num_experts=2, router=dict(type='TopKRouter', k=2), shared_experts=1, noise=0.1
    )
    layer.load_state_dict(other.state_dict())
    weight = other.layers[0].weight
    for copy in (*layer.experts, *layer.shared):  # each with a noise of its own
        assert 0 < (copy.layers[0].weight - weight).abs().max() < weight.std()
    upcycle_(nn.ModuleDict({'target': layer}), noise=0.0)
    first = dict(layer.experts[0].state_dict())
    torch.testing.assert_close(dict(layer.shared[0].state_dict()), first)
    with pytest.raises((ValueError, TargetError), match='shared_experts must be a number'):
        moe_of(dense, num_experts=2, router=dict(type='TopKRouter'), shared_experts=-1)
    assert MoEPPRouter(4, 2).num_choices == 6
