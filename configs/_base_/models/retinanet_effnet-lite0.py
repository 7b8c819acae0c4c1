# RetinaNet on EfficientNet-Lite0 for 2 CPU cores: 128 channels, 2 + 2 head convolutions, strides
# 8 to 64, group norm (without it a short training learns half as fast). The number of classes
# follows from the label space.
model = dict(
    type='MoERetinaNet',
    _scope_='mmdet_moe',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        # What EfficientNet-Lite was trained with; ImageNet's usual numbers double its inputs.
        mean=[127.0, 127.0, 127.0],
        std=[128.0, 128.0, 128.0],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        type='EfficientNetLite',
        arch='lite0',
        out_indices=(2, 3, 4),
        norm_eval=True,
        channels_last=True,
        init_cfg=dict(type='EfficientNetLitePretrained'),
    ),
    neck=dict(
        type='FPN',
        in_channels=[40, 112, 320],
        out_channels=128,
        norm_cfg=dict(type='GN', num_groups=16),
        add_extra_convs='on_output',
        num_outs=4,
    ),
    bbox_head=dict(
        type='MultiDomainRetinaHead',
        in_channels=128,
        feat_channels=128,
        stacked_convs=2,
        norm_cfg=dict(type='GN', num_groups=16),
        anchor_generator=dict(
            type='AnchorGenerator',
            # Anchors of 16 to 203 px: at 320 px the median box of three real domains has 10 to 17.
            octave_base_scale=2,
            scales_per_octave=3,
            ratios=[0.5, 1.0, 2.0],
            strides=[8, 16, 32, 64],
        ),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=1.0),
    ),
    train_cfg=dict(
        assigner=dict(
            type='MaxIoUAssigner',
            pos_iou_thr=0.5,
            neg_iou_thr=0.4,
            min_pos_iou=0,
            ignore_iof_thr=-1,
        ),
        # Focal loss takes all anchors.
        sampler=dict(type='PseudoSampler'),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
    test_cfg=dict(
        nms_pre=1000,
        min_bbox_size=0,
        score_thr=0.02,
        nms=dict(type='nms', iou_threshold=0.5),
        max_per_img=100,
    ),
)
# An expert or a class branch without an image in the batch has no gradient.
find_unused_parameters = True
