"""Evaluation over several domains, and of how experts are used."""

from mmdet_moe.evaluation.dg_selection import Run, results_table
from mmdet_moe.evaluation.domain_accuracy import DomainAccuracy
from mmdet_moe.evaluation.expert_statistics import expert_statistics
from mmdet_moe.evaluation.multi_domain_evaluator import MultiDomainEvaluator

__all__ = [
    'DomainAccuracy',
    'MultiDomainEvaluator',
    'Run',
    'expert_statistics',
    'results_table',
]
