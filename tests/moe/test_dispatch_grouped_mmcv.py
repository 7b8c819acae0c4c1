"""mmcv's FFN is a plain expert, where nothing in it drops, scales or adds an identity."""

import copy

import pytest
import torch
from torch import nn

from mmdet_moe.moe import Routing
from mmdet_moe.moe.dispatch import run_experts
from mmdet_moe.moe.grouped import plain_expert
from mmdet_moe.moe.targets import describe_target

pytest.importorskip('mmcv')
pytest.importorskip('mmdet')

from mmcv.cnn.bricks.transformer import FFN

import mmdet_moe.models.targets  # noqa: F401


def expert(**options):
    options = dict(embed_dims=8, feedforward_channels=12, **options)
    return describe_target(FFN(**options)).module


@pytest.mark.parametrize('act', ['ReLU', 'GELU'])
def test_an_ffn_takes_the_short_way_and_gives_what_it_gave(act):
    torch.manual_seed(0)
    experts = nn.ModuleList(expert(act_cfg=dict(type=act)) for _ in range(3)).double()
    assert all(plain_expert(e) is not None for e in experts)
    twins = copy.deepcopy(experts)
    x = torch.randn(9, 8, dtype=torch.float64)
    chosen = torch.tensor([0, 2, 2, 0, 0, 2, 0, 2, 2])
    out = run_experts(experts, x, Routing.from_topk(None, chosen[:, None], 3))
    expected = torch.cat([twins[e](row[None]) for e, row in zip(chosen, x, strict=True)])
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(experts.parameters(), twins.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(
    'options', [dict(ffn_drop=0.1), dict(dropout_layer=dict(type='Dropout', drop_prob=0.1))]
)
def test_a_dropout_that_is_on_takes_the_general_way(options):
    module = expert(**options)
    assert plain_expert(module) is None
    assert plain_expert(module.eval()) is not None


def test_layer_scale_and_identity_take_the_general_way():
    assert plain_expert(expert(layer_scale_init_value=0.1)) is None
    assert plain_expert(FFN(embed_dims=8, feedforward_channels=12)) is None
