# GEM-DINO as in the paper: the FFNs of decoder layers 1, 3 and 5 have experts, and the plan says
# which of them serve a dataset. Make the plan first:
#   python tools/plan_experts.py configs/gem/gem-dino-4scale_r50_8xb2-12e_uodb.py
_base_ = './dense-dino-4scale_r50_8xb2-12e_uodb.py'
plan = '{{$UODB_PLAN:work_dirs/uodb/plan.json}}'
planner = dict(num_experts=8, demand='images')
model = dict(
    plan=plan,
    moe=[
        dict(
            targets=r'decoder\.layers\.[135]\.ffn',
            router=dict(type='PlanRouter', unknown='nearest'),
        )
    ],
    # Without the domain at test: what the backbone's features are nearest to.
    domain_features={},
)
