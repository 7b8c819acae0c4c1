"""MoE classifiers: a mixin and an mmpretrain base each. Needs mmpretrain."""

from .moe_image_classifier import MoEImageClassifier

__all__ = ['MoEImageClassifier']
