# A small ViT on the frozen features of EfficientNet-Lite0 (ImageNet weights), for CPUs: 6 blocks of
# 160 channels; 2.6 M parameters, 1.9 M of them trained. Multiply-adds of an image (of these, the
# frozen stem), tokens with the class token, and a training step of 64 images on one busy core:
#   64 px:  53 M (21 M), 17 tokens, 0.3 s     96 px: 118 M (47 M), 37 tokens, 0.8 s
#   128 px: 212 M (83 M), 65 tokens, 1.5 s
# img_size and the size of the pipeline's images go together; position embeddings are resized to
# other sizes, also when a checkpoint is loaded.
model = dict(
    type='mmdet_moe.MoEImageClassifier',
    # What EfficientNet-Lite was trained with.
    data_preprocessor=dict(mean=[127.0] * 3, std=[128.0] * 3, to_rgb=True, num_classes=6),
    backbone=dict(
        type='mmdet_moe.HybridVisionTransformer',
        stem=dict(
            type='mmdet_moe.EfficientNetLite',
            arch='lite0',
            out_indices=(3,),  # stride 16, 112 channels
            frozen_stages=4,  # all that is built
            channels_last=True,
            init_cfg=dict(type='EfficientNetLitePretrained'),
        ),
        img_size=64,
        arch=dict(embed_dims=160, num_layers=6, num_heads=4, feedforward_channels=640),
    ),
    head=dict(
        type='VisionTransformerClsHead',
        num_classes=6,
        in_channels=160,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
)
