# Every convolution of stage 4 is four experts with a gate of its own.
_base_ = './resnet18_moe-e4-pos4-importance_cifar100.py'
model = dict(
    moe=[
        {
            **_base_.model.moe[0],
            'targets': r'backbone\.layer4\.\d\.(conv\d|downsample\.0)',
        }
    ]
)
