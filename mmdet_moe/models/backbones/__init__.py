"""Backbones that mmdet does not have."""

from mmdet_moe.models.backbones.efficientnet_lite import EfficientNetLite

__all__ = ['EfficientNetLite']
