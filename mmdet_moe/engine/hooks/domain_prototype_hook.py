from __future__ import annotations

from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner

from mmdet_moe.engine.domain_prototypes import measure_prototypes, prototype_dataset
from mmdet_moe.registry import HOOKS

from .unwrap import unwrapped_model


@HOOKS.register_module()
class DomainPrototypeHook(Hook):
    """Measure the prototypes of ``domain_features`` once training is over, before the last
    checkpoint is written.

    They are measured on the training images through the test pipeline, see
    :func:`~mmdet_moe.engine.domain_prototypes.measure_prototypes`. With EMA they are measured of
    the averaged weights and of the others, each its own. A validation after the last step sees
    them; earlier ones do not, and need the domains told. A model without ``domain_features`` is
    left alone.

    Args:
        max_images: Images of each domain.
        batch_size: Images at once.
        seed: Of the choice of images.
    """

    # After the optimiser and EMA (NORMAL), before CheckpointHook (VERY_LOW).
    priority = 'LOW'

    def __init__(self, max_images: int = 200, batch_size: int = 8, seed: int = 0) -> None:
        self.options = {'max_images': max_images, 'batch_size': batch_size, 'seed': seed}

    def after_train_iter(self, runner: Runner, *args: object, **kwargs: object) -> None:
        """Measure after the last step."""
        if self.is_last_train_iter(runner):
            self._measure(runner)

    def _measure(self, runner: Runner) -> None:
        models = [unwrapped_model(runner)]
        models += [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
        if getattr(models[0], 'domain_features', None) is None:
            return
        dataset = prototype_dataset(runner.cfg)
        for model in models:
            images = measure_prototypes(model, dataset, **self.options)
        runner.logger.info(f'DomainPrototypeHook: prototypes of {images} images')
