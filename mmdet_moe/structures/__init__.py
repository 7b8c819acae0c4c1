"""Plain data structures shared by datasets, models and evaluation (pure Python)."""

from mmdet_moe.structures.label_space import LabelSpace, LabelSpaceError

__all__ = ['LabelSpace', 'LabelSpaceError']
