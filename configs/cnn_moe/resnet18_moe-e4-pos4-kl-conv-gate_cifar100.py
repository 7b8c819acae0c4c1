# The Conv-GAP-FC gate.
_base_ = ['./resnet18_dense_cifar100.py', '../_base_/cnn_moe.py']
model = dict(
    moe=[
        dict(
            targets=r'backbone\.layer4',
            num_experts=4,
            balance=_base_.balances.kl,
            router=dict(_base_.moe_layer.router, kind='conv', projection=256),
            noise=_base_.moe_layer.noise,
        )
    ]
)
