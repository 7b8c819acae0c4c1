# SF-MoE as the code of v1 has it: blocks 3, 6, 9 and 12 are sparse.
_base_ = './vit-s16_sf-moe-e6-v2.py'
model = dict(moe=[{**_base_.model.moe[0], 'blocks': '[FFS]*4'}])
