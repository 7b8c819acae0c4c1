# Soft MoE in the encoder: in the decoder its slots would mix denoising queries, which know the
# ground truth, into the others.
_base_ = '../gem/dense-dino_effnet-lite0_mini-uodb.py'
model = dict(
    moe=[
        dict(
            targets=r'encoder\.layers\.0\.ffn',
            num_experts=4,
            router=dict(type='SoftMoERouter', slots=64),
        )
    ],
)
