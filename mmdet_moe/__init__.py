"""Mixture-of-Experts for MMDetection, with a planner that decides before training.

Importing the package costs nothing and pulls in neither torch nor mmengine, so that
:mod:`mmdet_moe.planning` runs where they are absent. The one thing it does is to teach mmengine's
config reader that ``_base_ = 'mmdet_moe::gem/...'`` means the configs shipped with this package.
"""

from mmdet_moe._config_scope import register_config_scope
from mmdet_moe.version import __version__

register_config_scope()

__all__ = ['__version__']
