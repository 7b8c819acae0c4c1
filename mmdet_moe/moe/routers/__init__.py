"""Routers: one file each. Importing this package registers them."""

from mmdet_moe.moe.routers.base import Router
from mmdet_moe.moe.routers.plan import PlanRouter
from mmdet_moe.moe.routers.topk import TopKRouter

__all__ = ['PlanRouter', 'Router', 'TopKRouter']
