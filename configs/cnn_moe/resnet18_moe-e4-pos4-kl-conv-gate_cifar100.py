# The Conv-GAP-FC gate.
_base_ = './resnet18_moe-e4-pos4-kl_cifar100.py'
model = dict(
    moe=[
        {
            **_base_.model.moe[0],
            'router': dict(_base_.moe_layer.router, kind='conv', projection=256),
        }
    ]
)
