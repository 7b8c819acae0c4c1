# 10 experts, each a whole stage 3, balanced by the mean constraint.
_base_ = ['./resnet18_dense_cifar100.py', '../_base_/cnn_moe.py']
model = dict(
    moe=[
        dict(
            targets=r'backbone\.layer3',
            num_experts=10,
            balance=_base_.balances.mean,
            **_base_.moe_layer,
        )
    ]
)
