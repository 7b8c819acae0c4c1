# The dense twin: one RetinaNet for all domains, every weight shared.
_base_ = [
    '../_base_/models/retinanet_effnet-lite0.py',
    '../_base_/datasets/demo.py',
    '../_base_/schedules/demo.py',
    '../_base_/default_runtime.py',
]
model = dict(
    label_space={{_base_.label_space}},
    # Edges and textures of ImageNet do: without their gradients a step takes two thirds of the time.
    backbone=dict(frozen_stages=2),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.3))))
default_hooks = dict(logger=dict(interval=20))
