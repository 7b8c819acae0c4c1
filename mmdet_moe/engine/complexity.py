"""How large a model is, and how much of it one image takes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from mmdet.structures import DetDataSample
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from torch import nn

from mmdet_moe.moe import MoELayer
from mmdet_moe.moe.state import stat_key
from mmdet_moe.registry import MODELS


@dataclass
class Complexity:
    """Size and cost of a model.

    Attributes:
        parameters: All parameters.
        active_parameters: Those that an item takes: everything but the experts it is not sent to,
            on average over the domains.
        flops: Multiply-adds of one image without pre- and post-processing, as mmengine counts
            them, on average over the domains.
        shape: The image's (height, width).
    """

    parameters: int
    active_parameters: float
    flops: float
    shape: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def complexity(cfg: Config, shape: Sequence[int] | None = None) -> Complexity:
    """Build the model of a config and measure it.

    Args:
        cfg: A config with a ``model``; a MoE model's plan must exist.
        shape: Height and width; by default what the test pipeline resizes to, filled up to a
            multiple of 32.
    """
    init_default_scope(cfg.get('default_scope', 'mmdet_moe'))
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    height, width = test_shape(cfg) if shape is None else (int(side) for side in shape)
    label_space = getattr(model, 'label_space', None)
    domains = [None] if label_space is None else list(label_space.domains)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    active, flops = [], []
    for domain in domains:
        idle, count = _one_image(model, domain, (height, width))
        active.append(parameters - idle)
        flops.append(count)
    return Complexity(
        parameters=parameters,
        active_parameters=sum(active) / len(active),
        flops=sum(flops) / len(flops),
        shape=(height, width),
    )


def test_shape(cfg: Config) -> tuple[int, int]:
    """Height and width of what the test pipeline gives an image of the same proportions.

    Raises:
        ValueError: The pipeline has no ``Resize`` with a ``scale``.
    """
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    for transform in dataset.get('pipeline') or ():
        if transform['type'] == 'Resize' and isinstance(transform.get('scale'), (list, tuple)):
            long, short = max(transform['scale']), min(transform['scale'])
            return (-(-short // 32) * 32, -(-long // 32) * 32)
    raise ValueError('the test pipeline has no Resize with a scale; give the shape')


test_shape.__test__ = False  # not one of pytest's


def _one_image(model: nn.Module, domain: str | None, shape: tuple[int, int]) -> tuple[float, float]:
    """Parameters that an item of ``domain`` leaves idle, and the image's multiply-adds."""
    meta = dict(
        img_id=0,
        ori_shape=shape,
        img_shape=shape,
        pad_shape=shape,
        batch_input_shape=shape,
        scale_factor=(1.0, 1.0),
    )
    if domain is not None:
        meta['domain'] = domain
    device = next(model.parameters()).device
    # Noise, and not zeros: what a learned router makes of equal tokens is no mean of anything.
    image = torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    forward = model.forward
    model.forward = partial(forward, data_samples=[DetDataSample(metainfo=meta)], mode='tensor')
    try:
        with torch.no_grad(), _quiet():
            count = FlopAnalyzer(model, (image,)).total()
    finally:
        del model.forward
    return _idle_parameters(model), float(count)


def _idle_parameters(model: nn.Module) -> float:
    """Parameters of the experts that an item is not sent to, on average over the items of the last
    forward: the free experts of MoE++ too, shared experts never."""
    idle = 0.0
    for name, layer in _moe_layers(model):
        stats = layer.state.stats()
        if not layer.router.selects or stat_key(name, 'items') not in stats:
            continue
        items = float(stats[stat_key(name, 'items')])
        counts = stats[stat_key(name, 'count')].tolist()
        experts = [*layer.experts, *layer.router.extra_experts]
        for expert, count in zip(experts, counts, strict=True):
            size = sum(parameter.numel() for parameter in expert.parameters())
            idle += size * (1 - count / max(items, 1.0))
    return idle


def _moe_layers(model: nn.Module) -> Iterator[tuple[str, MoELayer]]:
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, MoELayer))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the analyser's list of the operators that it takes to be free."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
