"""Evaluation over several domains."""

from mmdet_moe.evaluation.multi_domain_evaluator import MultiDomainEvaluator

__all__ = ['MultiDomainEvaluator']
