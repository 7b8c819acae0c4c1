# The dense RetinaNet of the five small domains, trained, with experts in the place of its subnets.
# The domain is not given to the gates. Train the dense twin first:
#   python tools/train.py configs/gem/dense-retinanet_effnet-lite0_mini-uodb.py
_base_ = '../gem/dense-retinanet_effnet-lite0_mini-uodb.py'
load_from = (
    '{{$MINI_UODB_RETINANET:work_dirs/dense-retinanet_effnet-lite0_mini-uodb/iter_1000.pth}}'
)
model = dict(
    freeze_others=True,
    bbox_head=dict(type='MoERetinaHead', with_levels=True),
    moe=[
        dict(
            targets=r'bbox_head\.(cls|reg)_subnet',
            num_experts=4,
            router=dict(type='TopKRouter', k=2, bias=True),
            balance=[dict(type='KLLoss', weight=0.25)],
            noise=0.05,
        )
    ],
)
# The experts are trained already: a third of the dense twin's rate and two fifths of its steps.
optim_wrapper = dict(optimizer=dict(lr=0.0003))
train_cfg = dict(max_iters=400, val_interval=400)
param_scheduler = [
    {**_base_.param_scheduler[0], 'end': 40},
    {**_base_.param_scheduler[1], 'begin': 40, 'end': 400, 'T_max': 360},
]
default_hooks = dict(checkpoint=dict(interval=100))
custom_hooks = [*_base_.custom_hooks, dict(type='ExpertRecordHook')]
