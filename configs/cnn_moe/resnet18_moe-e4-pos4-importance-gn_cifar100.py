# Group norms inside the experts, which see few images each.
_base_ = ['./resnet18_dense_cifar100.py', '../_base_/cnn_moe.py']
model = dict(
    moe=[
        dict(
            targets=r'backbone\.layer4',
            num_experts=4,
            balance=_base_.balances.importance,
            expert_norm=dict(type='GN', num_groups=32),
            **_base_.moe_layer,
        )
    ]
)
