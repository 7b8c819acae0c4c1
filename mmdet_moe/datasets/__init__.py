"""Datasets of several domains, and how they are sampled."""

from mmdet_moe.datasets.domain import DomainDataset
from mmdet_moe.datasets.multi_domain import MultiDomainDataset
from mmdet_moe.datasets.sampler import MultiDomainSampler
from mmdet_moe.datasets.transforms import SetDomain

__all__ = ['DomainDataset', 'MultiDomainDataset', 'MultiDomainSampler', 'SetDomain']
