# GEM-RetinaNet: the dense twin with experts, routed by the plan that tools/plan_experts.py makes.
_base_ = './dense-retinanet_effnet-lite0_mini-uodb.py'
plan = '{{$MINI_UODB_PLAN:work_dirs/mini_uodb/plan.json}}'
planner = dict(num_experts=4, demand='images')
model = dict(
    plan=plan,
    moe=[
        dict(
            # All from stride 16 on but the class output, where each class has its own rows and so
            # its own domain.
            targets=[
                r'backbone\.stages\.[34]',
                r'neck\.(lateral|fpn)_convs\.\d',
                r'bbox_head\.(cls|reg)_convs\.\d',
                r'bbox_head\.retina_reg',
            ],
            router=dict(type='PlanRouter', unknown='nearest'),
        )
    ],
)
# Experts from scratch see too few images each: first one dense model, then its four children.
custom_hooks = [*_base_.custom_hooks, dict(type='DenseWarmupHook', share=0.5)]
