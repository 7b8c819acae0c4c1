# The usual baseline: the dense twin, trained without bccd, gets its class rows, and all of it is
# fine-tuned on $SHOTS.
_base_ = '../gem/dense-dino_effnet-lite0_mini-uodb.py'
shots = '{{$SHOTS:work_dirs/fewshot/train_10shot_seed0.json}}'
load_from = '{{$BASE_CHECKPOINT:work_dirs/mini_uodb/dino-without-bccd-seed0/dense/iter_500.pth}}'
model = dict(newcomers=['bccd'])
train_dataloader = dict(
    dataset=dict(domains=dict(_delete_=True, bccd={**_base_.train_domains.bccd, 'ann_file': shots}))
)
train_cfg = dict(max_iters=100, val_interval=100)
param_scheduler = [
    {**_base_.param_scheduler[0], 'end': 10},
    {**_base_.param_scheduler[1], 'begin': 10, 'end': 100, 'T_max': 90},
]
