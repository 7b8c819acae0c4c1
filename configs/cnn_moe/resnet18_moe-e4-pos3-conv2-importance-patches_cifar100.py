# PatchConvMoE: each 8x8 map in 2 x 2 patches, which are routed separately by a gate of two
# convolutions.
_base_ = './resnet18_moe-e4-pos4-importance_cifar100.py'
model = dict(
    moe=[
        {
            **_base_.model.moe[0],
            'targets': r'backbone\.layer3\.1\.conv2',
            'granularity': 'patch',
            'grid': 2,
            'router': dict(_base_.moe_layer.router, kind='conv', convs=2),
        }
    ]
)
