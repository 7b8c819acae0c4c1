"""Hooks."""

from mmdet_moe.engine.hooks.adapter_checkpoint_hook import AdapterCheckpointHook
from mmdet_moe.engine.hooks.dense_warmup_hook import DenseWarmupHook
from mmdet_moe.engine.hooks.dg_record_hook import DGRecordHook
from mmdet_moe.engine.hooks.expert_record_hook import ExpertRecordHook
from mmdet_moe.engine.hooks.plan_hook import PlanHook
from mmdet_moe.engine.hooks.random_state_hook import RandomStateHook
from mmdet_moe.engine.hooks.upcycle_hook import UpcycleHook

__all__ = [
    'AdapterCheckpointHook',
    'DGRecordHook',
    'DenseWarmupHook',
    'ExpertRecordHook',
    'PlanHook',
    'RandomStateHook',
    'UpcycleHook',
]
