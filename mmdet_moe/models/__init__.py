"""Models: the MoE mixin, detectors, classifiers, heads, backbones and the frozen embedder."""

from importlib.util import find_spec

from .backbones import *  # noqa: F403
from .dense_heads import MoERetinaHead, MultiDomainDINOHead, MultiDomainRetinaHead
from .detectors import MoEDINO, MoERetinaNet
from .domain_classes import DomainClasses, MultiDomainHeadMixin, domain_loss_weights
from .domain_features import DomainFeatures
from .embedder import FrozenEmbedder
from .layers import MultiDomainCdnQueryGenerator
from .moe_mixin import MoEMixin

__all__ = [
    'DomainClasses',
    'DomainFeatures',
    'FrozenEmbedder',
    'MoEDINO',
    'MoEMixin',
    'MoERetinaHead',
    'MoERetinaNet',
    'MultiDomainCdnQueryGenerator',
    'MultiDomainDINOHead',
    'MultiDomainHeadMixin',
    'MultiDomainRetinaHead',
    'domain_loss_weights',
]

if find_spec('mmpretrain'):  # detection does without
    from .classifiers import FeatureDropout, MoEImageClassifier

    __all__ += ['FeatureDropout', 'MoEImageClassifier']
