# Four experts, each a whole stage 4 of Bottleneck blocks.
_base_ = ['./resnet50_dense_cifar100.py', '../_base_/cnn_moe.py']
model = dict(
    moe=[
        dict(
            targets=r'backbone\.layer4',
            num_experts=4,
            balance=_base_.balances.importance,
            **_base_.moe_layer,
        )
    ]
)
