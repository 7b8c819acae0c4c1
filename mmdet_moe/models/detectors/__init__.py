"""MoE detectors: a mixin and an mmdet base each."""

from .moe_dino import MoEDINO
from .moe_retinanet import MoERetinaNet

__all__ = ['MoEDINO', 'MoERetinaNet']
