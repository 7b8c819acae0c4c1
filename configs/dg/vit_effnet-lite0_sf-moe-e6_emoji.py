# SF-MoE: two of 6 experts per token in blocks 3 and 6, each half as wide as the dense FFN, so that
# both together cost what it does. Such experts cannot hold its weights: they are fresh draws.
_base_ = ['./vit_effnet-lite0_dense_emoji.py', '../_base_/vit_moe.py']
model = dict(moe=[dict(blocks='FFS*2', width='iso', noise='independent', **_base_.sf_moe)])
