"""Layers of the multi-domain detectors."""

from .class_blocks import RowLayout, with_blocks
from .denoising import MultiDomainCdnQueryGenerator

__all__ = ['MultiDomainCdnQueryGenerator', 'RowLayout', 'with_blocks']
