"""Measure where the domains lie among a detector's own features."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from torch import nn

from mmdet_moe.planning.affinity import dataset_prototypes
from mmdet_moe.registry import DATASETS


def prototype_dataset(cfg: Mapping[str, Any]) -> Any:
    """The training images of a config, through its test pipeline: what test images are like, but
    not test images.

    Raises:
        ValueError: The config has no multi-domain data.
    """
    train, test = (_multi_domain(cfg, f'{split}_dataloader') for split in ('train', 'test'))
    keys = ('pipeline', 'domain_pipelines')
    rest = {key: value for key, value in train.items() if key not in keys}
    # Some domains of the training data may have no test set, and others no training set.
    pipelines = test.get('domain_pipelines') or {}
    chosen = {name: value for name, value in pipelines.items() if name in train['domains']}
    return DATASETS.build(
        {
            **rest,
            'pipeline': test['pipeline'],
            'domain_pipelines': chosen,
            'test_mode': True,
        }
    )


def _multi_domain(cfg: Mapping[str, Any], loader: str) -> Mapping[str, Any]:
    dataset = (cfg.get(loader) or {}).get('dataset') or {}
    while 'domains' not in dataset and 'dataset' in dataset:
        dataset = dataset['dataset']
    if 'domains' not in dataset:
        raise ValueError(
            f"the config's {loader}.dataset is no MultiDomainDataset: no domains to measure"
        )
    return dataset


@torch.no_grad()
def measure_prototypes(
    model: nn.Module, dataset: Any, max_images: int = 200, batch_size: int = 8, seed: int = 0
) -> dict[str, int]:
    """Write the domains' prototypes into ``model.domain_features``.

    The prototypes and their concentration are those that a plan would have
    (:func:`mmdet_moe.planning.affinity.dataset_prototypes`), of features instead of embeddings. The
    forward ends behind the feature layer. Every process measures the same images, so that all have
    the same prototypes.

    Args:
        model: A model of :class:`~mmdet_moe.models.moe_mixin.MoEMixin` with ``domain_features``.
        dataset: A ``MultiDomainDataset``, see :func:`prototype_dataset`.
        max_images: Images taken of each domain, drawn by the seed and the domain's name.
        batch_size: Images at once.
        seed: Of the draw.

    Returns:
        Domain -> number of images.
    """
    if getattr(model, 'domain_features', None) is None:
        raise ValueError('the model has no domain_features to measure prototypes of')
    training = model.training
    model.eval()
    found, start = {}, 0
    try:
        for name, size in dataset.domain_sizes.items():
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            chosen = start + np.sort(rng.permutation(size)[:max_images])
            start += size
            rows = []
            for first in range(0, len(chosen), batch_size):
                items = [dataset[int(index)] for index in chosen[first : first + batch_size]]
                data = model.data_preprocessor(pseudo_collate(items), False)
                rows.append(model.pooled_features(data['inputs'], data['data_samples']).cpu())
            if rows:
                found[name] = torch.cat(rows).numpy()
    finally:
        model.train(training)
    model.domain_features.set_prototypes(dataset_prototypes(found, {}))
    return {name: len(rows) for name, rows in found.items()}
