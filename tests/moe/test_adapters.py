"""Mixtures of adapters: a frozen linear layer, and experts of low rank that add to it."""

from __future__ import annotations

import copy

import pytest
import torch
from moe_testlib import plan_router
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmdet_moe.moe import (
    KroneckerFactors,
    RoutingState,
    TargetError,
    adapter_checkpoint,
    adapter_layers,
    complete_adapter_checkpoint,
    count_parameters,
    merged_state_dict,
    replace_modules,
)

D, OUT, SIZE, TERMS = 12, 36, 6, 5
KRONECKER = dict(size=SIZE, terms=TERMS)
LORA = dict(type='LoRA', ranks=[1, 2, 4, 8])
KADAPTATION = dict(type='KAdaptation', ranks=[1, 2, 4, 8], **KRONECKER)
BOTH = pytest.mark.parametrize('adapters', [LORA, KADAPTATION], ids=['lora', 'kadaptation'])
ROUTER = dict(type='CosineRouter', projection=7)
BALANCE = [dict(type='ImportanceLoss', weight=0.005), dict(type='LoadLoss', weight=0.005)]


class Blocks(nn.Module):
    """Two linear layers by the names of a ViT's, with a tanh between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({'attn': nn.ModuleDict()}) for _ in range(3))
        for layer in self.layers:
            layer['attn']['qkv'] = nn.Linear(D, OUT)
        self.norm = nn.LayerNorm(D)

    def forward(self, x):
        for layer in self.layers:
            x = layer['attn']['qkv'](x).tanh()[..., :D]
        return self.norm(x)


def build(adapters, seed=0, dtype=torch.float32, scattered=True, **spec):
    """Blocks with adapters in the first and the third layer, whose zero factors are filled."""
    torch.manual_seed(seed)
    dense = Blocks()
    model, state = copy.deepcopy(dense), RoutingState()
    if len(adapters['ranks']) > 1:
        spec = dict(dict(router=ROUTER, balance=BALANCE), **spec)
    names = replace_modules(model, [dict(adapters=adapters, **spec)], state)
    assert names == ['layers.0.attn.qkv', 'layers.2.attn.qkv']
    if scattered:
        scatter(model)
    return dense.to(dtype), model.to(dtype), state


def scatter(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            for p in layer.experts.parameters():
                p += 0.3 * torch.randn(p.shape, generator=generator)


def run(model, state, x, training=True):
    model.train(training)
    state.begin(num_images=len(x), training=training)
    return model(x)


def tokens(dtype=torch.float32, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 9, D, generator=generator).to(dtype)


def by_definition(x, layer, params, weight, chosen, mask=None):
    """y_t = W0 x_t + b + w_t Delta_t x_t, item by item, with Delta as a whole matrix."""
    rows = []
    for t, row in enumerate(x):
        e = int(chosen[t])
        if f'experts.{e}.A' in params:
            delta = params[f'experts.{e}.B'] @ params[f'experts.{e}.A']
        else:
            u, v = params['u'], params['v']
            left, right = params[f'experts.{e}.L'], params[f'experts.{e}.R']
            terms = [
                torch.kron(torch.outer(u[j], v[j]), left[j] @ right[j])
                * (1 if mask is None else mask[j])
                for j in range(TERMS)
            ]
            delta = sum(terms).t()
        rows.append(layer.base.weight @ row + params['bias'] + weight[t] * (delta @ row))
    return torch.stack(rows)


@BOTH
def test_step_0_is_the_pretrained_model_bit_for_bit(adapters):
    dense, model, state = build(adapters, scattered=False)
    for x in (tokens(), tokens()[:, 0], tokens().transpose(0, 1)):
        for training in (True, False):
            assert torch.equal(run(model, state, x, training), dense(x))


@BOTH
@pytest.mark.parametrize('kind', ['cosine', 'linear'])
@pytest.mark.parametrize('renormalize', [False, True])
def test_outputs_and_gradients_are_those_of_the_formulas(adapters, kind, renormalize):
    if adapters is KADAPTATION:
        adapters = dict(adapters, dropout=0.0)
    options = dict(projection=7) if kind == 'cosine' else {}
    router = dict(
        type='TopKRouter', k=1, kind=kind, noise=False, renormalize=renormalize, **options
    )
    _, model, state = build(adapters, dtype=torch.float64, router=router, balance=[])
    x = tokens(torch.float64).requires_grad_()
    layer = model.layers[0]['attn']['qkv']
    state.begin(num_images=len(x), training=True)
    out = layer.train()(x)
    grad = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(5))
    (out * grad).sum().backward()

    # Independently: Delta made, every item alone, the gate from its formula.
    twin = x.detach().flatten(0, 1).requires_grad_()
    params = {
        k: p.detach().requires_grad_() for k, p in layer.experts.named_parameters(prefix='experts')
    }
    params['bias'] = layer.base.bias.detach().requires_grad_()
    for key in 'uv' if adapters['type'] == 'KAdaptation' else ():
        params[key] = getattr(layer.kronecker, key).detach().requires_grad_()
    gate = {k: p.detach().requires_grad_() for k, p in layer.router.named_parameters()}
    if kind == 'cosine':
        projected = twin @ gate['project.weight'].t() + gate['project.bias']
        unit = projected / projected.norm(dim=1, keepdim=True)
        experts = gate['expert_embeddings'] / gate['expert_embeddings'].norm(dim=1, keepdim=True)
        logits = gate['temperature'].exp() * (unit @ experts.t())
    else:
        logits = twin @ gate['gate'].t()
    chosen = logits.argmax(1)
    assert len(chosen.unique()) > 1
    p = logits.softmax(1).gather(1, chosen[:, None])[:, 0]
    weight = torch.ones_like(p) if renormalize else p
    expected = by_definition(twin, layer, params, weight, chosen).view_as(out)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    (expected * grad).sum().backward()

    torch.testing.assert_close(x.grad, twin.grad.view_as(x), rtol=1e-9, atol=1e-9)
    pairs = [(layer.get_parameter(k), params[k]) for k in params if k.startswith('experts')]
    pairs += [
        (layer.router.get_parameter(k), value) for k, value in gate.items() if not renormalize
    ]
    if adapters['type'] == 'KAdaptation':  # the bias of LoRA does not train
        pairs += [(getattr(layer.kronecker, k), params[k]) for k in 'uv']
        pairs += [(layer.base.bias, params['bias'])]
    for got, wanted in pairs:
        found = torch.zeros_like(got) if got.grad is None else got.grad
        wanted = torch.zeros_like(got) if wanted.grad is None else wanted.grad
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
    assert layer.base.weight.grad is None
    assert (layer.base.bias.grad is None) is (adapters['type'] == 'LoRA')


def test_dropout_of_terms_and_of_weights_is_what_it_says(monkeypatch):
    """With the draws known: terms 0 and 3 stay, or every second weight does, doubled."""
    adapter = build(KADAPTATION, dtype=torch.float64)[1].layers[0]['attn']['qkv'].experts[2].train()
    x = tokens(torch.float64)[0]
    u, v = adapter.kronecker.u, adapter.kronecker.v

    def delta(mask):
        terms = [
            m * torch.kron(torch.outer(u[j], v[j]), adapter.L[j] @ adapter.R[j])
            for j, m in enumerate(mask)
        ]
        return sum(terms).t()

    mask = torch.tensor([2.0, 0.0, 0.0, 2.0, 0.0], dtype=torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(F, 'dropout', lambda ones, p: ones * mask)
        torch.testing.assert_close(adapter(x), x @ delta(mask).t(), rtol=1e-10, atol=1e-10)
    adapter.dropout_on = 'weights'
    every_second = 2.0 * (torch.arange(D * OUT) % 2).view(OUT, D)
    with monkeypatch.context() as patch:
        patch.setattr(F, 'dropout', lambda weights, p: weights * every_second)
        expected = x @ (delta(torch.ones(5)) * every_second).t()
        torch.testing.assert_close(adapter(x), expected, rtol=1e-10, atol=1e-10)
    # None in evaluation.
    torch.testing.assert_close(
        adapter.eval()(x), x @ delta(torch.ones(5)).t(), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(adapter.delta(), delta(torch.ones(5)))


@BOTH
def test_only_the_chosen_adapter_runs_and_on_its_items_only(adapters):
    _, model, state = build(adapters)
    layer = model.layers[0]['attn']['qkv']
    seen = {}
    for e, expert in enumerate(layer.experts):
        expert.register_forward_hook(
            lambda _, inputs, __, e=e: seen.update({e: seen.get(e, 0) + len(inputs[0])})
        )
    x = tokens()
    run(model, state, x)
    counts = state.stats()['layers.0.attn.qkv/count'].tolist()
    assert seen == {e: count for e, count in enumerate(counts) if count}
    assert sum(seen.values()) == 4 * 9
    # All to one: no other runs, gets a gradient or moves.
    with torch.no_grad():
        layer.router.project.weight.zero_()
        layer.router.project.bias.copy_(layer.router.expert_embeddings[2])
        layer.router.temperature.fill_(4.0)  # e^4 (1 - cos) is far beyond the noise of 1/4
    seen.clear()
    model.zero_grad(set_to_none=True)
    out = run(model, state, x)
    busy = set(seen)
    out.sum().backward()
    assert busy == {2}
    before = copy.deepcopy(layer.experts.state_dict())
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1).step()
    for e, expert in enumerate(layer.experts):
        for key, p in expert.named_parameters():
            assert (p.grad is not None) is (e in busy)
            assert torch.equal(p, before[f'{e}.{key}']) is (e not in busy)


@BOTH
def test_training_moves_adapters_routers_and_shared_factors_and_nothing_else(adapters):
    _, model, state = build(adapters)
    frozen = {k for k, p in model.named_parameters() if k.startswith(('layers.1', 'norm'))}
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for k, p in model.named_parameters() if k not in frozen], lr=0.5)
    out = run(model, state, tokens())
    (out.square().sum() + sum(state.collect().values())).backward()
    optimizer.step()
    moved = {k for k, p in model.named_parameters() if not torch.equal(p, before[k])}
    assert not any(k.endswith('base.weight') for k in moved)
    assert any('.router.project' in k for k in moved) and any('.experts.' in k for k in moved)
    bias = {k for k in moved if k.endswith('base.bias')}
    if adapters is LORA:
        assert not bias
    else:
        assert bias == {f'layers.{i}.attn.qkv.base.bias' for i in (0, 2)}
        assert {f'layers.0.attn.qkv.kronecker.{k}' for k in 'uv'} <= moved


def test_kronecker_factors_are_one_in_the_network_and_in_its_copies():
    _, model, _ = build(KADAPTATION)
    keys = [key for key in model.state_dict() if 'kronecker' in key]
    assert keys == ['layers.0.attn.qkv.kronecker.u', 'layers.0.attn.qkv.kronecker.v']
    for one in (model, copy.deepcopy(model)):
        (factors,) = {m for m in one.modules() if isinstance(m, KroneckerFactors)}
        experts = [e for layer in adapter_layers(one).values() for e in layer.experts]
        assert len(experts) == 8 and all(e.kronecker is factors for e in experts)
    twin = copy.deepcopy(model)
    assert twin.layers[2]['attn']['qkv'].experts[0].kronecker is not factors or twin is model


@BOTH
def test_a_checkpoint_of_the_dense_model_loads_into_the_frozen_base(adapters):
    dense, model, state = build(adapters, scattered=False)
    other = Blocks()
    model.load_state_dict(other.state_dict())  # strictly
    x = tokens()
    assert torch.equal(run(model, state, x, False), other(x))
    assert not torch.equal(dense(x), other(x))


@BOTH
def test_adapters_alone_are_a_checkpoint_that_loads_onto_their_base_only(adapters, tmp_path):
    _, model, state = build(adapters)
    torch.save(adapter_checkpoint(model), tmp_path / 'adapters.pth')
    saved = torch.load(tmp_path / 'adapters.pth', weights_only=True)
    assert not any('base.weight' in key for key in saved['state_dict'])
    _, fresh, fresh_state = build(adapters, scattered=False)
    with torch.no_grad():  # layer 1 trains in this toy: its values come along
        fresh.layers[1]['attn']['qkv'].bias += 1
    fresh.load_state_dict(complete_adapter_checkpoint(fresh, saved))
    x = tokens()
    assert torch.equal(run(fresh, fresh_state, x, False), run(model, state, x, False))

    with torch.no_grad():
        fresh.layers[2]['attn']['qkv'].base.weight[0, 0] += 1e-6
    with pytest.raises(ValueError, match='another pretrained model'):
        complete_adapter_checkpoint(fresh, saved)
    complete_adapter_checkpoint(fresh, saved, force=True)
    _, narrow, _ = build(dict(adapters, ranks=[1, 2, 4, 4]))
    with pytest.raises(ValueError, match=r'experts\.3\.\w has shape'):
        complete_adapter_checkpoint(narrow, saved)
    with pytest.raises(ValueError, match='not a checkpoint of adapters'):
        complete_adapter_checkpoint(fresh, dict(state_dict=saved['state_dict']))


@BOTH
@pytest.mark.parametrize('routed', ['single', 'plan'])
def test_one_adapter_merges_into_the_stock_model(adapters, routed):
    if routed == 'single':
        _, model, state = build(dict(adapters, ranks=[2]))
        domains = None
    else:
        row = {'e0': 0.25, 'e1': 0.75}
        plan = plan_router({'a': row, 'b': row})
        _, model, state = build(dict(adapters, ranks=[1, 8]), router=plan, balance=[])
        domains = ['a', 'b', 'a', 'b']
    model.eval()
    state.begin(domains, num_images=4)
    x = tokens()
    stock = Blocks()
    stock.load_state_dict(merged_state_dict(model))  # strictly
    torch.testing.assert_close(stock(x), model(x), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(
        stock.layers[0]['attn']['qkv'].weight, model.layers[0]['attn']['qkv'].base.weight
    )


def test_a_mixture_does_not_merge_and_says_why():
    _, model, _ = build(LORA)
    with pytest.raises(ValueError, match='CosineRouter sends each item to adapters of its own'):
        merged_state_dict(model)
    plan = plan_router({'a': 'e0', 'b': 'e3', 'c': {'e1': 0.5, 'e2': 0.5}})
    with pytest.raises(ValueError, match='PlanRouter sends'):
        merged_state_dict(build(LORA, router=plan, balance=[])[1])
    with pytest.raises(ValueError, match='no adapters'):
        merged_state_dict(Blocks())


@BOTH
@pytest.mark.parametrize('reentrant', [False, True])
def test_activation_checkpointing_gives_the_same_gradients(adapters, reentrant):
    found = []
    for wrapped in (False, True):
        _, model, state = build(adapters)
        model.train()
        x = tokens().requires_grad_()
        state.begin(num_images=4, training=True)
        torch.manual_seed(7)
        out = checkpoint(model, x, use_reentrant=reentrant) if wrapped else model(x)
        (out.square().sum() + sum(state.collect().values())).backward()
        found.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key in found[0]:
        torch.testing.assert_close(found[1][key], found[0][key], rtol=1e-5, atol=1e-6)


@BOTH
def test_bfloat16_autocast_is_close_to_float32(adapters):
    _, model, state = build(dict(adapters, dropout=0.0) if adapters is KADAPTATION else adapters)
    x = tokens()
    exact = run(model, state, x, False)
    with torch.autocast('cpu', torch.bfloat16):
        got = run(model, state, x, False)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), exact, rtol=0.1, atol=0.1)
    with torch.autocast('cpu', torch.bfloat16):
        out = run(model, state, x)
        out.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_images_go_whole_to_an_adapter_where_the_spec_says_so():
    _, model, state = build(LORA, granularity='image')
    layer = model.layers[0]['attn']['qkv'].eval()
    x = tokens()
    state.begin(num_images=4)
    out = layer(x)
    (weights,) = (state.stats()['layers.0.attn.qkv/count'],)
    assert weights.sum() == 4
    one = layer(x[:1]) if state.begin(num_images=1) is None else None
    torch.testing.assert_close(out[:1], one)


def test_alpha_scales_lora():
    one, other = (build(dict(type='LoRA', ranks=[4], alpha=a))[1] for a in (None, 8))
    deltas = [m.layers[0]['attn']['qkv'].experts[0].delta() for m in (one, other)]
    torch.testing.assert_close(deltas[1], 2 * deltas[0])  # 8 / 4
    x = tokens()[0]
    expert = other.layers[0]['attn']['qkv'].experts[0]
    torch.testing.assert_close(expert(x), x @ deltas[1].t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        (dict(adapters=dict(type='LoRA'), router=ROUTER), 'need ranks'),
        (dict(adapters=dict(type='LoRA', ranks=[0])), 'rank must be'),
        (dict(adapters=LORA, router=ROUTER, noise=0.1), r"\['noise'\] do not go"),
        (dict(adapters=LORA, router=ROUTER, num_experts=4), r"\['num_experts'\] do not go"),
        (dict(adapters=dict(KADAPTATION, size=7), router=ROUTER), 'size=7 must divide'),
        (
            dict(adapters=dict(KADAPTATION, dropout=1.0), router=ROUTER),
            r'dropout must be in \[0, 1\)',
        ),
        (dict(adapters=dict(KADAPTATION, dropout_on='x'), router=ROUTER), 'dropout_on must be'),
        (dict(adapters=LORA, router=ROUTER, targets='norm'), 'adapters are for linear layers'),
        (dict(adapters=LORA, router=dict(type='MoEPPRouter')), 'a copy expert gives'),
    ],
)
def test_a_bad_spec_is_refused_and_the_model_left_as_it_was(spec, message):
    model = Blocks()
    with pytest.raises((ValueError, TargetError), match=message):
        replace_modules(model, [spec], RoutingState())
    assert not adapter_layers(model) and all(p.requires_grad for p in model.parameters())


def test_several_adapters_need_a_router():
    with pytest.raises(KeyError, match="no 'router'"):
        replace_modules(Blocks(), [dict(adapters=LORA)], RoutingState())


def test_counts_are_those_of_the_paper_on_vit_b():
    """ViT-B/16's six qkv layers, 768 -> 2304, and 256-wide routers; the head is not counted."""
    routers = 6 * (768 * 256 + 256 + 4 * 256 + 1)  # project, its bias, embeddings, temperature
    assert routers == 1_187_334
    lora = 6 * (1 + 2 + 4 + 8) * (768 + 2304)  # A and B
    assert lora == 276_480
    # L (64, 12, r) and R (64, r, 36), as many; u and v (64 x 64) once; the bias trains.
    kadaptation = 6 * (1 + 2 + 4 + 8) * (64 * 12 + 64 * 36) + 2 * 64 * 64 + 6 * 2304
    assert kadaptation == 298_496
    assert round((routers + lora) / 1e6, 2) == 1.46
    assert round((routers + kadaptation) / 1e6, 2) == 1.49

    for kind, expected in (('LoRA', lora), ('KAdaptation', kadaptation)):
        model = nn.Module()
        with torch.device('meta'):
            model.layers = nn.ModuleList(
                nn.ModuleDict({'attn': nn.ModuleDict({'qkv': nn.Linear(768, 2304)})})
                for _ in range(12)
            )
        model.requires_grad_(False)
        spec = dict(adapters=dict(type=kind, ranks=[1, 2, 4, 8]), router=dict(type='CosineRouter'))
        names = replace_modules(model, [spec], RoutingState())
        assert names == [f'layers.{i}.attn.qkv' for i in (0, 2, 4, 6, 8, 10)]
        counts = count_parameters(model)
        assert (counts.adapters, counts.routers, counts.others) == (expected, routers, 0)
        assert counts.trainable == routers + expected
