# 4 experts, each a whole stage 2, balanced by the importance loss.
_base_ = './resnet18_moe-e4-pos4-importance_cifar100.py'
model = dict(moe=[{**_base_.model.moe[0], 'targets': r'backbone\.layer2'}])
