# SF-MoE as the code of v2 has it: blocks 6 and 12 are sparse.
_base_ = ['./vit-s16_dense.py', '../_base_/vit_moe.py']
model = dict(moe=[dict(blocks='FFFFFS*2', **_base_.sf_moe)])
