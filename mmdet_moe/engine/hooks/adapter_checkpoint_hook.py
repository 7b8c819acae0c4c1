from __future__ import annotations

from typing import Any

from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner

from mmdet_moe.models.adapter_files import load_base
from mmdet_moe.moe import adapter_checkpoint, adapter_layers, complete_adapter_checkpoint
from mmdet_moe.registry import HOOKS

from .unwrap import unwrapped_model


@HOOKS.register_module()
class AdapterCheckpointHook(Hook):
    """Checkpoints of a model with adapters that hold what trains, and not the pretrained model.

    What mmengine saves is then a few MB (and the optimiser's state of that), with a fingerprint of
    the rest. Such a file goes wherever a checkpoint goes (``load_from``, ``--resume``, the test
    tool): it is loaded onto the pretrained model, which comes from the config's ``init_cfg`` or
    from ``base``, and refused on another. Whole checkpoints load as ever.

    Args:
        base: Checkpoint of the pretrained model, where the config's ``init_cfg`` does not load it.

    Raises:
        ValueError: In a model without adapters, beside an ``EMAHook`` (whose average mmengine saves
            as a second whole model), or for adapters of another model.

    Example:
        >>> custom_hooks = [dict(type='AdapterCheckpointHook', base='work_dirs/clip/vit-b16.pth')]
    """

    # Before whoever keeps or reads the weights.
    priority = 'VERY_HIGH'

    def __init__(self, base: str | None = None) -> None:
        self.base = base

    def before_run(self, runner: Runner) -> None:
        """Refuse what cannot work."""
        if not adapter_layers(unwrapped_model(runner)):
            raise ValueError('AdapterCheckpointHook: the model has no adapters')
        if any(isinstance(hook, EMAHook) for hook in runner.hooks):
            raise ValueError(
                'AdapterCheckpointHook: an EMAHook saves a second whole model; leave one out'
            )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Take out what does not train."""
        checkpoint.update(adapter_checkpoint(unwrapped_model(runner)))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Make an adapters-only checkpoint whole before mmengine loads it."""
        if 'format' not in checkpoint:
            return
        model: Any = unwrapped_model(runner)
        if self.base is not None:
            load_base(model, self.base)
        elif not model.is_init:  # a test, for which mmengine does not look at init_cfg
            model.init_weights()
        checkpoint['state_dict'] = complete_adapter_checkpoint(model, checkpoint)
