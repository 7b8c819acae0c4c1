"""Readers of the data sets that are not folders of domains: WILDS and the two made of digits.

A reader takes the data set's folder, its catalogue entry and its name, and returns the classes'
names and a list of data infos in a fixed order, with ``domain``, ``gt_label`` and either
``img_path`` or ``img``, an array (H, W, 3) of uint8.
"""

from __future__ import annotations

import csv
import gzip
import struct
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from mmdet_moe.datasets.dg_catalog import DGInfo

Read = tuple[tuple[str, ...], list[dict[str, Any]]]


class MissingData(ValueError):
    """A file of a data set is not where it should be."""


def _columns(path: Path, names: Sequence[str]) -> list[tuple[str, ...]]:
    """These columns of a table, and no other: they have half a million rows."""
    if not path.is_file():
        raise MissingData(f'{path} is not there')
    with path.open(newline='', encoding='utf-8') as file:
        reader = csv.reader(file)
        head = next(reader, [])
        for name in names:
            if name not in head:
                raise MissingData(f'{path} has no column {name!r}')
        take = itemgetter(*map(head.index, names))
        return list(zip(*map(take, filter(None, reader)), strict=True)) or [()] * len(names)


def camelyon17(root: Path, info: DGInfo, _: str) -> Read:
    """``metadata.csv`` of WILDS 1.0: the domain is the hospital (column ``center``)."""
    path = root / 'metadata.csv'
    columns = _columns(path, ('patient', 'node', 'x_coord', 'y_coord', 'tumor', 'center'))
    found = []
    for patient, node, x, y, tumor, center in zip(*columns, strict=True):
        stem = f'patient_{int(patient):03d}_node_{int(node)}'
        found.append(
            dict(
                img_path=str(root / 'patches' / stem / f'patch_{stem}_x_{x}_y_{y}.png'),
                gt_label=int(tumor),
                domain=f'hospital_{int(center)}',
            )
        )
    assert info.classes is not None
    return info.classes, found


def fmow(root: Path, info: DGInfo, _: str) -> Read:
    """``rgb_metadata.csv`` of WILDS 1.1: the domain is the continent of the country.

    Row i is ``images/rgb_img_<i>.png``. Rows of the split ``seq`` belong to another task. Countries
    that ``country_code_mapping.csv`` does not know are of the region ``Other``.
    """
    path, mapping = root / 'rgb_metadata.csv', root / 'country_code_mapping.csv'
    columns = _columns(path, ('split', 'category', 'country_code'))
    regions = dict(zip(*_columns(mapping, ('alpha-3', 'region')), strict=True))
    classes = tuple(sorted(set(columns[1])))
    found = []
    for i, (split, category, country) in enumerate(zip(*columns, strict=True)):
        if split != 'seq':
            region = regions.get(country, 'Other')
            found.append(
                dict(
                    img_path=str(root / 'images' / f'rgb_img_{i}.png'),
                    gt_label=classes.index(category),
                    domain=region if region in info.domains else 'Other',
                )
            )
    return classes, found


def rotated(root: Path, info: DGInfo, name: str) -> Read:
    """Rotated MNIST: every n-th image of a fixed shuffling, turned by the domain's angle."""
    import mmcv

    images, labels = _digits(root, name)
    found = []
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        domain = info.domains[i % len(info.domains)]
        turned = mmcv.imrotate(image, -float(domain), interpolation='bicubic')
        found.append(dict(img=_rgb(turned), gt_label=int(label), domain=domain))
    assert info.classes is not None
    return info.classes, found


def colored(root: Path, info: DGInfo, name: str) -> Read:
    """Colored MNIST (Arjovsky et al., arXiv 1907.02893): colour goes with the label.

    The label is whether the digit is below 5, false in a quarter of the images. The colour, red or
    green, is the label's, but for 10 %, 20 % and 90 % of the images of the three domains.
    """
    images, labels = _digits(root, name)
    rng = np.random.default_rng(1)
    flips = dict(zip(info.domains, (0.1, 0.2, 0.9), strict=True))
    found = []
    for i, (image, digit) in enumerate(zip(images, labels, strict=True)):
        domain = info.domains[i % len(info.domains)]
        label = int(digit < 5) ^ int(rng.random() < 0.25)
        channel = label ^ int(rng.random() < flips[domain])
        picture = np.zeros((*image.shape, 3), np.uint8)
        picture[..., channel + 1] = image  # BGR: green for 0, red for 1
        found.append(dict(img=picture, gt_label=label, domain=domain))
    assert info.classes is not None
    return info.classes, found


READERS: dict[str, Callable[[Path, DGInfo, str], Read]] = {
    'camelyon17': camelyon17,
    'fmow': fmow,
    'rotated': rotated,
    'colored': colored,
}


def _rgb(image: np.ndarray) -> np.ndarray:
    return np.repeat(image[..., None], 3, axis=2)


def _digits(root: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """All images (N, H, W) uint8 and digits (N,), in one fixed shuffling."""
    if name.endswith('Digits'):
        from sklearn.datasets import load_digits

        data = load_digits()
        images = np.round(data.images * (255 / 16)).astype(np.uint8)
        labels = data.target
    else:
        images = np.concatenate([_idx(root, f'{part}-images-idx3-ubyte') for part in _PARTS])
        labels = np.concatenate([_idx(root, f'{part}-labels-idx1-ubyte') for part in _PARTS])
    order = np.random.default_rng(0).permutation(len(images))
    return images[order], labels[order]


_PARTS = ('train', 't10k')


def _idx(root: Path, name: str) -> np.ndarray:
    """An idx file of unsigned bytes, plain or gzipped, where torchvision leaves it."""
    for path in (root / 'raw' / name, root / name):
        for file, opener in ((path, open), (path.with_name(f'{name}.gz'), gzip.open)):
            if file.is_file():
                with opener(file, 'rb') as stream:
                    content = stream.read()
                if content[:3] != b'\x00\x00\x08':
                    raise MissingData(f'{file} is not an idx file of bytes')
                shape = struct.unpack(f'>{content[3]}I', content[4 : 4 + 4 * content[3]])
                return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)
    raise MissingData(f'{root}/raw/{name} (or .gz) is not there')
