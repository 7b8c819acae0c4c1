# DeiT-S/16 (ImageNet-1k), what SF-MoE and GMoE start from: 4.6 G multiply-adds at 224 px, 22 M
# parameters. $DEIT_SMALL: the checkpoint, a file or mmpretrain's address of it.
deit_small = '{{$DEIT_SMALL:published}}'
if deit_small == 'published':
    deit_small = (
        'https://mmassets.onedl.ai/mmclassification/v0/deit/'
        'deit-small_pt-4xb256_in1k_20220218-9425b9bb.pth'
    )
model = dict(
    type='mmdet_moe.MoEImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch='deit-small',
        img_size=224,
        patch_size=16,
        init_cfg=dict(type='Pretrained', checkpoint=deit_small, prefix='backbone.'),
    ),
    head=dict(
        type='VisionTransformerClsHead',
        in_channels=384,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
)
