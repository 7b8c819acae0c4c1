# 4 experts, each a whole stage 2, balanced by the KL loss.
_base_ = ['./resnet18_dense_cifar100.py', '../_base_/cnn_moe.py']
model = dict(
    moe=[
        dict(
            targets=r'backbone\.layer2',
            num_experts=4,
            balance=_base_.balances.kl,
            **_base_.moe_layer,
        )
    ]
)
