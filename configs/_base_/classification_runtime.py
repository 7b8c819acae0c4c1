# mmpretrain's scope: its types need no prefix, ours are called mmdet_moe.*. Runs under mmpretrain's
# tools/train.py as well as under ours.
_base_ = 'mmpretrain::_base_/default_runtime.py'
custom_imports = dict(
    imports=['mmdet_moe.models', 'mmdet_moe.datasets', 'mmdet_moe.engine'],
    allow_failed_imports=False,
)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2, save_best='accuracy/top1'))
custom_hooks = [
    dict(type='mmdet_moe.RandomStateHook'),  # a killed run resumes exactly
    dict(type='mmdet_moe.UpcycleHook'),  # load_from takes dense checkpoints
    dict(type='mmdet_moe.ExpertRecordHook'),  # who does what: docs/looking_inside.md
]
find_unused_parameters = True  # an expert may be idle
