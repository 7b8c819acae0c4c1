# Noisy top-k with importance and load losses in the decoder.
_base_ = '../gem/dense-dino_effnet-lite0_mini-uodb.py'
model = dict(
    moe=[
        dict(
            targets=r'decoder\.layers\.[02]\.ffn',
            num_experts=4,
            router=dict(type='TopKRouter', k=1),
            balance=[dict(type='ImportanceLoss', weight=0.01), dict(type='LoadLoss', weight=0.01)],
        )
    ],
)
