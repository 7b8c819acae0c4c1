# 4 experts, each a whole stage 4, balanced by the importance loss.
_base_ = ['./resnet18_dense_emoji.py', '../_base_/cnn_moe.py']
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
