"""Hooks."""

from mmdet_moe.engine.hooks.random_state_hook import RandomStateHook
from mmdet_moe.engine.hooks.upcycle_hook import UpcycleHook

__all__ = ['RandomStateHook', 'UpcycleHook']
