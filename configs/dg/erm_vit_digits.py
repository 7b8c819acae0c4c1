# A very small ViT on rotated digits: the whole protocol in seconds.
_base_ = ['../_base_/datasets/dg_digits.py', '../_base_/schedules/dg.py']
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch=dict(embed_dims=32, num_layers=2, num_heads=4, feedforward_channels=64),
        img_size=8,
        patch_size=2,
        out_type='avg_featmap',
    ),
    head=dict(type='LinearClsHead', num_classes={{_base_.num_classes}}, in_channels=32),
)
train_cfg = dict(max_iters=200, val_interval=50)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
default_hooks = dict(checkpoint=dict(interval=50))
