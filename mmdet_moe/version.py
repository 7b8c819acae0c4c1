"""The version of mmdet-moe."""

__version__ = '0.1.0'
