# BASE: balanced assignment in training, greedy at test, in the encoder: in the decoder denoising
# queries, which know the ground truth, would compete with the others for places.
_base_ = '../gem/dense-dino_effnet-lite0_mini-uodb.py'
model = dict(
    moe=[
        dict(
            targets=r'encoder\.layers\.0\.ffn',
            num_experts=4,
            router=dict(type='BASERouter'),
        )
    ],
)
