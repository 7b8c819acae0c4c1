# DomainBed: Adam with a constant learning rate, 5001 steps (DomainNet 15001), evaluated every 300
# (DomainNet 1000). With the runtime of these trainings.
_base_ = '../dg_runtime.py'
big = '{{$DG_DATASET:PACS}}' == 'DomainNet'
interval = 1000 if big else 300
train_cfg = dict(by_epoch=False, max_iters=15001 if big else 5001, val_interval=interval)
val_cfg = {}
test_cfg = {}
optim_wrapper = dict(optimizer=dict(type='Adam', lr=5e-5, weight_decay=0.0))
param_scheduler = None
default_hooks = dict(checkpoint=dict(interval=interval))
# Where random draws of hyper-parameters come from (tools/dg_sweep.py --draws).
dg_space = [
    dict(key='optim_wrapper.optimizer.lr', log10=(-5, -3.5)),
    dict(key='optim_wrapper.optimizer.weight_decay', log10=(-6, -2)),
    dict(key='train_dataloader.batch_size', log2=(3, 5.5)),
]
