# One decision for each image, on the image itself, for both subnets and all levels.
_base_ = './retinanet_r50_fpn_moe-kl_coco.py'
model = dict(moe=[{**_base_.model.moe[0], 'share_router': 'image'}])
