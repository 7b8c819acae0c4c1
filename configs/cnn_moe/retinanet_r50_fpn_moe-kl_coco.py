# RetinaNet-MoE as in arXiv 2204.10598: both subnets have four experts, a gate each, two experts for
# each image and level, class experts mixed after the sigmoid, and the KL loss over all levels. It
# starts from a trained RetinaNet, whose other weights stay as they are.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
default_scope = 'mmdet_moe'
custom_imports = dict(
    imports=['mmdet_moe.models', 'mmdet_moe.engine'],
    allow_failed_imports=False,
)
# mmdet's model zoo, configs/retinanet/metafile.yml: retinanet_r50_fpn_1x_coco, box AP 36.5.
load_from = (
    'https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r50_fpn_1x_coco/'
    'retinanet_r50_fpn_1x_coco_20200130-c2398f9e.pth'
)
model = dict(
    type='MoERetinaNet',
    _scope_='mmdet_moe',
    freeze_others=True,
    backbone=dict(init_cfg=None),  # its weights come with load_from
    bbox_head=dict(type='MoERetinaHead', _scope_='mmdet_moe'),
    moe=[
        dict(
            targets=r'bbox_head\.(cls|reg)_subnet',
            num_experts=4,
            router=dict(type='TopKRouter', k=2, kind='conv', projection=256, bias=True),
            balance=[dict(type='KLLoss', weight=0.25)],
            noise=0.05,
        )
    ],
)
# An expert that no image and level of a rank goes to has no gradient there.
find_unused_parameters = True

train_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(1024, 608), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='Resize', scale=(1024, 608), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='Adam', lr=1e-5),
    clip_grad=dict(max_norm=0.1, norm_type=2),
)
param_scheduler = None
train_cfg = dict(max_epochs=20)
auto_scale_lr = dict(base_batch_size=4)
custom_hooks = [
    dict(type='ExpertRecordHook', _scope_='mmdet_moe'),
    dict(type='RandomStateHook', _scope_='mmdet_moe'),
    dict(type='UpcycleHook', _scope_='mmdet_moe'),
]
