# The residual form: the experts add to a bypass (1x1 stride-2 convolution + BN).
_base_ = ['./resnet18_dense_cifar100.py', '../_base_/cnn_moe.py']
model = dict(
    moe=[
        dict(
            targets=r'backbone\.layer4',
            num_experts=4,
            balance=_base_.balances.importance,
            bypass=True,
            **_base_.moe_layer,
        )
    ]
)
