# GMoE-S/16 with two experts per token, whose weights sum to 1.
_base_ = './vit-s16_gmoe-e6.py'
router = dict(type='CosineRouter', k=2)
model = dict(moe=[{**_base_.model.moe[0], 'router': router}])
