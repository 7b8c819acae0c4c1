"""Configs of a small MoE detector and a small MoE classifier, for tests that look into experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tiny_models import retinanet_cfg

TOP2 = dict(type='TopKRouter', k=2)


def detector_config(folder: Path, dataset, domains: Path, label_space: dict, **changes) -> dict:
    """A RetinaNet of three levels whose first class and box convolutions are three experts each.

    Args:
        folder: Work dir.
        dataset, domains, label_space: The fixtures ``tiny_dataset``, ``tiny_domains`` and
            ``tiny_label_space``.
        changes: Of the config.
    """
    model = retinanet_cfg(
        label_space=label_space,
        head=dict(
            anchor_generator=dict(
                type='AnchorGenerator',
                octave_base_scale=2,
                scales_per_octave=1,
                ratios=[1.0],
                strides=[8, 16, 32],
            )
        ),
        moe=[dict(targets=r'bbox_head\.(cls|reg)_convs\.0', num_experts=3, router=TOP2, noise=0.5)],
    )

    def loader(split: str, sampler: dict) -> dict:
        return dict(
            batch_size=2,
            num_workers=0,
            persistent_workers=False,
            sampler=sampler,
            dataset=dataset(split),
        )

    evaluator = dict(
        type='MultiDomainEvaluator',
        label_space=label_space,
        metrics={
            name: [dict(type='CocoMetric', ann_file=f'{domains}/{name}/val.json', metric='bbox')]
            for name in label_space['domains']
        },
    )
    test = loader('val', dict(type='DefaultSampler', shuffle=False))
    return dict(
        default_scope='mmdet_moe',
        custom_imports=_IMPORTS,
        model=model,
        train_dataloader=loader('train', dict(type='MultiDomainSampler', seed=0)),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=4, val_interval=100),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
        val_dataloader=test,
        val_cfg=dict(type='ValLoop'),
        val_evaluator=evaluator,
        test_dataloader=test,
        test_cfg=dict(type='TestLoop'),
        test_evaluator=evaluator,
        visualizer=_visualizer('DetLocalVisualizer', folder),
        **_common(folder),
        **changes,
    )


def classifier_config(folder: Path, **changes) -> dict:
    """A CIFAR ResNet whose third stage is four experts, on 12 images of three classes.

    Args:
        folder: Work dir; the images are made in ``<folder>/images``.
        changes: Of the config.
    """
    import cv2

    rng = np.random.default_rng(0)
    for label, name in enumerate(('red', 'green', 'blue')):
        (folder / 'images' / name).mkdir(parents=True, exist_ok=True)
        for i in range(4):
            image = rng.integers(0, 90, (32, 32, 3), dtype=np.uint8)
            image[:, :, 2 - label] += 120
            cv2.imwrite(str(folder / 'images' / name / f'{i}.png'), image)
    model = dict(
        type='mmdet_moe.MoEImageClassifier',
        data_preprocessor=dict(
            type='ClsDataPreprocessor', mean=[100.0] * 3, std=[50.0] * 3, to_rgb=True
        ),
        backbone=dict(
            type='ResNet_CIFAR', depth=18, base_channels=8, stem_channels=8, style='pytorch'
        ),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(
            type='LinearClsHead',
            num_classes=3,
            in_channels=64,
            loss=dict(type='CrossEntropyLoss'),
            topk=(1,),
        ),
        moe=[dict(targets=r'backbone\.layer3', num_experts=4, router=TOP2, noise=0.5)],
    )
    pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]

    def loader(shuffle: bool) -> dict:
        return dict(
            batch_size=4,
            num_workers=0,
            persistent_workers=False,
            sampler=dict(type='DefaultSampler', shuffle=shuffle),
            dataset=dict(type='CustomDataset', data_root=str(folder / 'images'), pipeline=pipeline),
        )

    return dict(
        default_scope='mmpretrain',
        custom_imports=_IMPORTS,
        model=model,
        train_dataloader=loader(True),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=4, val_interval=100),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
        val_dataloader=loader(False),
        val_cfg=dict(type='ValLoop'),
        val_evaluator=dict(type='Accuracy', topk=(1,)),
        test_dataloader=loader(False),
        test_cfg=dict(type='TestLoop'),
        test_evaluator=dict(type='Accuracy', topk=(1,)),
        visualizer=_visualizer('UniversalVisualizer', folder),
        **_common(folder),
        **changes,
    )


_IMPORTS = dict(
    imports=[f'mmdet_moe.{name}' for name in ('models', 'datasets', 'evaluation', 'engine')],
    allow_failed_imports=False,
)


def _visualizer(kind: str, folder: Path) -> dict:
    return dict(type=kind, vis_backends=[dict(type='LocalVisBackend')], name=str(folder))


def _common(folder: Path) -> dict:
    return dict(
        work_dir=str(folder),
        experiment_name=str(folder).replace('/', '_'),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=10),
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2),
        ),
        log_level='WARNING',
        randomness=dict(seed=0),
    )
