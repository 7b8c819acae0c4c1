# R26+ViT-S/32, the hybrid of SF-MoE's paper. No weights are loaded here: train from a checkpoint of
# your own (load_from); the stem takes timm's names.
model = dict(
    type='mmdet_moe.MoEImageClassifier',
    backbone=dict(
        type='mmdet_moe.HybridVisionTransformer',
        stem=dict(type='mmdet_moe.ResNetV2Stem', depth=26),
        img_size=224,
        arch='deit-small',
    ),
    head=dict(
        type='VisionTransformerClsHead',
        num_classes=7,
        in_channels=384,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
)
