# DAMEX taught by the plan, in the decoder.
_base_ = '../gem/dense-dino_effnet-lite0_mini-uodb.py'
plan = '{{$MINI_UODB_PLAN:work_dirs/mini_uodb/plan.json}}'
planner = dict(num_experts=4, demand='images')
model = dict(
    plan=plan,
    moe=[
        dict(
            targets=r'decoder\.layers\.[02]\.ffn',
            router=dict(type='DAMEXRouter', router=dict(type='CosineRouter', k=1)),
        )
    ],
)
