# The dense network of the small experiments here.
_base_ = [
    '../_base_/models/vit_effnet-lite0_emoji.py',
    '../_base_/datasets/emoji.py',
    '../_base_/schedules/emoji.py',
    '../_base_/classification_runtime.py',
]
