# Dense ViT on emoji, one drawing style held out.
_base_ = ['../_base_/datasets/dg_emoji.py', '../_base_/schedules/dg_emoji.py']
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch=dict(embed_dims=128, num_layers=6, num_heads=4, feedforward_channels=512),
        img_size=64,
        patch_size=8,
        out_type='avg_featmap',
    ),
    head=dict(type='LinearClsHead', num_classes={{_base_.num_classes}}, in_channels=128),
)
dg_dropout = 'model.backbone.drop_rate'
