# Experts of the box subnet only.
_base_ = './retinanet_r50_fpn_moe-kl_coco.py'
model = dict(moe=[{**_base_.model.moe[0], 'targets': r'bbox_head\.reg_subnet'}])
