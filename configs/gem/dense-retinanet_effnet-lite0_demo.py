# The dense twin: one RetinaNet for all domains, every weight shared.
_base_ = [
    '../_base_/models/retinanet_effnet-lite0.py',
    '../_base_/datasets/demo.py',
    '../_base_/schedules/demo.py',
    '../_base_/default_runtime.py',
]
model = dict(
    label_space={{_base_.label_space}},
    # Edges and textures of ImageNet do: without their gradients a step takes 2/3 of the time.
    backbone=dict(frozen_stages=2),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.3))))
# 300 steps reach what the demo promises with room to spare, in a third of its time.
train_cfg = dict(max_iters=300, val_interval=300)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        by_epoch=False,
        begin=50,
        end=300,
        T_max=250,
        eta_min_ratio=0.02,
    ),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=100))
