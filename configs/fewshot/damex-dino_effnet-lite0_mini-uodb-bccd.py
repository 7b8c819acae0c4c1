# As the GEM config, for DAMEX: the router and the experts of both layers learn too.
_base_ = './gem-dino_effnet-lite0_mini-uodb-bccd.py'
load_from = '{{$BASE_CHECKPOINT:work_dirs/mini_uodb/dino-without-bccd-seed0/damex/iter_500.pth}}'
model = dict(
    moe=[
        {
            **_base_.model.moe[0],
            'router': dict(type='DAMEXRouter', router=dict(type='CosineRouter', k=1)),
        }
    ],
    adapt=dict(train=[r'.*\.(experts|router)\..*']),
)
