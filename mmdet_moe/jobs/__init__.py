"""Trainings as jobs of a sweep. Light to import: a job's process has what it needs."""

from mmdet_moe.jobs.job import Job, start

__all__ = ['Job', 'start']
