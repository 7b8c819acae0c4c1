"""Mixture-of-Experts layers in plain torch: routers, dispatch, replacement, upcycling.

Nothing here knows of mmengine, mmcv or mmdet.
"""

from mmdet_moe.moe.balance import (
    BalanceLoss,
    EntropyLoss,
    GateLoss,
    ImportanceConstraint,
    ImportanceLoss,
    KLLoss,
    LoadLoss,
    MeanImportanceConstraint,
    RelativeImportanceConstraint,
    SummedLoss,
    SwitchLoss,
    VarianceLoss,
    cv_squared,
    entropy_loss,
    importance_loss,
    kl_loss,
    load_loss,
    switch_loss,
    variance_loss,
)
from mmdet_moe.moe.blocks import sparse_blocks
from mmdet_moe.moe.dispatch import run_experts
from mmdet_moe.moe.forced import forced_routing
from mmdet_moe.moe.layer import MoELayer, moe_layers
from mmdet_moe.moe.probability import ProbabilityMoELayer, mixed_logits
from mmdet_moe.moe.registry import BALANCE, ROUTERS, build_router
from mmdet_moe.moe.replace import TargetError, check_datasets, replace_modules
from mmdet_moe.moe.routers import (
    BASERouter,
    CosineRouter,
    DAMEXRouter,
    ExpertChoiceRouter,
    GatedRouter,
    GShardRouter,
    MoEPPRouter,
    PlanPriorRouter,
    PlanRouter,
    ReMoERouter,
    Router,
    SelectingRouter,
    SinkhornRouter,
    SoftMoERouter,
    SwitchRouter,
    TopKRouter,
)
from mmdet_moe.moe.routing import Routing, RoutingContext
from mmdet_moe.moe.soft import SlotRouting, run_slots
from mmdet_moe.moe.state import RoutingState
from mmdet_moe.moe.targets import (
    TARGET_ADAPTERS,
    Target,
    describe_target,
    register_target,
    register_unsafe,
)
from mmdet_moe.moe.upcycle import (
    spread_first_expert_,
    spread_optimizer_state_,
    upcycle_,
    upcycle_from_checkpoints,
)

__all__ = [
    'BALANCE',
    'BASERouter',
    'BalanceLoss',
    'CosineRouter',
    'DAMEXRouter',
    'EntropyLoss',
    'ExpertChoiceRouter',
    'GShardRouter',
    'GateLoss',
    'GatedRouter',
    'ImportanceConstraint',
    'ImportanceLoss',
    'KLLoss',
    'LoadLoss',
    'MeanImportanceConstraint',
    'MoELayer',
    'MoEPPRouter',
    'PlanPriorRouter',
    'PlanRouter',
    'ProbabilityMoELayer',
    'ROUTERS',
    'ReMoERouter',
    'RelativeImportanceConstraint',
    'Router',
    'Routing',
    'RoutingContext',
    'RoutingState',
    'SelectingRouter',
    'SinkhornRouter',
    'SlotRouting',
    'SoftMoERouter',
    'SummedLoss',
    'SwitchLoss',
    'SwitchRouter',
    'TARGET_ADAPTERS',
    'Target',
    'TargetError',
    'TopKRouter',
    'VarianceLoss',
    'build_router',
    'check_datasets',
    'cv_squared',
    'describe_target',
    'entropy_loss',
    'forced_routing',
    'importance_loss',
    'kl_loss',
    'load_loss',
    'mixed_logits',
    'moe_layers',
    'register_target',
    'register_unsafe',
    'replace_modules',
    'run_experts',
    'run_slots',
    'sparse_blocks',
    'spread_first_expert_',
    'spread_optimizer_state_',
    'switch_loss',
    'upcycle_',
    'upcycle_from_checkpoints',
    'variance_loss',
]
