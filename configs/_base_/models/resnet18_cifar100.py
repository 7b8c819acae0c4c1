_base_ = 'mmpretrain::_base_/models/resnet18_cifar.py'
model = dict(type='mmdet_moe.MoEImageClassifier', head=dict(num_classes=100))
