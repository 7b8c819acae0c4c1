# What MoA (arXiv 2310.11031) puts beside the frozen qkv layers of blocks 1, 3, 5, ... of a ViT, for
# the specs of configs/dg. Nothing else trains but the head.
lora_moa = dict(
    adapters=dict(type='LoRA', ranks=[1, 2, 4, 8]),
    router=dict(type='CosineRouter'),  # top-1, 256 wide, weight as the softmax has it
    balance=[dict(type='ImportanceLoss', weight=0.005), dict(type='LoadLoss', weight=0.005)],
)
kadaptation_moa = dict(
    **{
        **lora_moa,
        'adapters': dict(type='KAdaptation', ranks=[1, 2, 4, 8]),
    }
)
# The baselines: one adapter, no router.
lora = dict(adapters=dict(type='LoRA', ranks=[2]))
kadaptation = dict(adapters=dict(type='KAdaptation', ranks=[2]))
head_only = dict(train=[r'head\..*'])
# Checkpoints hold what trains: a few MB.
adapter_hook = dict(type='mmdet_moe.AdapterCheckpointHook')
