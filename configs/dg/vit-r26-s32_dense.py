# ERM with the hybrid R26+ViT-S/32.
_base_ = [
    '../_base_/models/vit-r26-s32_dg.py',
    '../_base_/datasets/dg.py',
    '../_base_/schedules/dg.py',
]
model = dict(head=dict(num_classes={{_base_.num_classes}}))
