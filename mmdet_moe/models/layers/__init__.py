"""Layers of the multi-domain detectors."""

from .denoising import MultiDomainCdnQueryGenerator

__all__ = ['MultiDomainCdnQueryGenerator']
