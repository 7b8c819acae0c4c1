# An expert is one convolution: the second of the last block.
_base_ = ['./resnet18_dense_cifar100.py', '../_base_/cnn_moe.py']
model = dict(
    moe=[
        dict(
            targets=r'backbone\.layer4\.1\.conv2',
            num_experts=4,
            balance=_base_.balances.importance,
            **_base_.moe_layer,
        )
    ]
)
