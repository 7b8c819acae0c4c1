# The dense twin: one DINO for all domains, every weight shared.
_base_ = [
    '../_base_/models/dino_effnet-lite0.py',
    '../_base_/datasets/mini_uodb.py',
    '../_base_/schedules/mini_uodb.py',
    '../_base_/default_runtime.py',
]
model = dict(label_space={{_base_.label_space}})
# As DINO is trained: a lower rate, the backbone's a tenth of it, and short steps.
optim_wrapper = dict(
    optimizer=dict(lr=0.0002, weight_decay=0.0001),
    clip_grad=dict(max_norm=0.1),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))),
)
