# ERM with DeiT-S/16; the dense network of all vit-s16 files here.
_base_ = [
    '../_base_/models/deit-small_dg.py',
    '../_base_/datasets/emoji.py',
    '../_base_/schedules/emoji.py',
    '../_base_/classification_runtime.py',
]
model = dict(head=dict(num_classes=6))
