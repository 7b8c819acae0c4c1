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

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    # At least two are kept: mmengine removes the oldest before it writes the new one, so with one
    # a crash in between would leave none.
    checkpoint=dict(
        type='CheckpointHook',
        by_epoch=False,
        interval=500,
        max_keep_ckpts=2,
        save_best='macro/coco/bbox_mAP',
    ),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='DetVisualizationHook'),
)
custom_hooks = [
    dict(type='RandomStateHook'),  # a killed run resumes exactly
    dict(type='UpcycleHook'),  # load_from takes dense checkpoints
    dict(type='PlanHook'),  # the checkpoint knows its plan
]

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(type='DetLocalVisualizer', vis_backends=vis_backends, name='visualizer')
log_processor = dict(type='LogProcessor', window_size=50, by_epoch=False)
log_level = 'INFO'
load_from = None
resume = False
