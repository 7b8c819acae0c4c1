"""The layer computes its definition, for every kind of module and item."""

import copy
import pickle

import pytest
import torch
from moe_testlib import (
    MIXED,
    ToyFFN,
    item_by_item,
    moe_of,
    plan_router,
    scatter_experts,
    topk_router,
)
from torch import nn

from mmdet_moe.moe import MoELayer, Routing, RoutingState, TopKRouter, run_experts

MAPS, TOKENS, VECTORS = (5, 4, 3, 3), (5, 7, 4), (5, 4)
KINDS = {
    'linear': (lambda: nn.Linear(4, 6), TOKENS),
    'linear on vectors': (lambda: nn.Linear(4, 6, bias=False), VECTORS),
    'convolution': (lambda: nn.Conv2d(4, 6, 3, padding=1), MAPS),
    'transposed convolution': (lambda: nn.ConvTranspose2d(4, 6, 2), MAPS),
    'convolution 1d': (lambda: nn.Conv1d(4, 6, 3), (5, 4, 9)),
    'batch norm': (lambda: nn.BatchNorm2d(4).eval(), MAPS),
    'group norm': (lambda: nn.GroupNorm(2, 4), MAPS),
    'instance norm': (lambda: nn.InstanceNorm2d(4, affine=True), MAPS),
    'layer norm': (lambda: nn.LayerNorm(4), TOKENS),
    'layer norm over places': (lambda: nn.LayerNorm((4, 3, 3)), MAPS),
    'stage': (lambda: nn.Sequential(nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 3)), MAPS),
    'ffn': (lambda: ToyFFN(4), TOKENS),
}
DOMAINS = ['b', 'mixed', 'a', 'b', 'mixed']
WEIGHTS = [[0, 1, 0], [0.25, 0, 0.75], [1, 0, 0], [0, 1, 0], [0.25, 0, 0.75]]


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_runs_each_item_through_its_experts(kind):
    make, shape = KINDS[kind]
    layer, state = moe_of(make(), router=plan_router(MIXED))
    scatter_experts(layer)
    x = torch.randn(shape, requires_grad=True)
    state.begin(DOMAINS, training=True)
    out = layer(x)
    expected = item_by_item(layer, x, WEIGHTS)
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.square().sum(), [x, *layer.experts.parameters()])
    expected_grads = torch.autograd.grad(expected.square().sum(), [x, *layer.experts.parameters()])
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_works_as_a_whole_batch_and_in_any_order(kind):
    make, shape = KINDS[kind]
    layer, state = moe_of(make(), router=plan_router(MIXED))
    scatter_experts(layer)
    x = torch.randn(shape)
    for domains, experts in [('bbbbb', [1] * 5), ('aabbb', [0, 0, 1, 1, 1]), ('babab', [1, 0] * 3)]:
        state.begin(list(domains))
        weights = [[float(e == j) for j in range(3)] for e in experts[:5]]
        torch.testing.assert_close(layer(x), item_by_item(layer, x, weights))


@pytest.mark.parametrize('kind', [k for k in KINDS if 'norm' not in k])
@pytest.mark.parametrize('gate', ['linear', 'cosine'])
def test_every_kind_takes_a_learned_router(kind, gate):
    make, shape = KINDS[kind]
    layer, state = moe_of(make(), num_experts=3, router=topk_router(k=2, kind=gate))
    state.begin(num_images=5, training=True)
    layer(torch.randn(shape)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.router.parameters())
    assert torch.isfinite(layer.experts[0](torch.randn(shape))).all()


def test_token_routing_treats_each_token_alone():
    layer, state = moe_of(nn.Linear(4, 6), num_experts=3, router=topk_router(k=1, noise=False))
    scatter_experts(layer)
    with torch.no_grad():
        layer.router.gate.normal_()
    x = torch.randn(2, 5, 4)
    state.begin(num_images=2)
    out = layer(x)
    for b in range(2):
        for n in range(5):
            p = (layer.router.gate @ x[b, n]).softmax(0)
            e = int(p.argmax())
            torch.testing.assert_close(out[b, n], p[e] * layer.experts[e](x[b, n]))
    # A map with channels last has tokens too.
    torch.testing.assert_close(layer(x[:, None]), out[:, None])


def test_image_routing_sees_the_mean_over_places():
    seen = []

    class Spy(TopKRouter):
        def forward(self, items, context):
            seen.append(items)
            return super().forward(items, context)

    for module, shape, mean in [
        (nn.Conv2d(4, 4, 1), MAPS, lambda x: x.mean((2, 3))),
        (nn.BatchNorm1d(4), (5, 4, 9), lambda x: x.mean(2)),
        (nn.Linear(4, 4), TOKENS, lambda x: x.mean(1)),
        (nn.Linear(4, 4), VECTORS, lambda x: x),
    ]:
        layer, state = moe_of(module, router=Spy(4, 2, k=1), granularity='image')
        x = torch.randn(shape)
        state.begin(num_images=5)
        layer(x)
        torch.testing.assert_close(seen.pop(), mean(x))


def test_plan_router_works_at_token_granularity_too():
    layer, state = moe_of(nn.Linear(4, 6), router=plan_router(MIXED), granularity='token')
    scatter_experts(layer)
    x = torch.randn(TOKENS)
    state.begin(DOMAINS)
    torch.testing.assert_close(layer(x), item_by_item(layer, x, WEIGHTS))


def test_one_expert_for_the_whole_batch_is_its_plain_call():
    """No copy: the expert gets the very tensor, with its further arguments as they are."""

    class Spy(nn.Module):
        def forward(self, x, *args, **kwargs):
            self.got = (x, args, kwargs)
            return x

    spies = [Spy(), Spy(), Spy()]
    layer = MoELayer(spies, plan_router(), shared_args=(0,))
    layer.state.begin(['b', 'b'])
    x, other = torch.randn(2, 3, 4, 4), torch.randn(7)
    out = layer(x, other, scale=2)
    got, args, kwargs = spies[1].got
    assert got is x and out is x and args[0] is other and kwargs == {'scale': 2}
    assert not hasattr(spies[0], 'got')


def test_images_in_the_order_of_their_experts_are_not_copied():
    class Spy(nn.Module):
        def forward(self, x):
            self.got = x
            return x * 1

    spies = [Spy(), Spy(), Spy()]
    layer = MoELayer(spies, plan_router())
    layer.state.begin(['a', 'a', 'c'])
    x = torch.randn(3, 4, 2, 2)
    layer(x)
    assert spies[0].got.data_ptr() == x.data_ptr()
    assert spies[2].got.data_ptr() == x[2].data_ptr()


def test_identity_is_added_once_whatever_the_weights_sum_to():
    ffn = ToyFFN(4)

    class Half(TopKRouter):
        def forward(self, items, context):
            return Routing.from_dense(torch.full((items.shape[0], 2), 0.25))

    from mmdet_moe.moe import Target, register_target
    from mmdet_moe.moe.targets import TARGET_ADAPTERS

    @register_target(lambda module: isinstance(module, ToyFFN))
    def toy(module):
        module.add_identity = False
        return Target(module, 4, -1, 'token', residual=True)

    try:
        layer, state = moe_of(ffn, router=Half(4, 2, k=1))
    finally:
        TARGET_ADAPTERS.pop(0)
    assert layer.residual and ffn.add_identity, 'the original module must be left alone'
    x, identity = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    state.begin(num_images=2)
    inner = ffn(x) - x
    torch.testing.assert_close(layer(x), x + 0.5 * inner)
    torch.testing.assert_close(layer(x, identity), identity + 0.5 * inner)
    torch.testing.assert_close(layer(x, identity=identity), identity + 0.5 * inner)


def test_items_without_an_expert_give_zeros():
    class DropOdd(TopKRouter):
        def forward(self, items, context):
            indices = torch.arange(items.shape[0])[:, None] % 2
            return Routing.from_topk(None, -indices, 2, dropping=True)

    class DropAll(TopKRouter):
        def forward(self, items, context):
            return Routing.from_topk(None, torch.full((items.shape[0], 1), -1), 2, dropping=True)

    conv = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    x = torch.randn(4, 4, 5, 5)
    layer, _ = moe_of(conv, router=DropOdd(4, 2, k=1))
    out = layer.eval()(x)
    assert out.shape == (4, 6, 3, 3) and out[1].eq(0).all() and out[3].eq(0).all()
    torch.testing.assert_close(out[[0, 2]], layer.experts[0](x[[0, 2]]))
    layer, _ = moe_of(conv, router=DropAll(4, 2, k=1))
    before = copy.deepcopy(layer.state_dict())
    out = layer(x)
    assert out.shape == (4, 6, 3, 3) and out.eq(0).all()
    torch.testing.assert_close(layer.state_dict(), before)  # running statistics too
    assert layer.experts[0].training


def test_empty_batch_keeps_the_shape():
    layer, state = moe_of(nn.Conv2d(4, 6, 3), num_experts=2, router=topk_router(k=1))
    state.begin(num_images=0, training=True)
    assert layer(torch.zeros(0, 4, 8, 8)).shape == (0, 6, 6, 6)
    layer, state = moe_of(nn.Linear(4, 6), num_experts=2, router=topk_router(k=2))
    assert layer(torch.zeros(0, 7, 4)).shape == (0, 7, 6)
    layer, state = moe_of(nn.Linear(4, 6))
    state.begin([])
    assert layer(torch.zeros(0, 7, 4)).shape == (0, 7, 6)


def test_experts_may_give_nests_of_tensors():
    class Levels(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 2, 2, stride=2)

        def forward(self, x):
            return {'maps': (self.a(x), self.b(x)), 'none': None}

    layer, state = moe_of(Levels(), router=plan_router(MIXED))
    scatter_experts(layer)
    x = torch.randn(5, 4, 4, 4)
    state.begin(DOMAINS)
    out = layer(x)
    assert out['none'] is None
    for i in range(2):
        each = [
            sum(w * layer.experts[e](x[b : b + 1])['maps'][i] for e, w in enumerate(row) if w)
            for b, row in enumerate(WEIGHTS)
        ]
        torch.testing.assert_close(out['maps'][i], torch.cat(each))


class Attend(nn.Module):
    """A module with further arguments, some per item, one not."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x, pos, table, mask=None):
        out = self.f(x + pos) + table.sum()
        return out if mask is None else out * mask[:, None, None]


def test_further_arguments_go_with_their_items():
    layer, state = moe_of(Attend(), granularity='image', per_item_args=('mask',), shared_args=(1,))
    scatter_experts(layer)
    x, pos, table, mask = torch.randn(3, 5, 4), torch.randn(3, 5, 4), torch.randn(3), torch.rand(3)
    state.begin(['c', 'a', 'c'])
    expected = [
        layer.experts[e](x[b : b + 1], pos[b : b + 1], table, mask[b : b + 1])
        for b, e in enumerate([2, 0, 2])
    ]
    torch.testing.assert_close(layer(x, pos, table, mask=mask), torch.cat(expected))


def test_an_argument_nobody_declared_is_refused_at_once():
    """Its first dimension is 3 like the batch's: a guess would be wrong without a word."""
    layer, state = moe_of(Attend(), granularity='image', per_item_args=('mask',))
    x = torch.randn(3, 5, 4)
    state.begin(['a', 'a', 'a'])
    with pytest.raises(ValueError, match='argument 1, shape .3,., have one entry per item'):
        layer(x, x, torch.randn(3))


def test_arguments_of_token_experts_are_flattened_with_the_tokens():
    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x, other):
            return self.f(x) + other

    layer, state = moe_of(
        Add(), num_experts=3, granularity='token', router=topk_router(k=2, in_channels=4)
    )
    x, other = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    torch.testing.assert_close(layer.eval()(x, other), layer.experts[0](x, other))


def test_items_that_are_not_images_are_refused():
    layer, state = moe_of(nn.Linear(4, 4))
    state.begin(['a', 'b'])
    with pytest.raises(ValueError, match="'target' got 512 items on dimension 0, the batch has 2"):
        layer(torch.randn(512, 4))


def test_statistics_hold_weights_and_counts_per_layer():
    layer, state = moe_of(nn.Conv2d(4, 4, 1), router=plan_router(MIXED))
    state.begin(DOMAINS)
    for _ in range(2):  # as a head that runs over two levels
        layer(torch.randn(MAPS))
    stats = state.stats()
    # Once: e0 .25 + 1 + .25, e1 1 + 1, e2 .75 + .75
    assert stats['target/weight'].tolist() == [3.0, 4.0, 3.0]
    assert stats['target/count'].tolist() == [6, 4, 4]
    assert not any('loss' in key for key in stats)


# Batch norm in experts


def test_one_image_of_one_pixel_does_not_crash_a_batch_norm_expert():
    layer, state = moe_of(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    x = torch.randn(3, 4, 1, 1)
    state.begin(['a', 'b', 'b'], training=True)
    out = layer(x)
    out.sum().backward()
    assert out.isfinite().all()
    alone, pair = layer.experts[0][0], layer.experts[1][0]
    # The lone value went through the running statistics (mean 0, variance 1) and left them.
    assert alone.training and alone.num_batches_tracked == 0 and alone.running_var.eq(1).all()
    assert pair.num_batches_tracked == 1
    torch.testing.assert_close(
        out[:1], layer.experts[0].eval()(x[:1]), msg='running statistics must be used'
    )


def test_idle_batch_norm_experts_keep_their_statistics():
    layer, state = moe_of(nn.BatchNorm2d(4))
    state.begin(['a', 'c'], training=True)
    layer(torch.randn(2, 4, 3, 3) + 5)
    moved = [bool(bn.running_mean.abs().sum()) for bn in layer.experts]
    assert moved == [True, False, True]


# Construction


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: MoELayer([], topk_router()), 'has no experts'),
        (
            lambda: MoELayer([nn.Linear(4, 4)] * 2, plan_router()),
            'the layer has 2 experts, the plan 3',
        ),
        (
            lambda: MoELayer([nn.Linear(4, 4)] * 3, plan_router(), granularity='level'),
            "granularity 'level' does not suit a Linear; possible: .*token.*image",
        ),
        (
            lambda: moe_of(nn.Conv2d(4, 4, 1), granularity='token'),
            "'token' does not suit a Conv2d; possible: .'image'",
        ),
        (lambda: moe_of(nn.Conv2d(4, 4, 1), noise=-0.1), 'noise must be >= 0'),
    ],
)
def test_pieces_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_router_that_contradicts_the_layer_is_named():
    class Wrong(TopKRouter):
        def forward(self, items, context):
            return Routing.single(0, 3, 2)

    layer, _ = moe_of(nn.Linear(4, 4), router=Wrong(4, 2, k=1))
    with pytest.raises(ValueError, match='Wrong routed 3 items to 2 experts, the layer has 5 and'):
        layer(torch.randn(5, 4))


def test_experts_that_change_the_number_of_items_are_refused():
    routing = Routing.from_topk(None, torch.tensor([[0], [1]]), 2)
    with pytest.raises(ValueError, match='must keep dimension 0'):
        run_experts([nn.Flatten(0), nn.Flatten(0)], torch.randn(2, 3), routing)


def test_what_a_parent_may_not_do_says_why():
    layer, _ = moe_of(nn.Linear(4, 6))
    with pytest.raises(AttributeError, match="'out_features' is asked of MoE layer 'target'"):
        _ = layer.out_features
    assert not hasattr(layer, 'weight')
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = layer.nonsense
    with pytest.raises(TypeError, match='cannot be indexed'):
        layer[-1]


def test_layers_can_be_pickled_and_copied_together():
    state = RoutingState()
    model = nn.Sequential(
        moe_of(nn.Linear(4, 4), state)[0], moe_of(nn.Conv2d(4, 4, 1), state, num_experts=3)[0]
    )
    state.begin(['a', 'b'], embed=lambda: torch.zeros(2, 3))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0].state is other[1].state is not state
        assert other[0].state.domains is None
        other[0].state.begin(['b', 'b'])
        state.begin(['b', 'b'])
        x = torch.randn(2, 3, 4)
        torch.testing.assert_close(other[0](x), model[0](x))


def test_images_without_a_token_keep_the_shape():
    for router in (plan_router(), topk_router(k=2, in_channels=4)):
        layer, state = moe_of(nn.Linear(4, 6), num_experts=3, router=router, granularity='token')
        state.begin(['a', 'b'])
        assert layer(torch.zeros(2, 0, 4)).shape == (2, 0, 6)


@pytest.mark.parametrize('k', [1, 2, 3])
@pytest.mark.parametrize('dropping', [False, True])
def test_gradients_of_dispatch_are_right_to_second_order(k, dropping):
    torch.manual_seed(k)
    experts = [nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double() for _ in range(3)]
    indices = torch.stack([torch.randperm(3)[:k] for _ in range(4)])
    if dropping:
        indices[1, 0] = -1

    def function(x, weights):
        routing = Routing.from_topk(weights, indices, 3, dropping=dropping)
        return run_experts(experts, x, routing)

    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, k, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, weights))
    assert torch.autograd.gradgradcheck(function, (x, weights))
