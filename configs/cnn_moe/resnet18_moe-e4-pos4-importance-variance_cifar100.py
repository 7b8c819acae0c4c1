# The importance loss with the variance add-on, which pushes images apart.
_base_ = './resnet18_moe-e4-pos4-importance_cifar100.py'
model = dict(
    moe=[
        {
            **_base_.model.moe[0],
            'balance': [*_base_.balances.importance, dict(type='VarianceLoss', weight=0.5)],
        }
    ]
)
