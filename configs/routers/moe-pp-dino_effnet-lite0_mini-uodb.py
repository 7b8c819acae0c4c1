# MoE++: zero, copy and constant experts beside four FFNs, in the decoder.
_base_ = '../gem/dense-dino_effnet-lite0_mini-uodb.py'
model = dict(
    moe=[
        dict(
            targets=r'decoder\.layers\.[02]\.ffn',
            num_experts=4,
            router=dict(type='MoEPPRouter'),
        )
    ],
)
