"""Fixtures for more than one folder of tests."""

import json
from pathlib import Path

import numpy as np
import pytest

# Three tiny domains. Category ids are neither contiguous nor in the label space's order, and
# 'cat' is a class of two domains, so that anything that goes by position goes wrong.
TINY_LABEL_SPACE = {
    'domains': {'ink': ['cat', 'dog', 'cow'], 'heat': ['car', 'cat'], 'blue': ['bolt']}
}
TINY_CATEGORIES = {
    'ink': [(7, 'dog'), (3, 'cow'), (5, 'cat')],
    'heat': [(2, 'cat'), (1, 'car')],
    'blue': [(1, 'bolt')],
}
TINY_SIZES = {'ink': (12, 4), 'heat': (5, 3), 'blue': (3, 2)}  # train, val


def write_tiny_domain(root: Path, name: str, split: str, size: int, seed: int = 0) -> None:
    """Write ``size`` images of 64 x 48 with up to three filled rectangles as COCO json."""
    import cv2

    rng = np.random.default_rng([seed, *name.encode(), *split.encode()])
    categories = TINY_CATEGORIES[name]
    images, annotations = [], []
    (root / name / split).mkdir(parents=True)
    for image_id in range(1, size + 1):
        picture = rng.integers(0, 60, (48, 64, 3), dtype=np.uint8)
        for _ in range(rng.integers(1, 4)):
            cat_id, _ = categories[rng.integers(len(categories))]
            x, y = rng.integers(0, 34), rng.integers(0, 22)
            w, h = rng.integers(12, 28), rng.integers(12, 24)
            colour = 90 + 20 * cat_id
            picture[y : y + h, x : x + w] = colour
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': image_id,
                    'category_id': cat_id,
                    'bbox': [int(v) for v in (x, y, w, h)],
                    'area': int(w * h),
                    'iscrowd': 0,
                }
            )
        file_name = f'{image_id}.png'
        cv2.imwrite(str(root / name / split / file_name), picture)
        images.append({'id': image_id, 'file_name': file_name, 'width': 64, 'height': 48})
    (root / name / f'{split}.json').write_text(
        json.dumps(
            {
                'images': images,
                'annotations': annotations,
                'categories': [{'id': cat_id, 'name': cat} for cat_id, cat in categories],
            }
        )
    )


@pytest.fixture(scope='session')
def tiny_domains(tmp_path_factory) -> Path:
    """The root of the three tiny domains, ``<root>/<domain>/{train,val}.json``."""
    root = tmp_path_factory.mktemp('tiny_domains')
    for name, sizes in TINY_SIZES.items():
        for split, size in zip(('train', 'val'), sizes, strict=True):
            write_tiny_domain(root, name, split, size)
    return root


@pytest.fixture(scope='session')
def tiny_label_space() -> dict:
    """The label space of the tiny domains, as a config."""
    return TINY_LABEL_SPACE


@pytest.fixture
def tiny_dataset(tiny_domains):
    """Config of a MultiDomainDataset over the tiny domains: ``tiny_dataset(split, **kwargs)``."""

    def config(split: str = 'train', **kwargs) -> dict:
        return {
            'type': 'MultiDomainDataset',
            'label_space': TINY_LABEL_SPACE,
            'domains': {
                name: {
                    'type': 'CocoDataset',
                    'data_root': f'{tiny_domains}/{name}/',
                    'ann_file': f'{split}.json',
                    'data_prefix': {'img': f'{split}/'},
                    'test_mode': split == 'val',
                    'serialize_data': False,  # spares a garbage collection for each
                }
                for name in TINY_SIZES
            },
            'pipeline': [
                {'type': 'LoadImageFromFile'},
                {'type': 'LoadAnnotations', 'with_bbox': True},
                {'type': 'Resize', 'scale': (64, 48), 'keep_ratio': True},
                {'type': 'PackDetInputs'},
            ],
            **kwargs,
        }

    return config


@pytest.fixture
def mmdet_moe_scope():
    """Registries look types up in ``mmdet_moe`` first, as under a Runner."""
    yield from _scope('mmdet_moe')


@pytest.fixture
def mmpretrain_scope():
    """Registries look types up in ``mmpretrain`` first, as under a Runner of classifiers."""
    from mmengine.logging import MMLogger

    MMLogger.get_current_instance().setLevel('WARNING')
    yield from _scope('mmpretrain')


def _scope(name):
    from mmengine.registry import DefaultScope, init_default_scope

    init_default_scope(name)
    yield
    DefaultScope._instance_dict.clear()
