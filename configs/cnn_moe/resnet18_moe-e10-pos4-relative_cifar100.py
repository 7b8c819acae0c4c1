# 10 experts, each a whole stage 4, balanced by the relative constraint.
_base_ = ['./resnet18_dense_cifar100.py', '../_base_/cnn_moe.py']
model = dict(
    moe=[
        dict(
            targets=r'backbone\.layer4',
            num_experts=10,
            balance=_base_.balances.relative,
            **_base_.moe_layer,
        )
    ]
)
