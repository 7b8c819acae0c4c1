# Experts of the backbone's last stage, one decision for each image, on 1024 channels; their batch
# norms stay as they were trained.
_base_ = './retinanet_r50_fpn_moe-kl_coco.py'
model = dict(moe=[{**_base_.model.moe[0], 'targets': r'backbone\.layer4', 'expert_norm': 'frozen'}])
