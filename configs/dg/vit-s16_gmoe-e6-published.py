# GMoE-S/16 as published: at step 0 the FFNs of blocks 9 and 11 count for about a fifth.
_base_ = './vit-s16_gmoe-e6.py'
model = dict(moe=[dict(blocks='last_two', **_base_.gmoe_published)])
