"""Plans which expert serves which dataset, before training. Never imports torch."""

from mmdet_moe.planning.errors import InfeasibleError, NoPlanFoundError, PlanError
from mmdet_moe.planning.newcomer import add_newcomer
from mmdet_moe.planning.plan import ExpertPlan
from mmdet_moe.planning.planner import plan_experts
from mmdet_moe.planning.problem import PlanningProblem

__all__ = [
    'ExpertPlan',
    'InfeasibleError',
    'NoPlanFoundError',
    'PlanError',
    'PlanningProblem',
    'add_newcomer',
    'plan_experts',
]
