"""Files of weights for models with adapters: read, written, and put on their pretrained model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader
from torch import nn

from mmdet_moe.moe import adapter_layers, complete_adapter_checkpoint
from mmdet_moe.registry import MODELS

from .checkpoint import checkpoint_classes, checkpoint_weights, fit_checkpoint


def read_tensors(path: str | os.PathLike) -> dict[str, Any]:
    """The content of a ``.safetensors`` file, or of one that holds nothing but tensors.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds other objects, which are not loaded, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'no file at {path}')
    try:
        if path.suffix == '.safetensors':
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        raise ValueError(
            f'{path} cannot be read as plain tensors: {type(error).__name__}'
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f'{path} holds a {type(content).__name__}, a dict of tensors is needed')
    return dict(content)


def load_base(model: nn.Module, base: str) -> None:
    """Load an ordinary checkpoint of the pretrained model into a model with adapters.

    Raises:
        CheckpointError: It does not fit.
    """
    loaded = CheckpointLoader.load_checkpoint(base, map_location='cpu')
    weights, _ = fit_checkpoint(model, checkpoint_weights(loaded), checkpoint_classes(loaded))
    model.load_state_dict(weights, strict=False)


def model_with_adapters(config: str, checkpoint: str, base: str | None = None) -> nn.Module:
    """The model of a config with the weights of a checkpoint, whole or of adapters alone.

    Args:
        config: Path of the config.
        checkpoint: Path of what was trained with it.
        base: Checkpoint of the pretrained model, for adapters alone; None: what the config's
            ``init_cfg`` loads.

    Raises:
        ValueError: The model has no adapters, or the checkpoint is not its own.
    """
    cfg = Config.fromfile(config)
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(cfg.model)
    if not adapter_layers(model):
        raise ValueError(f'the model of {config} has no adapters')
    content = CheckpointLoader.load_checkpoint(str(checkpoint), map_location='cpu')
    weights = checkpoint_weights(content)
    if 'format' in content:
        model.init_weights()
        if base is not None:
            load_base(model, base)
        weights = complete_adapter_checkpoint(model, content)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f'{checkpoint} is no checkpoint of {config}: {error}') from None
    return model.eval()
