# SF-MoE as the code of v1 has it: blocks 3, 6, 9 and 12 are sparse.
_base_ = ['./vit-s16_dense.py', '../_base_/vit_moe.py']
model = dict(moe=[dict(blocks='[FFS]*4', **_base_.sf_moe)])
