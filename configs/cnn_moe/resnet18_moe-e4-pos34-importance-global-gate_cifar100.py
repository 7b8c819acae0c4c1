# One gate on the input image, shared by the experts of stages 3 and 4.
_base_ = ['./resnet18_dense_cifar100.py', '../_base_/cnn_moe.py']
model = dict(
    moe=[
        dict(
            targets=r'backbone\.layer[34]',
            num_experts=4,
            balance=_base_.balances.importance,
            share_router='image',
            **_base_.moe_layer,
        )
    ]
)
