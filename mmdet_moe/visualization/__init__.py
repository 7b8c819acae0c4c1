"""Pictures: the expert plan. (Importing this package imports neither torch nor matplotlib.)"""

from mmdet_moe.visualization.plan_figure import draw_plan

__all__ = ['draw_plan']
