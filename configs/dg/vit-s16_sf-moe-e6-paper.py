# SF-MoE as the paper's figure has it: every odd block is sparse.
_base_ = './vit-s16_sf-moe-e6-v2.py'
model = dict(moe=[{**_base_.model.moe[0], 'blocks': '[SF]*6'}])
