"""What runs beside the model: hooks."""

from mmdet_moe.engine.hooks import (
    DenseWarmupHook,
    DomainPrototypeHook,
    ExpertRecordHook,
    PlanHook,
    RandomStateHook,
    UpcycleHook,
)

__all__ = [
    'DenseWarmupHook',
    'DomainPrototypeHook',
    'ExpertRecordHook',
    'PlanHook',
    'RandomStateHook',
    'UpcycleHook',
]
