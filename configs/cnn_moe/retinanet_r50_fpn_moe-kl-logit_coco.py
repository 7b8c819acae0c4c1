# Class experts mixed as logits, not after the sigmoid.
_base_ = './retinanet_r50_fpn_moe-kl_coco.py'
model = dict(bbox_head=dict(mix='logit'))
