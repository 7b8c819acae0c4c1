# ERM with DeiT-S/16; the dense network of all vit-s16 files here.
_base_ = [
    '../_base_/models/deit-small_dg.py',
    '../_base_/datasets/dg.py',
    '../_base_/schedules/dg.py',
]
model = dict(head=dict(num_classes={{_base_.num_classes}}))
