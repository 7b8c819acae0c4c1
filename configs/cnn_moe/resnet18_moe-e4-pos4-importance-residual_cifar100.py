# The residual form: the experts add to a bypass (1x1 stride-2 convolution + BN).
_base_ = './resnet18_moe-e4-pos4-importance_cifar100.py'
model = dict(moe=[{**_base_.model.moe[0], 'bypass': True}])
