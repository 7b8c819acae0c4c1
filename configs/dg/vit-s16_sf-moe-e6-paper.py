# SF-MoE as the paper's figure has it: every odd block is sparse.
_base_ = ['./vit-s16_dense.py', '../_base_/vit_moe.py']
model = dict(moe=[dict(blocks='[SF]*6', **_base_.sf_moe)])
