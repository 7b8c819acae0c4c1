"""Detection heads over several domains with one label space, and heads with experts."""

from .levels import LevelsMixin
from .moe_retina_head import MoERetinaHead
from .multi_domain_dino_head import MultiDomainDINOHead
from .multi_domain_retina_head import MultiDomainRetinaHead

__all__ = ['LevelsMixin', 'MoERetinaHead', 'MultiDomainDINOHead', 'MultiDomainRetinaHead']
