# One gate on the input image, shared by the experts of stages 3 and 4.
_base_ = './resnet18_moe-e4-pos4-importance_cifar100.py'
model = dict(
    moe=[
        {
            **_base_.model.moe[0],
            'targets': r'backbone\.layer[34]',
            'share_router': 'image',
        }
    ]
)
