# DAMEX taught by the plan, one router for every module that has experts. GEM-RetinaNet with another
# router; weights of 1, since most of these modules have no residual path around them.
_base_ = '../gem/gem-retinanet_effnet-lite0_mini-uodb.py'
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
)
