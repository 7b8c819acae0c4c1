# GEM-RetinaNet: the dense twin with experts, routed by the plan that tools/plan_experts.py makes.
_base_ = './dense-retinanet_effnet-lite0_demo.py'
plan = '{{$DEMO_PLAN:work_dirs/demo/plan.json}}'
planner = dict(num_experts=4, demand='images')
model = dict(
    plan=plan,
    moe=[
        dict(
            targets=[
                r'bbox_head\.(cls|reg)_convs\.\d',
            ],
            router=dict(type='PlanRouter', unknown='nearest'),
        )
    ],
)
