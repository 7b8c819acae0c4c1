# The dense network of the small experiments in this folder. 32 px, CPU.
_base_ = [
    '../_base_/models/resnet18_emoji.py',
    '../_base_/datasets/emoji.py',
    '../_base_/schedules/emoji.py',
    '../_base_/classification_runtime.py',
]
