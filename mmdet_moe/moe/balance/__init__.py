r"""Balancing: losses and constraints that ask for an even use of the experts, one idea per file.

Axes: T items, E experts, k selected, n (item, expert) pairs.

*Losses* (soft) are added to the model's loss: pure functions of tensors, and the classes that stand
in a config. *Constraints* (hard) keep an account of what each expert got and close the door of an
expert that got too much, for the next batch.
"""

from mmdet_moe.moe.balance.base import BalanceLoss, GateLoss, SummedLoss
from mmdet_moe.moe.balance.constraints import (
    ImportanceConstraint,
    MeanImportanceConstraint,
    RelativeImportanceConstraint,
)
from mmdet_moe.moe.balance.entropy import EntropyLoss, entropy_loss
from mmdet_moe.moe.balance.importance import ImportanceLoss, cv_squared, importance_loss
from mmdet_moe.moe.balance.kl import KLLoss, kl_loss
from mmdet_moe.moe.balance.load import LoadLoss, load_loss
from mmdet_moe.moe.balance.switch import SwitchLoss, switch_loss
from mmdet_moe.moe.balance.variance import VarianceLoss, variance_loss

__all__ = [
    'BalanceLoss',
    'EntropyLoss',
    'GateLoss',
    'ImportanceConstraint',
    'ImportanceLoss',
    'KLLoss',
    'LoadLoss',
    'MeanImportanceConstraint',
    'RelativeImportanceConstraint',
    'SummedLoss',
    'SwitchLoss',
    'VarianceLoss',
    'cv_squared',
    'entropy_loss',
    'importance_loss',
    'kl_loss',
    'load_loss',
    'switch_loss',
    'variance_loss',
]
