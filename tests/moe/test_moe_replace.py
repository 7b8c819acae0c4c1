"""MoE layers go in by name, and nothing is replaced that would break."""

import pytest
import torch
from moe_testlib import ONE_EACH, ToyFFN, plan_router, topk_router
from torch import nn

from mmdet_moe.moe import MoELayer, RoutingState, TargetError, replace_modules


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)
        self.ffn = ToyFFN()
        self.norms = nn.ModuleList([nn.LayerNorm(6), nn.LayerNorm(6)])

    def forward(self, x):
        x = self.norms[0](x + self.attn(x, x, x)[0])
        return self.norms[1](self.ffn(x))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(6, 3) for _ in range(2)])
        self.sequences = nn.ModuleList(
            [nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)) for _ in range(2)]
        )
        self.stem = nn.Linear(6, 6)
        self.plain = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])

    def init_weights(self):
        for branch in self.branches:
            nn.init.constant_(branch.bias, -2.0)
        for _, sequence in enumerate(self.sequences):
            last = sequence[-1]
            nn.init.zeros_(last.weight)

    def width(self):
        stem = self.stem
        return stem.out_features

    def forward(self, x):
        for layer in self.plain:
            x = layer(x)
        assert x.shape[-1] == self.width()
        return [branch(self.stem(x)) for branch in self.branches], self.sequences[0](x)


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.head = Head()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def replace(targets, model=None, **spec):
    model = Detector() if model is None else model
    spec.setdefault('router', plan_router())
    return replace_modules(model, [dict(targets=targets, **spec)], RoutingState()), model


def test_patterns_match_the_whole_name():
    names, model = replace(r'layers\.[02]\.ffn')
    assert names == ['layers.0.ffn', 'layers.2.ffn']
    assert isinstance(model.layers[0].ffn, MoELayer) and isinstance(model.layers[1].ffn, ToyFFN)
    assert model.layers[0].ffn.name == 'layers.0.ffn'
    assert model.layers[0].ffn.state is model.layers[2].ffn.state


def test_every_kind_of_safe_target_runs():
    names, model = replace([r'layers\.\d\.(ffn|norms\.\d|attn)', r'head\.plain\.1'])
    assert len(names) == 13
    model.layers[0].ffn.state.begin(['a', 'c'])
    branches, _ = model(torch.randn(2, 5, 6))
    assert branches[0].shape == (2, 5, 3)


def test_state_dict_keys_are_the_dense_ones_below_each_expert():
    _, model = replace(r'head\.plain\.0', router=topk_router(k=1), num_experts=2)
    keys = [k for k in model.state_dict() if k.startswith('head.plain.0')]
    assert keys == [
        'head.plain.0.experts.0.weight',
        'head.plain.0.experts.0.bias',
        'head.plain.0.experts.1.weight',
        'head.plain.0.experts.1.bias',
        'head.plain.0.router.gate',
        'head.plain.0.router.noise_gate',
    ]


def test_experts_start_as_the_dense_module_and_share_nothing():
    model = Detector()
    dense = {k: v.clone() for k, v in model.layers[0].ffn.state_dict().items()}
    kept = model.layers[0].ffn.layers[0].weight
    replace(r'layers\.0\.ffn', model)
    layer = model.layers[0].ffn
    for expert in layer.experts:
        torch.testing.assert_close(dict(expert.state_dict()), dense)
    assert layer.experts[0].layers[0].weight is kept
    assert len({id(p) for p in layer.experts.parameters()}) == 3 * len(dense)


def test_a_module_in_two_places_becomes_one_layer():
    model = Detector()
    model.head.plain[1] = model.head.plain[0]
    names, _ = replace(r'head\.plain\.0', model)
    assert model.head.plain[0] is model.head.plain[1] and isinstance(model.head.plain[0], MoELayer)


@pytest.mark.parametrize(
    'targets, message',
    [
        (r'layers\.1\.fnn', "no module is called .*near names: .*'layers.1.ffn'"),
        (r'ffn', 'it matches a part of .*layers.0.ffn.*the whole name is needed'),
        (r'nothing_like_it', 'no module is called'),
        (r'head\.plain', r"is a ModuleList, which holds modules .*'head.plain.0'"),
        (r'layers\.0\.attn\.out_proj', 'layers.0.attn, a MultiheadAttention, uses its .bias'),
        (r'head\.branches\.1', 'head, a Head, uses its .bias'),
        (r'head\.sequences\.0', 'head, a Head, indexes it'),
        (r'head\.sequences\.0\.1', 'head, a Head, uses its .weight'),
        (r'head\.stem', 'head, a Head, uses its .out_features'),
        ([r'layers\.0\.ffn', r'layers\.0\.ffn\.layers'], "is inside MoE target 'layers.0.ffn'"),
    ],
)
def test_targets_that_cannot_be_are_refused_and_nothing_changes(targets, message):
    model = Detector()
    with pytest.raises(TargetError, match=message):
        replace(targets, model)
    assert not any(isinstance(m, MoELayer) for m in model.modules())


def test_a_refusal_can_be_overruled():
    names, _ = replace(r'head\.stem', check_parent=False)
    assert names == ['head.stem']


def test_a_bad_spec_behind_a_good_one_changes_nothing():
    model = Detector()
    specs = [
        dict(targets=r'layers\.0\.ffn', router=plan_router()),
        dict(targets=r'layers\.1\.ffn', router=plan_router(), num_experts=7),
    ]
    with pytest.raises(ValueError, match='has 7 experts, the plan 3'):
        replace_modules(model, specs, RoutingState())
    assert isinstance(model.layers[0].ffn, ToyFFN)


def test_one_module_cannot_have_two_specs_nor_be_replaced_twice():
    spec = dict(targets=r'layers\.0\.ffn', router=plan_router())
    with pytest.raises(TargetError, match='matched by two MoE specs'):
        replace_modules(Detector(), [spec, dict(spec)], RoutingState())
    _, model = replace(r'layers\.0\.ffn')
    with pytest.raises(TargetError, match='is a MoE layer already'):
        replace(r'layers\.0\.ffn', model)


@pytest.mark.parametrize(
    'spec, message',
    [
        (dict(router=plan_router()), "has no 'targets'"),
        (dict(targets='layers'), "has no 'router'"),
        (dict(targets='layers', router=plan_router(), expert=3), r"unknown keys \['expert'\]"),
        (dict(targets=[], router=plan_router()), 'empty list of targets'),
        (dict(targets='layers[', router=plan_router()), 'is not a regular expression'),
        ('layers', 'must be a dict'),
        (
            dict(targets=r'layers\.0\.ffn', router=topk_router()),
            r"'layers.0.ffn': give \['num_experts'\] in the spec",
        ),
    ],
)
def test_specs_that_say_something_impossible_are_refused(spec, message):
    with pytest.raises((TypeError, KeyError, ValueError), match=message):
        replace_modules(Detector(), [spec], RoutingState())


def test_a_router_instance_is_copied_for_each_layer():
    from mmdet_moe.moe import TopKRouter

    _, model = replace(r'head\.plain\.\d', router=TopKRouter(6, 2, k=1))
    assert model.head.plain[0].router is not model.head.plain[1].router


def test_num_experts_comes_from_the_plan():
    _, model = replace(r'head\.plain\.0')
    assert model.head.plain[0].num_experts == len(set(ONE_EACH.values()))
