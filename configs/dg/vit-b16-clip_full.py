# Full fine-tuning of CLIP's ViT-B/16; the network of all vit-b16-clip files here.
_base_ = [
    '../_base_/models/vit-base_clip_dg.py',
    '../_base_/datasets/emoji.py',
    '../_base_/schedules/emoji.py',
    '../_base_/classification_runtime.py',
]
optim_wrapper = dict(optimizer=dict(_delete_=True, type='Adam', lr=5e-5, weight_decay=0.0))
