"""Registries of mmdet-moe: children of mmdet's, scope ``mmdet_moe``.

With ``default_scope = 'mmdet_moe'`` in a config, a type is looked up here first, then in mmdet,
then in mmengine; nobody has to import our modules by hand (``locations`` does).
"""

from mmdet.registry import DATA_SAMPLERS as MMDET_DATA_SAMPLERS
from mmdet.registry import DATASETS as MMDET_DATASETS
from mmdet.registry import HOOKS as MMDET_HOOKS
from mmdet.registry import METRICS as MMDET_METRICS
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.registry import TASK_UTILS as MMDET_TASK_UTILS
from mmdet.registry import TRANSFORMS as MMDET_TRANSFORMS
from mmdet.registry import VISUALIZERS as MMDET_VISUALIZERS
from mmengine.registry import EVALUATOR as MMENGINE_EVALUATOR
from mmengine.registry import Registry

SCOPE = 'mmdet_moe'


def _child(name: str, parent: Registry, location: str) -> Registry:
    return Registry(name, parent=parent, scope=SCOPE, locations=[f'mmdet_moe.{location}'])


MODELS = _child('model', MMDET_MODELS, 'models')
TASK_UTILS = _child('task util', MMDET_TASK_UTILS, 'models')
DATASETS = _child('dataset', MMDET_DATASETS, 'datasets')
DATA_SAMPLERS = _child('data sampler', MMDET_DATA_SAMPLERS, 'datasets')
TRANSFORMS = _child('transform', MMDET_TRANSFORMS, 'datasets')
METRICS = _child('metric', MMDET_METRICS, 'evaluation')
# mmdet has a child registry of its own for evaluators.
try:
    from mmdet.registry import EVALUATOR as MMDET_EVALUATOR
except ImportError:
    MMDET_EVALUATOR = MMENGINE_EVALUATOR
EVALUATOR = _child('evaluator', MMDET_EVALUATOR, 'evaluation')
HOOKS = _child('hook', MMDET_HOOKS, 'engine')
VISUALIZERS = _child('visualizer', MMDET_VISUALIZERS, 'visualization')
