# 4 experts, each a whole stage 1, balanced by the relative constraint.
_base_ = ['./resnet18_dense_cifar100.py', '../_base_/cnn_moe.py']
model = dict(
    moe=[
        dict(
            targets=r'backbone\.layer1',
            num_experts=4,
            balance=_base_.balances.relative,
            **_base_.moe_layer,
        )
    ]
)
