# As the GEM config, for DAMEX: the router chooses the expert, so it has to learn too, and with it
# the experts that it sends newcomers to at first. Everything outside of MoE layers is frozen.
_base_ = './gem-retinanet_effnet-lite0_mini-uodb-bccd.py'
load_from = (
    '{{$BASE_CHECKPOINT:work_dirs/mini_uodb/retinanet-without-bccd-seed0/damex/iter_500.pth}}'
)
model = dict(
    moe=[
        {
            **_base_.model.moe[0],
            'router': dict(
                type='DAMEXRouter',
                router=dict(type='TopKRouter', kind='cosine', k=1, renormalize=True),
            ),
        }
    ],
    adapt=dict(train=[r'.*\.(experts|router)\..*']),
)
