# ERM with the hybrid R26+ViT-S/32.
_base_ = [
    '../_base_/models/vit-r26-s32_dg.py',
    '../_base_/datasets/emoji.py',
    '../_base_/schedules/emoji.py',
    '../_base_/classification_runtime.py',
]
model = dict(head=dict(num_classes=6))
