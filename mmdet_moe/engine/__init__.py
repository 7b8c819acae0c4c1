"""What runs beside the model: hooks."""

from mmdet_moe.engine.hooks import RandomStateHook, UpcycleHook

__all__ = ['RandomStateHook', 'UpcycleHook']
