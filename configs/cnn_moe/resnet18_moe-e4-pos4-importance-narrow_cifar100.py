# Narrow experts: two of them together cost what the dense stage does.
_base_ = './resnet18_moe-e4-pos4-importance_cifar100.py'
model = dict(moe=[{**_base_.model.moe[0], 'width': 'iso'}])
