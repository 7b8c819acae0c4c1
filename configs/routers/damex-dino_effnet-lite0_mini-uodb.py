# DAMEX taught by the plan, in the decoder. GEM-DINO with another router.
_base_ = '../gem/gem-dino_effnet-lite0_mini-uodb.py'
model = dict(
    moe=[
        dict(
            targets=r'decoder\.layers\.[02]\.ffn',
            router=dict(type='DAMEXRouter', router=dict(type='CosineRouter', k=1)),
        )
    ],
)
