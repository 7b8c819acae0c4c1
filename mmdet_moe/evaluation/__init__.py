"""Evaluation over several domains, and of how experts are used."""

from mmdet_moe.evaluation.expert_statistics import expert_statistics
from mmdet_moe.evaluation.multi_domain_evaluator import MultiDomainEvaluator

__all__ = ['MultiDomainEvaluator', 'expert_statistics']
