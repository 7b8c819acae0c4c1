"""Transforms."""

from mmdet_moe.datasets.transforms.set_domain import SetDomain

__all__ = ['SetDomain']
