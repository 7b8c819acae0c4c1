# The importance loss with the variance add-on, which pushes images apart.
_base_ = ['./resnet18_dense_cifar100.py', '../_base_/cnn_moe.py']
model = dict(
    moe=[
        dict(
            targets=r'backbone\.layer4',
            num_experts=4,
            balance=[*_base_.balances.importance, dict(type='VarianceLoss', weight=0.5)],
            **_base_.moe_layer,
        )
    ]
)
