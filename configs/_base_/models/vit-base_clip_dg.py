# ViT-B/16 of OpenCLIP (LAION-2B, 86 M parameters): a norm before the blocks, a patch embedding
# without bias. $CLIP_VIT_B16: what tools/model_converters/clip_to_mmpretrain.py makes of them.
# OpenAI's CLIP has QuickGELU: layer_cfgs=dict(act_cfg=dict(type='mmpretrain.QuickGELU')).
model = dict(
    type='mmdet_moe.MoEImageClassifier',
    # CLIP's own normalisation, times 255.
    data_preprocessor=dict(
        mean=[122.7709383, 116.7460125, 104.09373615],
        std=[68.5005327, 66.6321579, 70.32316305],
        to_rgb=True,
        num_classes=6,
    ),
    backbone=dict(
        type='VisionTransformer',
        arch='base',
        img_size=224,
        patch_size=16,
        pre_norm=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='{{$CLIP_VIT_B16:work_dirs/clip/vit-b16_laion2b.pth}}',
            prefix='backbone.',
        ),
    ),
    head=dict(
        type='VisionTransformerClsHead',
        num_classes=6,
        in_channels=768,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
)
