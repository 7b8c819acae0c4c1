# An expert is one convolution: the second of the last block.
_base_ = './resnet18_moe-e4-pos4-importance_cifar100.py'
model = dict(moe=[{**_base_.model.moe[0], 'targets': r'backbone\.layer4\.1\.conv2'}])
