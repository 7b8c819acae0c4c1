"""Datasets of several domains, and how they are sampled."""

from importlib.util import find_spec

from mmdet_moe.datasets.domain import DomainDataset
from mmdet_moe.datasets.multi_domain import MultiDomainDataset
from mmdet_moe.datasets.sampler import DomainBatchSampler, MultiDomainSampler
from mmdet_moe.datasets.transforms import SetDomain

__all__ = [
    'DomainBatchSampler',
    'DomainDataset',
    'MultiDomainDataset',
    'MultiDomainSampler',
    'SetDomain',
]

if find_spec('mmpretrain'):  # detection does without
    from mmdet_moe.datasets.dg_dataset import DGDataset
    from mmdet_moe.datasets.domain_folder import DomainImageFolder

    __all__ += ['DGDataset', 'DomainImageFolder']
