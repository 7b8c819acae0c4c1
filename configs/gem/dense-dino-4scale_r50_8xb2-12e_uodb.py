# The dense twin of GEM-DINO on UODB: mmdet's DINO with our data, label space and masked classes.
_base_ = ['mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', '../_base_/datasets/uodb.py']
default_scope = 'mmdet_moe'
custom_imports = dict(
    imports=[
        'mmdet_moe.models',
        'mmdet_moe.datasets',
        'mmdet_moe.evaluation',
        'mmdet_moe.engine',
    ],
    allow_failed_imports=False,
)
label_space = {{_base_.label_space}}
model = dict(
    type='MoEDINO',
    _scope_='mmdet_moe',
    label_space=label_space,
    bbox_head=dict(type='MultiDomainDINOHead', _scope_='mmdet_moe'),
)
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='MultiDomainDataset',
        _scope_='mmdet_moe',
        label_space=label_space,
        domains={{_base_.train_domains}},
        pipeline={{_base_.train_pipeline}},
    )
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='MultiDomainDataset',
        _scope_='mmdet_moe',
        label_space=label_space,
        domains={{_base_.test_domains}},
        pipeline={{_base_.test_pipeline}},
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(
    _delete_=True,
    type='MultiDomainEvaluator',
    _scope_='mmdet_moe',
    label_space=label_space,
    metrics={{_base_.metrics}},
)
test_evaluator = val_evaluator
custom_hooks = [
    dict(type='RandomStateHook', _scope_='mmdet_moe'),
    dict(type='UpcycleHook', _scope_='mmdet_moe'),
    dict(type='PlanHook', _scope_='mmdet_moe'),
]
