from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import CheckpointLoader, Runner

from mmdet_moe.models.checkpoint import (
    checkpoint_classes,
    checkpoint_domains,
    checkpoint_weights,
    copy_class_rows,
    fit_checkpoint,
)
from mmdet_moe.moe import upcycle_from_checkpoints
from mmdet_moe.registry import HOOKS

from .unwrap import unwrapped_model


@HOOKS.register_module()
class UpcycleHook(Hook):
    """Make ``load_from`` work with ordinary mmdet checkpoints, and experts start from several.

    * ``load_from`` with a dense checkpoint: dense modules become experts, class rows go by name,
      what is re-initialised is listed in the log, and any other shape mismatch is an error.
    * ``experts``: each expert starts from the checkpoint of a model trained on its own dataset.

    Resuming is left alone: such a checkpoint is this model's own.

    Args:
        experts: Checkpoints of *dense* models by dataset, or by expert, of the plan. They are
            loaded into the experts after ``load_from``; everything outside of MoE layers stays
            as it was, but for the rows of a dataset's own classes.
        average: Let an expert that serves several of these datasets start from their mean.

    Example:
        >>> custom_hooks = [dict(type='UpcycleHook', experts=dict(
        ...     bccd='work_dirs/single/bccd/iter_300.pth',
        ...     cheetah='work_dirs/single/cheetah/iter_300.pth'))]
    """

    # Before EMAHook (NORMAL), which loads the same checkpoint into its copy.
    priority = 'VERY_HIGH'

    def __init__(self, experts: Mapping[str, str] | None = None, average: bool = False) -> None:
        self.experts = dict(experts or {})
        self.average = average

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Fit a checkpoint to the model before mmengine loads it."""
        if runner._resume:
            return
        weights = checkpoint_weights(checkpoint)
        classes, domains = checkpoint_classes(checkpoint), checkpoint_domains(checkpoint)
        fitted, report = fit_checkpoint(unwrapped_model(runner), weights, classes, domains)
        if weights is checkpoint:
            checkpoint.clear()
            checkpoint.update(fitted)
        else:
            checkpoint['state_dict'] = fitted
        for line in report.lines():
            runner.logger.info(f'UpcycleHook: {line}')
        if report.reinitialised:
            runner.logger.warning(
                f'UpcycleHook: the checkpoint has no rows for {len(report.reinitialised)} of '
                f'{len(unwrapped_model(runner).label_space.classes)} classes; untrained: '
                f'{report.reinitialised}'
            )

    def before_train(self, runner: Runner) -> None:
        """Load the experts' own checkpoints, unless this run is resumed."""
        # `--resume` where there is nothing to resume from yet is a first start.
        if not self.experts or (runner._resume and runner.iter > 0):
            return
        model = unwrapped_model(runner)
        space = getattr(model, 'label_space', None)
        states: dict[str, Any] = {}
        rows: list[tuple] = []
        for key, path in self.experts.items():
            checkpoint = CheckpointLoader.load_checkpoint(str(path), map_location='cpu')
            weights, classes = checkpoint_weights(checkpoint), checkpoint_classes(checkpoint)
            states[key], _ = fit_checkpoint(model, weights, classes)
            if space is not None and key in space.domains and classes is not None:
                names = [space.unified_name(key, name) for name in space.local_classes(key)]
                rows.append((weights, classes, names))
        report = upcycle_from_checkpoints(model, states, average=self.average)
        # After the experts: where several checkpoints are averaged, each has rows of its own.
        for weights, classes, names in rows:
            copy_class_rows(model, weights, classes, names)
        sources = next(iter(report.values()), {})
        for expert, keys in sources.items():
            runner.logger.info(
                f'UpcycleHook: expert {expert} of {len(report)} layers starts from {keys}'
            )
