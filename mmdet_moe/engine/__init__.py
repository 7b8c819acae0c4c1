"""What runs beside the model: hooks."""

from mmdet_moe.engine.hooks import (
    DenseWarmupHook,
    ExpertRecordHook,
    PlanHook,
    RandomStateHook,
    UpcycleHook,
)

__all__ = ['DenseWarmupHook', 'ExpertRecordHook', 'PlanHook', 'RandomStateHook', 'UpcycleHook']
