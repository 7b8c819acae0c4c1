"""What runs beside the model: hooks."""

from mmdet_moe.engine.hooks import PlanHook, RandomStateHook, UpcycleHook

__all__ = ['PlanHook', 'RandomStateHook', 'UpcycleHook']
