"""What runs beside the model: hooks."""

from mmdet_moe.engine.hooks import DenseWarmupHook, PlanHook, RandomStateHook, UpcycleHook

__all__ = ['DenseWarmupHook', 'PlanHook', 'RandomStateHook', 'UpcycleHook']
