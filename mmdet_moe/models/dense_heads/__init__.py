"""Detection heads over several domains with one label space."""

from .multi_domain_dino_head import MultiDomainDINOHead
from .multi_domain_retina_head import MultiDomainRetinaHead

__all__ = ['MultiDomainDINOHead', 'MultiDomainRetinaHead']
