"""Small detectors, a classifier, batches and plans, for tests in more than one folder."""

from __future__ import annotations

import copy

import torch
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

import mmdet_moe.models  # noqa: F401 - registers the models
from mmdet_moe.planning import ExpertPlan
from mmdet_moe.registry import MODELS
from mmdet_moe.structures import LabelSpace

#: Two domains without and one with a shared class: unified car 0, dog 1, cell 2, dot 3, crack 4.
DOMAINS = dict(street=['car', 'dog'], blood=['cell', 'dot', 'crack'], yard=['dog', 'crack'])
SPACE = LabelSpace(DOMAINS)
#: street and yard share an expert.
PLAN = ExpertPlan.from_assignment({'street': 'e0', 'blood': 'e1', 'yard': 'e0'}, experts=3)

_RESNET = dict(
    type='ResNet',
    depth=18,
    base_channels=8,
    num_stages=4,
    out_indices=(1, 2, 3),
    norm_cfg=dict(type='BN', requires_grad=True),
    norm_eval=True,
    style='pytorch',
)
_PREPROCESSOR = dict(
    type='DetDataPreprocessor',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_size_divisor=32,
)


class ColourEmbedder(torch.nn.Module):
    """The mean colour of an image, as a unit vector; keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.seen: list = []

    def embed(self, given):
        self.seen.append([image.clone() for image in given])
        means = torch.stack([image.mean((1, 2)) for image in given]) * self.scale
        return torch.nn.functional.normalize(means, dim=1)


MODELS.register_module(module=ColourEmbedder, force=True)


def colour_plan(**embedder) -> ExpertPlan:
    """street is red, blood green, yard blue."""
    return ExpertPlan.from_assignment(
        {'street': 'e0', 'blood': 'e1', 'yard': 'e2'},
        prototypes=dict(
            embedder=dict(type='ColourEmbedder', **embedder),
            dimension=3,
            mean=dict(street=[1.0, 0.0, 0.0], blood=[0.0, 1.0, 0.0], yard=[0.0, 0.0, 1.0]),
            concentration=10.0,
        ),
    )


def retinanet_cfg(**model) -> dict:
    """A RetinaNet of 16 channels; ``head`` and other keys are merged in."""
    head = model.pop('head', {})
    cfg = dict(
        type='MoERetinaNet',
        data_preprocessor=_PREPROCESSOR,
        backbone=_RESNET,
        neck=dict(
            type='FPN',
            in_channels=[16, 32, 64],
            out_channels=16,
            add_extra_convs='on_output',
            num_outs=3,
        ),
        bbox_head=dict(
            type='MultiDomainRetinaHead',
            in_channels=16,
            feat_channels=16,
            stacked_convs=1,
            anchor_generator=dict(
                type='AnchorGenerator',
                octave_base_scale=3,
                scales_per_octave=2,
                ratios=[0.5, 1.0],
                strides=[8, 16, 32],
            ),
            bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
            loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25),
            loss_bbox=dict(type='L1Loss'),
        ),
        train_cfg=dict(
            assigner=dict(
                type='MaxIoUAssigner',
                pos_iou_thr=0.5,
                neg_iou_thr=0.4,
                min_pos_iou=0,
                ignore_iof_thr=-1,
            ),
            sampler=dict(type='PseudoSampler'),
            allowed_border=-1,
            pos_weight=-1,
            debug=False,
        ),
        test_cfg=dict(
            nms_pre=200,
            min_bbox_size=0,
            score_thr=0.0,
            nms=dict(type='nms', iou_threshold=0.5),
            max_per_img=50,
        ),
    )
    return _merge(cfg, head, model)


def dino_cfg(**model) -> dict:
    """A DINO of 1 encoder and 2 decoder layers; mmdet's decoder takes 256 channels only."""
    head = model.pop('head', {})
    ffn = dict(embed_dims=256, feedforward_channels=64, ffn_drop=0.0)
    cfg = dict(
        type='MoEDINO',
        num_queries=10,
        with_box_refine=True,
        as_two_stage=True,
        num_feature_levels=3,
        data_preprocessor=dict(_PREPROCESSOR, pad_size_divisor=1),
        backbone=_RESNET,
        neck=dict(
            type='ChannelMapper',
            in_channels=[16, 32, 64],
            kernel_size=1,
            out_channels=256,
            act_cfg=None,
            norm_cfg=dict(type='GN', num_groups=8),
            num_outs=3,
        ),
        encoder=dict(
            num_layers=1,
            layer_cfg=dict(
                self_attn_cfg=dict(embed_dims=256, num_heads=4, num_levels=3, dropout=0.0),
                ffn_cfg=ffn,
            ),
        ),
        decoder=dict(
            num_layers=2,
            return_intermediate=True,
            layer_cfg=dict(
                self_attn_cfg=dict(embed_dims=256, num_heads=4, dropout=0.0),
                cross_attn_cfg=dict(embed_dims=256, num_heads=4, num_levels=3, dropout=0.0),
                ffn_cfg=ffn,
            ),
            post_norm_cfg=None,
        ),
        positional_encoding=dict(num_feats=128, normalize=True, offset=0.0, temperature=20),
        bbox_head=dict(
            type='MultiDomainDINOHead',
            embed_dims=256,
            sync_cls_avg_factor=True,
            loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25),
            loss_bbox=dict(type='L1Loss', loss_weight=5.0),
            loss_iou=dict(type='GIoULoss', loss_weight=2.0),
        ),
        dn_cfg=dict(
            label_noise_scale=0.5,
            box_noise_scale=1.0,
            group_cfg=dict(dynamic=True, num_groups=None, num_dn_queries=6),
        ),
        train_cfg=dict(
            assigner=dict(
                type='HungarianAssigner',
                match_costs=[
                    dict(type='FocalLossCost', weight=2.0),
                    dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
                    dict(type='IoUCost', iou_mode='giou', weight=2.0),
                ],
            )
        ),
        test_cfg=dict(max_per_img=8),
    )
    return _merge(cfg, head, model)


def vit_cfg(**model) -> dict:
    """A ViT classifier of 2 layers on 16 patches; ``head`` and other keys are merged in."""
    head = model.pop('head', {})
    cfg = dict(
        type='mmdet_moe.MoEImageClassifier',
        data_preprocessor=dict(
            mean=_PREPROCESSOR['mean'], std=_PREPROCESSOR['std'], to_rgb=True, num_classes=5
        ),
        backbone=dict(
            type='VisionTransformer',
            arch=dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64),
            img_size=64,
            patch_size=16,
            # The mean of all tokens: from a class token no other gets a gradient in the last layer.
            with_cls_token=False,
            out_type='avg_featmap',
        ),
        # By default it starts at zero, and no gradient passes it in the first step.
        head=dict(
            type='VisionTransformerClsHead',
            num_classes=5,
            in_channels=32,
            init_cfg=dict(type='TruncNormal', layer='Linear', std=0.2),
        ),
    )
    return _merge(cfg, head, model)


#: Of the detectors.
CONFIGS = dict(retinanet=retinanet_cfg, dino=dino_cfg)
#: A module of each detector that the plan routes in these tests.
TARGETS = dict(
    retinanet=[r'bbox_head\.(cls|reg)_convs\.\d', r'backbone\.layer4'],
    dino=r'decoder\.layers\.\d\.ffn',
)


def moe_specs(kind: str, plan=PLAN, **spec) -> list[dict]:
    """One spec that routes the detector's targets by ``plan``."""
    return [dict(targets=TARGETS[kind], router=dict(type='PlanRouter', plan=plan), **spec)]


def build(kind: str, *, seed: int = 0, init: bool = True, **model):
    """Build and initialise a model over SPACE: a detector, or 'vit'."""
    init_default_scope('mmpretrain' if kind == 'vit' else 'mmdet_moe')
    # mmengine reports every initialised parameter at INFO.
    MMLogger.get_current_instance().setLevel('WARNING')
    torch.manual_seed(seed)
    model.setdefault('label_space', SPACE)
    built = MODELS.build(ConfigDict({**CONFIGS, 'vit': vit_cfg}[kind](**model)))
    if init:
        torch.manual_seed(seed)
        built.init_weights()
    return built.train()  # a module fresh from its constructor does not know of `norm_eval`


def sample(domain: str | None, boxes: list, names: list[str], size=(64, 64)) -> DetDataSample:
    """A data sample with boxes (x1, y1, x2, y2) of classes by their unified names."""
    data_sample = DetDataSample()
    meta = dict(
        img_path=f'{domain}.png',
        img_shape=size,
        ori_shape=size,
        pad_shape=size,
        batch_input_shape=size,
        scale_factor=(1.0, 1.0),
    )
    if domain is not None:
        meta['domain'] = domain
    data_sample.set_metainfo(meta)
    data_sample.gt_instances = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor([SPACE.unified_id(name) for name in names], dtype=torch.long),
    )
    data_sample.ignored_instances = InstanceData(
        bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)
    )
    return data_sample


def street_sample() -> DetDataSample:
    return sample('street', [[4, 4, 30, 28], [30, 20, 62, 60]], ['dog', 'car'])


def blood_sample() -> DetDataSample:
    boxes = [[2, 8, 26, 30], [30, 30, 52, 58], [10, 34, 34, 60]]
    return sample('blood', boxes, ['crack', 'cell', 'dot'])


def yard_sample() -> DetDataSample:
    return sample('yard', [[8, 8, 40, 40]], ['crack'])


def images(count: int, seed: int = 1, size: int = 64) -> torch.Tensor:
    """Preprocessed images, has shape (count, 3, size, size)."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def label_sample(domain: str | None, name: str):
    """A data sample of mmpretrain with a class by its unified name."""
    from mmpretrain.structures import DataSample  # detection does without

    meta = dict(img_shape=(64, 64), ori_shape=(64, 64))
    if domain is not None:
        meta['domain'] = domain
    return DataSample(metainfo=meta).set_gt_label(SPACE.unified_id(name))


def raw_batch(kind: str, domains: list[str], told: bool = True) -> dict:
    """What a data loader gives the model called ``kind``: an image of each domain.

    With the same number of boxes in every image, so that what a head divides by is equal on every
    rank. ``told=False`` keeps the domains from the model.
    """
    inputs, samples = [], []
    for domain in domains:
        generator = torch.Generator().manual_seed(list(DOMAINS).index(domain))
        inputs.append(torch.randint(0, 255, (3, 64, 64), generator=generator, dtype=torch.uint8))
        names = [DOMAINS[domain][0], DOMAINS[domain][-1]]
        known = domain if told else None
        if kind == 'vit':
            samples.append(label_sample(known, names[0]))
        else:
            samples.append(sample(known, [[4, 4, 30, 28], [26, 20, 60, 60]], names))
    return dict(inputs=inputs, data_samples=samples)


def mixed_batch() -> tuple[torch.Tensor, list[DetDataSample]]:
    """Three images of three domains."""
    return images(3), [street_sample(), blood_sample(), yard_sample()]


def total_loss(losses: dict) -> torch.Tensor:
    """The sum that mmengine trains on."""
    values = []
    for key, value in losses.items():
        if 'loss' in key:
            values += [x.mean() for x in (value if isinstance(value, (list, tuple)) else [value])]
    return sum(values)


def _merge(cfg: dict, head: dict, model: dict) -> dict:
    cfg = copy.deepcopy(cfg)
    cfg['bbox_head' if 'bbox_head' in cfg else 'head'].update(head)
    cfg.update(model)
    return cfg
