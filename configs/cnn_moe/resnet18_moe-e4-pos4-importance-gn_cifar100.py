# Group norms inside the experts, which see few images each.
_base_ = './resnet18_moe-e4-pos4-importance_cifar100.py'
model = dict(moe=[{**_base_.model.moe[0], 'expert_norm': dict(type='GN', num_groups=32)}])
