"""A ViT on a CNN's maps: what it computes, what is frozen, where MoE goes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip('mmpretrain')


from mmdet_moe.models import HybridVisionTransformer
from mmdet_moe.registry import MODELS

ARCH = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
STEM = dict(type='mmdet_moe.EfficientNetLite', out_indices=(1,), frozen_stages=2)


pytestmark = pytest.mark.usefixtures('mmpretrain_scope')


def build(**options):
    torch.manual_seed(0)
    cfg = dict(type='mmdet_moe.HybridVisionTransformer', stem=STEM, img_size=32, arch=ARCH)
    model = MODELS.build({**cfg, **options})
    model.init_weights()
    return model


def images(side=32):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_it_is_mmpretrains_vit_of_the_stems_map():
    from mmpretrain.models import VisionTransformer

    model = build()
    model.eval()
    # Stride 4: 8 x 8 places of 24 channels, a token each, and the class token.
    assert model.pos_embed.shape == (1, 8 * 8 + 1, 32)
    plain = VisionTransformer(arch=ARCH, img_size=8, patch_size=1, in_channels=24)
    plain.eval()
    shared = {k: v for k, v in model.state_dict().items() if not k.startswith('stem.')}
    plain.load_state_dict(shared, strict=True)
    with torch.no_grad():
        (expected,) = plain(model.stem(images())[-1])
        (got,) = model(images())
        (larger,) = model(images(64))
    assert torch.equal(got, expected) and got.shape == larger.shape == (2, 32)


def test_several_places_make_a_token():
    assert build(patch_size=2).pos_embed.shape == (1, 4 * 4 + 1, 32)


def test_a_frozen_stem_neither_learns_nor_moves_its_statistics():
    model = build()
    model.train()
    before = {k: v.clone() for k, v in model.stem.state_dict().items()}
    model(images())[0].square().sum().backward()
    assert all(p.grad is None for p in model.stem.parameters())
    assert model.patch_embed.projection.weight.grad.abs().sum() > 0
    assert all(torch.equal(v, before[k]) for k, v in model.stem.state_dict().items())


def test_layer_wise_rates_know_the_stem():
    model = build()
    assert model.get_layer_depth('backbone.stem.stem_conv.weight', 'backbone.') == (0, 4)
    assert model.get_layer_depth('backbone.layers.1.ln1.weight', 'backbone.') == (2, 4)


def test_a_stem_without_a_map_is_refused():
    stem = torch.nn.Sequential(torch.nn.Flatten())
    with pytest.raises(ValueError, match='the stem Sequential must give a tuple of maps'):
        HybridVisionTransformer(stem, img_size=8, arch=ARCH)


def test_r26_and_vit_s32_is_timms_with_its_weights():
    """The network of timm's names, of 2 blocks; 64 px, so that every stride pads unevenly."""
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    theirs = timm.create_model('vit_small_r26_s32_224', img_size=64, depth=2, num_classes=0).eval()
    stem = dict(type='mmdet_moe.ResNetV2Stem', depth=26)
    arch = dict(embed_dims=384, num_layers=2, num_heads=6, feedforward_channels=1536)
    ours = build(stem=stem, img_size=64, arch=arch)
    ours.eval()
    with torch.no_grad():
        for p in theirs.parameters():  # some start as zero, which hides what they multiply
            p += 0.02 * torch.randn_like(p)
    weights = {}
    for key, value in theirs.state_dict().items():
        for old, new in (
            ('patch_embed.backbone.', 'stem.'),
            ('patch_embed.proj.', 'patch_embed.projection.'),
            ('blocks.', 'layers.'),
            ('.norm1.', '.ln1.'),
            ('.norm2.', '.ln2.'),
            ('mlp.fc1.', 'ffn.layers.0.0.'),
            ('mlp.fc2.', 'ffn.layers.1.'),
        ):
            if not key.startswith('stem.'):
                key = key.replace(old, new)
        weights[key.replace('norm.', 'ln1.') if key.startswith('norm.') else key] = value
    ours.load_state_dict(weights, strict=True)
    with torch.no_grad():
        x = images(64)
        stem_map = theirs.patch_embed.backbone(x)
        torch.testing.assert_close(ours.stem(x)[-1], stem_map, rtol=1e-4, atol=1e-4)
        expected = theirs.forward_features(x)[:, 0]
        torch.testing.assert_close(ours(x)[0], expected, rtol=1e-4, atol=1e-4)
    assert stem_map.shape == (2, 2048, 2, 2)


def test_standardised_filters():
    from mmdet_moe.models.backbones import StdConv2dSame

    conv = StdConv2dSame(1, 1, 2, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[[[1.0, 3.0], [1.0, 3.0]]]]))  # mean 2, variance 1
    # Of a kernel of 2 the odd row and column of padding are at the bottom and the right.
    out = conv(torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]]))
    torch.testing.assert_close(out, torch.tensor([[[[-1 + 2 - 4 + 8.0, -2 - 8], [4.0, -8.0]]]]))
