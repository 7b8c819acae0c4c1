"""The short way for plain FFN experts: the same numbers as the general way, and its promises."""

import copy
import platform

import pytest
import torch
from moe_testlib import moe_of, plan_router, topk_router
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdet_moe.moe import Routing, RoutingState, dispatch, grouped, replace_modules
from mmdet_moe.moe.dispatch import run_experts
from mmdet_moe.moe.grouped import BLAS, OneDNNProducts, onednn_products, products_of

D, H, OUT, E, T = 8, 12, 6, 4, 23


def ffn(act=nn.GELU, bias=True):
    return nn.Sequential(nn.Linear(D, H, bias=bias), act(), nn.Linear(H, OUT, bias=bias))


EXPERTS = {
    'gelu': ffn,
    'tanh gelu': lambda: nn.Sequential(
        nn.Linear(D, H), nn.GELU(approximate='tanh'), nn.Linear(H, OUT)
    ),
    'relu in place': lambda: nn.Sequential(nn.Linear(D, H), nn.ReLU(inplace=True), nn.Linear(H, 6)),
    'silu without bias': lambda: ffn(nn.SiLU, bias=False),
    'nested': lambda: nn.Sequential(
        nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Dropout(0.0)), nn.Linear(H, OUT), nn.Identity()
    ),
    'linear': lambda: nn.Linear(D, OUT),
}


def topk(k, weighted=True, idle=None):
    scores = torch.rand(T, E)
    if idle is not None:
        scores[:, idle] = -1
    weights = torch.rand(T, k, dtype=torch.float64).requires_grad_() if weighted else None
    return lambda: (Routing.from_topk(weights, scores.topk(k, 1).indices, E), weights)


def dropping():
    indices = torch.randint(-1, E, (T, 2))
    weights = torch.rand(T, 2, dtype=torch.float64).requires_grad_()
    return lambda: (Routing.from_topk(weights, indices, E, dropping=True), weights)


def in_order():
    experts = torch.arange(T)[:, None] * E // T
    weights = torch.rand(T, 1, dtype=torch.float64).requires_grad_()
    return lambda: (Routing.from_topk(weights, experts, E), weights)


ROUTINGS = {
    'k=1': lambda: topk(1),
    'k=2': lambda: topk(2),
    'k=2, one idle': lambda: topk(2, idle=1),
    'k=1, weights one': lambda: topk(1, weighted=False),
    'k=2, weights one': lambda: topk(2, weighted=False),
    'dropping': dropping,
    'in order': in_order,
}


def results(experts, routing, x, general=False, monkeypatch=None):
    """Output and all gradients; by the general way where asked."""
    experts = copy.deepcopy(experts)
    x = x.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        if general:
            patch.setattr(dispatch, 'plain_experts', lambda *args: None)
        made, weights = routing()
        if weights is not None:
            weights.grad = None
        out = run_experts(experts, x, made)
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    kind = type(out.grad_fn).__name__
    grads = [x.grad, None if weights is None else weights.grad.clone()]
    return kind, [out.detach(), *grads, *[p.grad for p in experts.parameters()]]


@pytest.mark.parametrize('rows', [3, 1024])
@pytest.mark.parametrize('shape', [(T, D), (T, 5, D)], ids=['tokens', 'images'])
@pytest.mark.parametrize('routing', ROUTINGS)
@pytest.mark.parametrize('expert', EXPERTS)
def test_the_short_way_gives_what_the_general_way_gives(monkeypatch, expert, routing, shape, rows):
    """Output, gradients of items, weights and parameters; gradients of idle experts are None."""
    monkeypatch.setattr(grouped, 'BLOCK_ROWS', rows)  # 3: several blocks per expert
    torch.manual_seed(0)
    experts = nn.ModuleList(EXPERTS[expert]() for _ in range(E)).double()
    made = ROUTINGS[routing]()
    x = torch.randn(shape, dtype=torch.float64)
    kind, found = results(experts, made, x)
    _, expected = results(experts, made, x, general=True)
    assert kind in ('_PlainExpertsBackward', 'ViewBackward0')
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_float32_and_every_routing_agree_to_rounding():
    torch.manual_seed(0)
    experts = nn.ModuleList(ffn() for _ in range(E))
    x = torch.randn(T, D)
    for routing in ROUTINGS.values():
        made = routing()

        def single(made=made):
            found, weights = made()
            return found, weights

        _, found = results(experts, single, x)
        _, expected = results(experts, single, x, general=True)
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_first_and_second_derivatives_are_those_of_finite_differences():
    torch.manual_seed(0)
    experts = nn.ModuleList(
        nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 1)) for _ in range(2)
    ).double()
    indices = torch.tensor([[0], [1], [0]])
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 1, dtype=torch.float64, requires_grad=True)

    def function(x, weights, *params):
        return run_experts(experts, x, Routing.from_topk(weights, indices, 2))

    inputs = (x, weights, *experts.parameters())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_what_needs_no_gradient_gets_none():
    torch.manual_seed(0)
    experts = nn.ModuleList(ffn() for _ in range(E))
    for name, p in experts.named_parameters():
        p.requires_grad_(name in ('0.0.weight', '1.2.bias', '2.2.weight'))
    routing, _ = topk(2)()
    x = torch.randn(T, D)
    run_experts(experts, x, routing).square().sum().backward()
    found = {n for n, p in experts.named_parameters() if p.grad is not None}
    assert found == {'0.0.weight', '1.2.bias', '2.2.weight'} and x.grad is None


def test_an_idle_expert_is_not_in_the_graph():
    """So that DDP with find_unused_parameters sees it unused, and its gradient stays None."""
    torch.manual_seed(0)
    experts = nn.ModuleList(ffn() for _ in range(E))
    routing, _ = topk(2, idle=1)()
    out = run_experts(experts, torch.randn(T, D), routing)
    todo, leaves = [out.grad_fn], set()
    while todo:
        node = todo.pop()
        leaves |= {id(node.variable)} if hasattr(node, 'variable') else set()
        todo += [n for n, _ in node.next_functions if n is not None]
    assert leaves >= {id(p) for e in (0, 2, 3) for p in experts[e].parameters()}
    assert not leaves & {id(p) for p in experts[1].parameters()}


def test_without_gradients_nothing_is_kept():
    torch.manual_seed(0)
    experts = nn.ModuleList(ffn() for _ in range(E))
    routing, _ = topk(2)()
    x = torch.randn(T, D)
    with torch.no_grad():
        out = run_experts(experts, x, routing)
    assert out.grad_fn is None
    torch.testing.assert_close(out, run_experts(experts, x, routing).detach())


@pytest.mark.parametrize('reentrant', [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    torch.manual_seed(0)
    experts = nn.ModuleList(ffn() for _ in range(E))
    routing, _ = topk(2, idle=1)()
    routing.weights = routing.weights.detach()
    x = torch.randn(T, D)
    grads = []
    for how in (None, reentrant):
        own = copy.deepcopy(experts)
        leaf = x.clone().requires_grad_()
        body = lambda y, own=own: run_experts(own, y, routing)  # noqa: E731
        out = body(leaf) if how is None else checkpoint(body, leaf, use_reentrant=how)
        out.square().sum().backward()
        grads.append([leaf.grad, *[p.grad for p in own.parameters()]])
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_bfloat16_autocast_is_the_general_ways_to_bfloat16():
    torch.manual_seed(0)
    experts = nn.ModuleList(ffn() for _ in range(E))
    x = torch.randn(T, D)
    made = topk(2)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        kind, found = results(experts, made, x)
        _, expected = results(experts, made, x, general=True)
    assert found[0].dtype == torch.bfloat16
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * b.abs().max().item())


def test_a_layer_used_twice_adds_its_gradients():
    torch.manual_seed(0)
    experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E)).double()
    routing, _ = topk(1, weighted=False)()
    x = torch.randn(T, D, dtype=torch.float64)
    run_experts(experts, run_experts(experts, x, routing), routing).sum().backward()
    twice = copy.deepcopy(experts)
    twice.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, 'plain_experts', lambda *args: None)
        run_experts(twice, run_experts(twice, x, routing), routing).sum().backward()
    for a, b in zip(experts.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


class Own(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1


def hooked():
    module = ffn()
    module[1].register_forward_hook(lambda module, inputs, output: output * 2)
    return module


def wrapped():
    module = ffn()
    module.forward = lambda x, old=module.forward: old(x) + 1
    return module


def normed():
    return nn.Sequential(nn.Linear(D, H), nn.LayerNorm(H), nn.Linear(H, OUT))


@pytest.mark.parametrize(
    'make',
    [
        lambda: Own(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, OUT)),
        hooked,
        wrapped,
        normed,
        lambda: nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Dropout(0.5), nn.Linear(H, OUT)),
        lambda: nn.Sequential(nn.Linear(D, H), nn.Linear(H, OUT)),
        lambda: nn.Sequential(*ffn(), nn.ReLU()),
        lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(D, OUT)),
    ],
)
def test_anything_else_takes_the_general_way(make):
    assert grouped.plain_expert(make()) is None


def test_dropout_that_is_off_is_no_obstacle():
    module = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Dropout(0.5), nn.Linear(H, OUT))
    assert grouped.plain_expert(module) is None
    assert grouped.plain_expert(module.eval()) is not None


def test_experts_that_differ_take_the_general_way():
    x = torch.randn(T, D)
    experts = [ffn(), ffn(nn.ReLU)]
    assert grouped.plain_experts(experts, [0], x) is not None
    assert grouped.plain_experts(experts, [0, 1], x) is None
    # A wrong width or type is the module's own to complain about.
    assert grouped.plain_experts(experts, [0], torch.randn(T, D + 1)) is None
    assert grouped.plain_experts(experts, [0], x.double()) is None
    assert grouped.plain_experts(experts, [0], x[:0]) is None


def test_the_state_dict_is_the_dense_modules_per_expert():
    layer, state = moe_of(ffn(), num_experts=3, router=topk_router(k=2, noise=False))
    keys = {f'experts.{e}.{key}' for e in range(3) for key in ffn().state_dict()}
    assert {key for key in layer.state_dict() if key.startswith('experts')} == keys


@pytest.mark.parametrize('router', [plan_router(), topk_router(k=2)])
def test_a_layer_of_plain_experts_trains_the_same_both_ways(router):
    spec = dict(targets='0', num_experts=3, router=router)
    losses = []
    for general in (False, True):
        torch.manual_seed(0)
        model, state = nn.Sequential(nn.Sequential(*ffn(), nn.Identity()), nn.Linear(OUT, 1)), None
        state = RoutingState()
        replace_modules(model, [spec], state)
        optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with pytest.MonkeyPatch.context() as patch:
            if general:
                patch.setattr(dispatch, 'plain_experts', lambda *args: None)
            for _ in range(5):
                state.begin(['a', 'b', 'a', 'c'], training=True)
                loss = (model(torch.randn(4, 5, D)) - 1).square().mean()
                optim.zero_grad()
                loss.backward()
                optim.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.skipif(not hasattr(nn.functional, 'grouped_mm'), reason='torch has no grouped_mm')
@pytest.mark.parametrize('routing', ['k=1', 'k=2, one idle', 'dropping', 'in order'])
@pytest.mark.parametrize('shape', [(T, D), (T, 5, D)], ids=['tokens', 'images'])
def test_grouped_matrix_products_index_as_the_general_way(monkeypatch, routing, shape):
    """On the CPU, where torch computes them one by one: which rows meet which expert's weights."""
    torch.manual_seed(0)
    experts = nn.ModuleList(
        # Smooth: a bias added before or after rounding would flip some ReLU's gradient.
        nn.Sequential(nn.Linear(D, 16), nn.GELU(), nn.Linear(16, D))
        for _ in range(E)
    ).bfloat16()
    made = ROUTINGS[routing]()
    x = torch.randn(shape).bfloat16()
    _, expected = results(experts, made, x, general=True)
    monkeypatch.setattr(dispatch, 'grouped_mm_fits', lambda *args: True)
    try:
        _, found = results(experts, made, x)
    except RuntimeError as error:
        if 'grouped_mm' in str(error):
            pytest.skip(f'this torch has none for the CPU: {error}')
        raise
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * b.abs().max().item())


@pytest.mark.parametrize('rows', [1, 7, 197])
@pytest.mark.parametrize('sizes', [(3, 5), (64, 16), (16, 64)])
def test_the_products_of_both_libraries_are_the_same(rows, sizes):
    d, h = sizes
    x, w, b = torch.randn(rows, d), torch.randn(h, d), torch.randn(h)
    grad = torch.randn(rows, h)
    found = onednn_products()
    if platform.machine() == 'x86_64' and torch.backends.mkldnn.is_available():
        assert isinstance(found, OneDNNProducts), 'it passes its own check here'
    for products in (found, BLAS):
        out, back = torch.empty(rows, h), torch.empty(rows, d)
        for bias in (b, None):
            products.linear(x, w, bias, out)
            torch.testing.assert_close(out, nn.functional.linear(x, w, bias))
        products.times(grad, w, back)
        torch.testing.assert_close(back, grad @ w)
        torch.testing.assert_close(products.outer(grad, x), grad.t() @ x)
    assert products_of(x.double()) is BLAS and products_of(x) is found


def test_an_operator_that_is_missing_or_wrong_is_not_used(monkeypatch):
    onednn_products.cache_clear()
    monkeypatch.setattr(OneDNNProducts, 'times', lambda self, grad, w, out: out.zero_())
    assert onednn_products() is BLAS
    onednn_products.cache_clear()
    monkeypatch.setattr(OneDNNProducts, '__init__', lambda self: torch.ops.mkldnn.no_such_thing)
    assert onednn_products() is BLAS
    onednn_products.cache_clear()
