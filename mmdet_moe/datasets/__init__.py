"""Datasets of several domains, and how they are sampled."""

from mmdet_moe.datasets.domain import DomainDataset
from mmdet_moe.datasets.multi_domain import MultiDomainDataset

__all__ = ['DomainDataset', 'MultiDomainDataset']
