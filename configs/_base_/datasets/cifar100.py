# CIFAR-100 with the augmentation of arXiv 2204.10598. In $CIFAR100; mmpretrain downloads it there.
_base_ = 'mmpretrain::_base_/datasets/cifar100_bs16.py'
data_root = '{{$CIFAR100:data/cifar100/}}'
train_pipeline = [
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='ColorJitter', brightness=0.3, contrast=0.3, saturation=0.3),
    dict(type='PackInputs'),
]
train_dataloader = dict(batch_size=128, dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(batch_size=128, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
