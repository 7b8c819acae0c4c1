# GShard top-2 with its loss in the decoder.
_base_ = '../gem/dense-dino_effnet-lite0_mini-uodb.py'
model = dict(
    moe=[
        dict(
            targets=r'decoder\.layers\.[02]\.ffn',
            num_experts=4,
            router=dict(type='GShardRouter'),
            balance=[dict(type='SwitchLoss', weight=0.01)],
        )
    ],
)
