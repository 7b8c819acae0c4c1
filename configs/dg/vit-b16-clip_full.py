# Full fine-tuning of CLIP's ViT-B/16; the network of all vit-b16-clip files here. The recipe (Adam,
# 5e-5, 32 images of every source domain) is the schedule's.
_base_ = [
    '../_base_/models/vit-base_clip_dg.py',
    '../_base_/datasets/dg.py',
    '../_base_/schedules/dg.py',
]
model = dict(
    data_preprocessor=dict(num_classes={{_base_.num_classes}}),
    head=dict(num_classes={{_base_.num_classes}}),
)
