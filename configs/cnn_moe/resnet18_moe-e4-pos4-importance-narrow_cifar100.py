# Narrow experts: two of them together cost what the dense stage does.
_base_ = ['./resnet18_dense_cifar100.py', '../_base_/cnn_moe.py']
model = dict(
    moe=[
        dict(
            targets=r'backbone\.layer4',
            num_experts=4,
            balance=_base_.balances.importance,
            width='iso',
            **_base_.moe_layer,
        )
    ]
)
