# SF-MoE in the ViT of the hybrid, blocks as the code of v2 has them: 6 and 12.
_base_ = ['./vit-r26-s32_dense.py', '../_base_/vit_moe.py']
model = dict(moe=[dict(blocks='FFFFFS*2', **_base_.sf_moe)])
