# Every convolution of stage 4 is four experts with a gate of its own.
_base_ = ['./resnet18_dense_cifar100.py', '../_base_/cnn_moe.py']
model = dict(
    moe=[
        dict(
            targets=r'backbone\.layer4\.\d\.(conv\d|downsample\.0)',
            num_experts=4,
            balance=_base_.balances.importance,
            **_base_.moe_layer,
        )
    ]
)
