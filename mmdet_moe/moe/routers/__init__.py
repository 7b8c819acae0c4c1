"""Routers: one file each. Importing this package registers them."""

from mmdet_moe.moe.routers.base import Router
from mmdet_moe.moe.routers.gated import GatedRouter, SelectingRouter
from mmdet_moe.moe.routers.plan import PlanRouter
from mmdet_moe.moe.routers.topk import CosineRouter, TopKRouter

__all__ = [
    'CosineRouter',
    'GatedRouter',
    'PlanRouter',
    'Router',
    'SelectingRouter',
    'TopKRouter',
]
