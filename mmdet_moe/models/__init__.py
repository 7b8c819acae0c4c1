"""Models: the MoE mixin, detectors, heads, backbones and the frozen embedder."""

from .backbones import *  # noqa: F403
from .dense_heads import MultiDomainDINOHead, MultiDomainRetinaHead
from .detectors import MoEDINO, MoERetinaNet
from .domain_classes import DomainClasses, MultiDomainHeadMixin, domain_loss_weights
from .embedder import FrozenEmbedder
from .layers import MultiDomainCdnQueryGenerator
from .moe_mixin import MoEMixin

__all__ = [
    'DomainClasses',
    'FrozenEmbedder',
    'MoEDINO',
    'MoEMixin',
    'MoERetinaNet',
    'MultiDomainCdnQueryGenerator',
    'MultiDomainDINOHead',
    'MultiDomainHeadMixin',
    'MultiDomainRetinaHead',
    'domain_loss_weights',
]
