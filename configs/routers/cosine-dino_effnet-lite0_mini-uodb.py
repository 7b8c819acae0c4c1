# Cosine top-k (GMoE) with its balance losses in the decoder.
_base_ = '../gem/dense-dino_effnet-lite0_mini-uodb.py'
model = dict(
    moe=[
        dict(
            targets=r'decoder\.layers\.[02]\.ffn',
            num_experts=4,
            router=dict(type='CosineRouter', k=1),
            balance=[
                dict(type='ImportanceLoss', weight=0.005),
                dict(type='LoadLoss', weight=0.005),
            ],
        )
    ],
)
