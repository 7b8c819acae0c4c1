# 4 experts, each a whole stage 4, balanced by the mean constraint.
_base_ = './resnet18_moe-e4-pos4-importance_cifar100.py'
model = dict(moe=[{**_base_.model.moe[0], 'balance': _base_.balances.mean}])
