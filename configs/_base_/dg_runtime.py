# What every training of the DomainBed protocol has: records for model selection, exact resuming.
_base_ = 'classification_runtime.py'
log_processor = dict(by_epoch=False)
default_hooks = dict(
    logger=dict(interval=100),
    checkpoint=dict(by_epoch=False, interval=300, max_keep_ckpts=1, save_best=None),
)
custom_imports = dict(
    imports=[
        'mmdet_moe.models',
        'mmdet_moe.datasets',
        'mmdet_moe.engine',
        'mmdet_moe.evaluation',
    ]
)
custom_hooks = [
    dict(type='mmdet_moe.RandomStateHook'),
    dict(type='mmdet_moe.UpcycleHook'),
    dict(type='mmdet_moe.DGRecordHook'),
]
