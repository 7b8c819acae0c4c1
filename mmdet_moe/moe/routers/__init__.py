"""Routers: one file each. Importing this package registers them."""

from mmdet_moe.moe.routers.base import Router
from mmdet_moe.moe.routers.damex import DAMEXRouter
from mmdet_moe.moe.routers.expert_choice import ExpertChoiceRouter
from mmdet_moe.moe.routers.gated import GatedRouter, SelectingRouter
from mmdet_moe.moe.routers.moe_pp import MoEPPRouter
from mmdet_moe.moe.routers.plan import PlanRouter
from mmdet_moe.moe.routers.plan_prior import PlanPriorRouter
from mmdet_moe.moe.routers.remoe import ReMoERouter
from mmdet_moe.moe.routers.single import SingleRouter
from mmdet_moe.moe.routers.sinkhorn import BASERouter, SinkhornRouter
from mmdet_moe.moe.routers.soft import SoftMoERouter
from mmdet_moe.moe.routers.switch import GShardRouter, SwitchRouter
from mmdet_moe.moe.routers.topk import CosineRouter, TopKRouter

__all__ = [
    'BASERouter',
    'CosineRouter',
    'DAMEXRouter',
    'ExpertChoiceRouter',
    'GShardRouter',
    'GatedRouter',
    'MoEPPRouter',
    'PlanPriorRouter',
    'PlanRouter',
    'ReMoERouter',
    'Router',
    'SelectingRouter',
    'SingleRouter',
    'SinkhornRouter',
    'SoftMoERouter',
    'SwitchRouter',
    'TopKRouter',
]
