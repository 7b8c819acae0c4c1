"""What runs beside the model: hooks."""

from mmdet_moe.engine.hooks import RandomStateHook

__all__ = ['RandomStateHook']
