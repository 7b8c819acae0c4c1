# One gate for both subnets: on each level the box subnet follows the class subnet's decision.
_base_ = './retinanet_r50_fpn_moe-kl_coco.py'
model = dict(moe=[{**_base_.model.moe[0], 'share_router': 'call'}])
