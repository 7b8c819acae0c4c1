# ResNet-18 for 32 px on a CPU: a quarter as wide as usual, no max pooling, maps of 16, 8, 4, 2.
model = dict(
    type='mmdet_moe.MoEImageClassifier',
    backbone=dict(
        type='ResNet_CIFAR', depth=18, stem_channels=16, base_channels=16, strides=(2, 2, 2, 2)
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=6,
        in_channels=128,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
)
