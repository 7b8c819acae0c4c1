# ERM with ResNet-50 (ImageNet-1k), DomainBed's baseline: its batch norms are frozen.
#   $RESNET50  the checkpoint, a file or mmpretrain's address of it
_base_ = ['../_base_/datasets/dg.py', '../_base_/schedules/dg.py']
resnet50 = '{{$RESNET50:published}}'
if resnet50 == 'published':
    resnet50 = (
        'https://download.openmmlab.com/mmclassification/v0/resnet/'
        'resnet50_8xb32_in1k_20210831-ea4938fc.pth'
    )
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ResNet',
        depth=50,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint=resnet50, prefix='backbone.'),
    ),
    neck=[dict(type='GlobalAveragePooling'), dict(type='mmdet_moe.FeatureDropout', p=0.0)],
    head=dict(
        type='LinearClsHead',
        num_classes={{_base_.num_classes}},
        in_channels=2048,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
)
dg_dropout = 'model.neck.1.p'
