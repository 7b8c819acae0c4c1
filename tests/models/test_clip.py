"""CLIP's weights in mmpretrain's ViT: each name, and the same features."""

from __future__ import annotations

import runpy
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip('mmpretrain')

from mmpretrain.registry import MODELS

import mmdet_moe.models  # noqa: F401 - registers the models
from mmdet_moe.models.clip import clip_to_mmpretrain

D, HEADS, LAYERS, PATCH, SIDE, OUT = 24, 3, 2, 4, 12, 10
TOOL = Path(__file__).parents[2] / 'tools/model_converters/clip_to_mmpretrain.py'


pytestmark = pytest.mark.usefixtures('mmpretrain_scope')


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """x + MHA(LN x), then + MLP(LN x), after Radford et al. 2021 and Vaswani et al. 2017."""

    def __init__(self, act):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn = nn.MultiheadAttention(D, HEADS, batch_first=True)
        layers = dict(c_fc=nn.Linear(D, 4 * D), act=act, c_proj=nn.Linear(4 * D, D))
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(act) for _ in range(LAYERS))


class ClipVisual(nn.Module):
    """The image transformer by OpenCLIP's names: class token, positions, norm, blocks, norm."""

    def __init__(self, act):
        super().__init__()
        self.conv1 = nn.Conv2d(3, D, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(D))
        self.positional_embedding = nn.Parameter(torch.randn((SIDE // PATCH) ** 2 + 1, D))
        self.ln_pre, self.ln_post = nn.LayerNorm(D), nn.LayerNorm(D)
        self.transformer = Transformer(act)
        self.proj = nn.Parameter(torch.randn(D, OUT))

    def forward(self, images):
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(images), 1, D)
        x = self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


def scattered(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return model.double().eval()


def classifier_cfg(act='GELU', neck=True):
    """Of mmpretrain's stock model without a head."""
    cfg = dict(
        type='ImageClassifier',
        backbone=dict(
            type='VisionTransformer',
            arch=dict(embed_dims=D, num_layers=LAYERS, num_heads=HEADS, feedforward_channels=4 * D),
            img_size=SIDE,
            patch_size=PATCH,
            pre_norm=True,
            norm_cfg=dict(type='LN', eps=1e-5),
            layer_cfgs=dict(act_cfg=dict(type=act)),
        ),
    )
    if neck:
        cfg['neck'] = dict(type='LinearNeck', in_channels=D, out_channels=OUT, norm_cfg=None)
    return cfg


def classifier(*args, **kwargs):
    return MODELS.build(classifier_cfg(*args, **kwargs)).double().eval()


def images():
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).double()


def converted(state, **kwargs):
    """As doubles: the converter gives float32, in which the test's weights would be rounded."""
    rounded = {key: value.float() for key, value in state.items()}
    return clip_to_mmpretrain(rounded, **kwargs)


def in_float32(model):
    """The model's weights rounded as the checkpoint's are."""
    return model.float().double()


@pytest.mark.parametrize('act', ['GELU', 'QuickGELU'])
@pytest.mark.parametrize('whole', [False, True])
def test_openclip_weights_give_clips_features(act, whole):
    torch.manual_seed(0)
    clip = in_float32(scattered(ClipVisual(nn.GELU() if act == 'GELU' else QuickGELU())))
    state = clip.state_dict()
    if whole:  # a model with its text tower
        state = {f'visual.{key}': value for key, value in state.items()}
        text = ('token_embedding.weight', 'transformer.resblocks.0.ln_1.weight', 'logit_scale')
        state.update({key: torch.zeros(3) for key in (*text, 'positional_embedding')})
    model = classifier(act)
    model.load_state_dict(converted(state, neck=True))  # strictly
    expected = clip(images())
    (got,) = model.extract_feat(images())
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    # The wrong activation is not the same.
    other = classifier('QuickGELU' if act == 'GELU' else 'GELU')
    other.load_state_dict(converted(state, neck=True))
    assert (other.extract_feat(images())[0] - expected).abs().max() > 1e-4


def test_timm_weights_give_timms_features():
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    clip = timm.create_model(
        'vit_base_patch16_clip_224', embed_dim=D, depth=LAYERS, num_heads=HEADS, patch_size=PATCH,
        img_size=SIDE, num_classes=OUT, global_pool='token',
    )  # fmt: skip
    clip = in_float32(scattered(clip))
    state = {key: value for key, value in clip.state_dict().items() if key != 'head.bias'}
    with torch.no_grad():  # CLIP's projection has none
        clip.head.bias.zero_()
        expected = clip(images())
    model = classifier()
    model.load_state_dict(converted(state, neck=True))
    with torch.no_grad():
        (got,) = model.extract_feat(images())
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    # Without the neck: the normed class token.
    bare = classifier(neck=False)
    bare.load_state_dict(converted(state))
    (token,) = bare.extract_feat(images())
    torch.testing.assert_close(token @ clip.head.weight.t(), expected, rtol=1e-9, atol=1e-9)


def test_the_config_is_clips():
    from mmengine.config import Config

    path = Path(__file__).parents[2] / 'configs/_base_/models/vit-base_clip_dg.py'
    backbone = Config.fromfile(path).model.backbone
    assert backbone.pre_norm and backbone.norm_cfg == classifier_cfg()['backbone']['norm_cfg']


def test_every_key_has_its_place():
    state = ClipVisual(nn.GELU()).state_dict()
    found = clip_to_mmpretrain(state)
    pairs = {
        'class_embedding': 'cls_token',
        'positional_embedding': 'pos_embed',
        'conv1.weight': 'patch_embed.projection.weight',
        'ln_pre.bias': 'pre_norm.bias',
        'ln_post.weight': 'ln1.weight',
        'transformer.resblocks.1.ln_1.bias': 'layers.1.ln1.bias',
        'transformer.resblocks.1.attn.in_proj_weight': 'layers.1.attn.qkv.weight',
        'transformer.resblocks.1.attn.in_proj_bias': 'layers.1.attn.qkv.bias',
        'transformer.resblocks.0.attn.out_proj.weight': 'layers.0.attn.proj.weight',
        'transformer.resblocks.0.ln_2.weight': 'layers.0.ln2.weight',
        'transformer.resblocks.0.mlp.c_fc.weight': 'layers.0.ffn.layers.0.0.weight',
        'transformer.resblocks.0.mlp.c_proj.bias': 'layers.0.ffn.layers.1.bias',
    }
    for theirs, ours in pairs.items():
        assert torch.equal(found[f'backbone.{ours}'].flatten(), state[theirs].flatten()), ours
    assert len(found) == len(state) - 1  # the projection
    assert found.keys() == classifier(neck=False).state_dict().keys()
    half = clip_to_mmpretrain({key: value.half() for key, value in state.items()})
    assert {value.dtype for value in half.values()} == {torch.float32}


def test_unknown_and_missing_keys_are_refused_and_listed():
    state = ClipVisual(nn.GELU()).state_dict()
    del state['transformer.resblocks.0.ln_1.bias'], state['ln_pre.weight']
    state['transformer.resblocks.0.gamma'] = torch.ones(1)
    with pytest.raises(ValueError, match='are not the weights of CLIP') as caught:
        clip_to_mmpretrain(state)
    for part in (
        "unknown keys ['transformer.resblocks.0.gamma']",
        'pre_norm.weight (ln_pre.weight)',
        'layers.0.ln1.bias (transformer.resblocks.0.ln_1.bias)',
    ):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match='neither OpenCLIP'):
        clip_to_mmpretrain({'layer4.0.conv1.weight': torch.ones(1)})
    no_projection = ClipVisual(nn.GELU()).state_dict()
    del no_projection['proj']
    with pytest.raises(ValueError, match=r'neck\.fc\.weight \(proj\)'):
        clip_to_mmpretrain(no_projection, neck=True)
    clip_to_mmpretrain(no_projection)


def run_tool(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['clip_to_mmpretrain.py', *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(TOOL), run_name='__main__')
    return caught.value.code


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_the_tool_reads_torch_and_safetensors(suffix, tmp_path, monkeypatch, capsys):
    state = ClipVisual(nn.GELU()).state_dict()
    source = tmp_path / f'clip.{suffix}'
    if suffix == 'pth':
        torch.save(dict(state_dict=state), source)
    else:
        save_file = pytest.importorskip('safetensors.torch').save_file
        save_file(state, source)
    assert run_tool(monkeypatch, source, tmp_path / 'out.pth') == 0
    assert 'parameters' in capsys.readouterr().out
    saved = torch.load(tmp_path / 'out.pth', weights_only=True)['state_dict']
    expected = clip_to_mmpretrain(state)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in saved)


def test_the_tool_refuses_objects_and_strangers(tmp_path, monkeypatch, capsys):
    torch.save(dict(model=nn.Linear(1, 1)), tmp_path / 'pickle.pth')
    torch.save({'conv.weight': torch.ones(1)}, tmp_path / 'other.pth')
    for name, message in (
        ('pickle.pth', 'cannot be read as plain tensors'),
        ('other.pth', 'neither OpenCLIP'),
        ('none.pth', 'no file'),
    ):
        assert run_tool(monkeypatch, tmp_path / name, tmp_path / 'out.pth') == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / 'out.pth').exists()
