# The dense network of the experiments in this folder.
_base_ = [
    '../_base_/models/resnet50_cifar100.py',
    '../_base_/datasets/cifar100.py',
    '../_base_/schedules/cnn_moe_150e.py',
    '../_base_/classification_runtime.py',
]
