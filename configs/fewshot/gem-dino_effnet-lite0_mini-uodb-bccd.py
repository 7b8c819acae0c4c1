# As the RetinaNet config, for GEM-DINO: the new expert's FFNs and the newcomer's rows of the class
# branches and of the label embedding learn, all else is frozen. Hungarian matching knows no ignored
# boxes: objects beside the shots count as background.
_base_ = '../gem/gem-dino_effnet-lite0_mini-uodb.py'
shots = '{{$SHOTS:work_dirs/fewshot/train_10shot_seed0.json}}'
load_from = '{{$BASE_CHECKPOINT:work_dirs/mini_uodb/dino-without-bccd-seed0/gem/iter_500.pth}}'
previous = '{{$BASE_PLAN:work_dirs/mini_uodb/dino-without-bccd-seed0/plan.json}}'
planner = dict(previous=previous, held=True, expert='new')
model = dict(
    newcomers=['bccd'],
    adapt=dict(domain='bccd', previous=previous),
)
train_dataloader = dict(
    dataset=dict(domains=dict(_delete_=True, bccd={**_base_.train_domains.bccd, 'ann_file': shots}))
)
# The experts parted long ago; the plan knows domains that are not trained.
custom_hooks = [*_base_.custom_hooks[:2], dict(type='PlanHook', subset=True)]
train_cfg = dict(max_iters=100, val_interval=100)
param_scheduler = [
    {**_base_.param_scheduler[0], 'end': 10},
    {**_base_.param_scheduler[1], 'begin': 10, 'end': 100, 'T_max': 90},
]
