# 4 experts, each a whole stage 3, balanced by the relative constraint.
_base_ = './resnet18_moe-e4-pos3-importance_cifar100.py'
model = dict(moe=[{**_base_.model.moe[0], 'balance': _base_.balances.relative}])
