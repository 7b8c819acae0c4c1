# PatchConvMoE: each 8x8 map in 2 x 2 patches, which are routed separately by a gate of two
# convolutions.
_base_ = ['./resnet18_dense_cifar100.py', '../_base_/cnn_moe.py']
model = dict(
    moe=[
        dict(
            targets=r'backbone\.layer3\.1\.conv2',
            num_experts=4,
            balance=_base_.balances.importance,
            granularity='patch',
            grid=2,
            router=dict(_base_.moe_layer.router, kind='conv', convs=2),
            noise=_base_.moe_layer.noise,
        )
    ]
)
