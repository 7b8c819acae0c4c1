# 4 experts, each a whole stage 2, balanced by the KL loss.
_base_ = './resnet18_moe-e4-pos2-importance_cifar100.py'
model = dict(moe=[{**_base_.model.moe[0], 'balance': _base_.balances.kl}])
