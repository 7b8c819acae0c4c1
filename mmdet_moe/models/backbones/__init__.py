"""Backbones that mmdet and mmpretrain do not have."""

from importlib.util import find_spec

from mmdet_moe.models.backbones.efficientnet_lite import EfficientNetLite

__all__ = ['EfficientNetLite']

if find_spec('mmpretrain'):  # detection does without
    from mmdet_moe.models.backbones.hybrid_vit import HybridVisionTransformer

    __all__ += ['HybridVisionTransformer']
