"""Registries of mmdet-moe: children of mmdet's, scope ``mmdet_moe``.

With ``default_scope = 'mmdet_moe'`` in a config, a type is looked up here first, then in mmdet,
then in mmengine; nobody has to import modules by hand (``locations`` does). mmengine imports only
the locations of the registry it was asked through, not those of its parents, so mmdet's are listed
too; and it warns about every registry that has no child of the default scope, so each has one.

Under another default scope (mmpretrain's) ours are called ``mmdet_moe.<type>``. mmengine looks such
a scope up among the children of the root only, so each registry stands there too.
"""

from mmdet import registry as mmdet_registry
from mmengine import registry as mmengine_registry
from mmengine.registry import Registry

SCOPE = 'mmdet_moe'


def _child(name: str, location: str, ours: bool = True) -> Registry:
    # Not every mmdet line has a child registry of its own for everything (evaluators, for one).
    line = mmdet_registry if hasattr(mmdet_registry, name) else mmengine_registry
    parent = getattr(line, name)
    locations = [f'mmdet.{location}'] + ([f'mmdet_moe.{location}'] if ours else [])
    child = Registry(parent.name, parent=parent, scope=SCOPE, locations=locations)
    root = parent
    while root.parent is not None:
        root = root.parent
    root.children.setdefault(SCOPE, child)
    return child


MODELS = _child('MODELS', 'models')
TASK_UTILS = _child('TASK_UTILS', 'models')
DATASETS = _child('DATASETS', 'datasets')
DATA_SAMPLERS = _child('DATA_SAMPLERS', 'datasets')
TRANSFORMS = _child('TRANSFORMS', 'datasets')
METRICS = _child('METRICS', 'evaluation')
EVALUATOR = _child('EVALUATOR', 'evaluation')
HOOKS = _child('HOOKS', 'engine')
VISUALIZERS = _child('VISUALIZERS', 'visualization')

# Nothing of ours in these yet.
RUNNERS = _child('RUNNERS', 'engine', ours=False)
RUNNER_CONSTRUCTORS = _child('RUNNER_CONSTRUCTORS', 'engine', ours=False)
LOOPS = _child('LOOPS', 'engine', ours=False)
LOG_PROCESSORS = _child('LOG_PROCESSORS', 'engine', ours=False)
OPTIMIZERS = _child('OPTIMIZERS', 'engine', ours=False)
OPTIM_WRAPPERS = _child('OPTIM_WRAPPERS', 'engine', ours=False)
OPTIM_WRAPPER_CONSTRUCTORS = _child('OPTIM_WRAPPER_CONSTRUCTORS', 'engine', ours=False)
PARAM_SCHEDULERS = _child('PARAM_SCHEDULERS', 'engine', ours=False)
MODEL_WRAPPERS = _child('MODEL_WRAPPERS', 'models', ours=False)
WEIGHT_INITIALIZERS = _child('WEIGHT_INITIALIZERS', 'models', ours=False)
VISBACKENDS = _child('VISBACKENDS', 'visualization', ours=False)
