"""Hooks."""

from mmdet_moe.engine.hooks.random_state_hook import RandomStateHook

__all__ = ['RandomStateHook']
