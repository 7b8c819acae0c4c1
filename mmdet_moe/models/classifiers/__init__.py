"""MoE classifiers: a mixin and an mmpretrain base each. Needs mmpretrain."""

from .feature_dropout import FeatureDropout
from .moe_image_classifier import MoEImageClassifier

__all__ = ['FeatureDropout', 'MoEImageClassifier']
