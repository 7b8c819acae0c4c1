# GEM-DINO: the dense twin with experts, routed by the plan that tools/plan_experts.py makes.
_base_ = './dense-dino_effnet-lite0_mini-uodb.py'
plan = '{{$MINI_UODB_PLAN:work_dirs/mini_uodb/plan.json}}'
planner = dict(num_experts=4, demand='images')
model = dict(
    plan=plan,
    moe=[
        dict(
            # The paper's place: FFNs of the decoder, every second layer.
            targets=r'decoder\.layers\.[02]\.ffn',
            router=dict(type='PlanRouter', unknown='nearest'),
        )
    ],
)
