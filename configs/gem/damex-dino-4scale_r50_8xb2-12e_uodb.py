# DAMEX on UODB, taught by the planner's plan: GEM-DINO with a learned router, which needs no domain
# at test. Loss weight and capacity are the paper's.
_base_ = './gem-dino-4scale_r50_8xb2-12e_uodb.py'
model = dict(
    moe=[
        dict(
            targets=r'decoder\.layers\.[135]\.ffn',
            router=dict(
                type='DAMEXRouter',
                weight=0.1,
                router=dict(type='CosineRouter', k=1, capacity_factor=1.25),
            ),
        )
    ],
)
