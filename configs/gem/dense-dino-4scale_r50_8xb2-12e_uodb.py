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
    sampler=dict(_delete_=True, **_base_.train_sampler),
    dataset=dict(
        _delete_=True,
        type='MultiDomainDataset',
        _scope_='mmdet_moe',
        label_space=label_space,
        domains={{_base_.train_domains}},
        pipeline={{_base_.train_pipeline}},
        domain_pipelines={{_base_.train_pipelines}},
    ),
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='MultiDomainDataset',
        _scope_='mmdet_moe',
        label_space=label_space,
        domains={{_base_.test_domains}},
        pipeline={{_base_.test_pipeline}},
        domain_pipelines={{_base_.test_pipelines}},
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(
    _delete_=True,
    type='MultiDomainEvaluator',
    _scope_='mmdet_moe',
    label_space=label_space,
    metrics={{_base_.metrics}},
    small={{_base_.small_domains}},
)
test_evaluator = val_evaluator

# The sampler's stream has no epochs. 90k steps of 16 images are about twelve times all of them.
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=90000, val_interval=7500)
param_scheduler = [
    dict(type='MultiStepLR', by_epoch=False, begin=0, end=90000, milestones=[82500], gamma=0.1)
]
default_hooks = dict(
    checkpoint=dict(
        by_epoch=False, interval=7500, max_keep_ckpts=2, save_best='macro/coco/bbox_mAP'
    )
)
log_processor = dict(by_epoch=False)
# A class branch or an expert without an image in a rank's batch has no gradient there.
find_unused_parameters = True
custom_hooks = [
    dict(type='RandomStateHook', _scope_='mmdet_moe'),
    dict(type='UpcycleHook', _scope_='mmdet_moe'),
    dict(type='PlanHook', _scope_='mmdet_moe'),
    dict(type='DomainPrototypeHook', _scope_='mmdet_moe'),
]
