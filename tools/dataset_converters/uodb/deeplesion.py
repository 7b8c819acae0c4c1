"""DeepLesion (Yan et al., JMI 2018): ``DL_info.csv`` and ``Images_png``, CT slices of 16 bits."""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from uodb.layout import Box, Converter, Item, Picture, Reading, find, readable

SLICES = 32120
#: Lesions of the owner's training and validation (22919 + 4889), and test.
LESIONS = {'train': 27808, 'test': 4927}
#: ``Train_Val_Test`` of the table.
OWNERS_SPLITS = {'1': 'train', '2': 'train', '3': 'test'}
#: A pixel is the Hounsfield unit plus this.
OFFSET = 32768
COLUMNS = ('File_name', 'Bounding_boxes', 'Possibly_noisy', 'DICOM_windows', 'Train_Val_Test')


def read(args: argparse.Namespace) -> Reading:
    """The key slices; the owner's test to test on, training and validation to train on."""
    table = find(args.src, 'DL_info.csv')
    images = find(args.src, 'Images_png', 'images/Images_png')
    window = None if args.window == 'dicom' else tuple(float(value) for value in args.window)
    if window and not window[0] < window[1]:
        raise ValueError(f'--window: the lower value must be first, got {window[0]} {window[1]}')
    rows: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in _rows(table):
        rows[row['File_name']].append(row)
    splits: dict[str, list[Item]] = {'train': [], 'test': []}
    for name, of_slice in sorted(rows.items()):
        series, _, number = name.rpartition('_')
        try:
            split = OWNERS_SPLITS[of_slice[0]['Train_Val_Test'].strip()]
            boxes = [_box(row) for row in of_slice]
            limits = window or _numbers(of_slice[0]['DICOM_windows'], 2)
        except (KeyError, ValueError):
            raise ValueError(f'{table}: the row of {name!r} cannot be read') from None
        splits[split].append(Item(name, images / series / number, (boxes, limits)))
    problems = []
    for split, expected in LESIONS.items():
        found = sum(len(item.data[0]) for item in splits[split])
        if found != expected:
            problems.append(f'{split}: {found} lesions, the dataset has {expected}')
    render = partial(_pictures, neighbours=args.neighbours)
    return Reading(splits, render, {'all': SLICES}, folders=[images], problems=problems)


def _rows(table: Path) -> Iterator[dict[str, str]]:
    with open(table, newline='', encoding='utf-8-sig') as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        lacking = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if lacking:
            raise ValueError(f'{table} lacks the columns {", ".join(lacking)}')
        yield from reader


def _numbers(text: str, count: int) -> tuple[float, ...]:
    values = tuple(float(word) for word in text.split(','))
    if len(values) != count:
        raise ValueError(text)
    return values


def _box(row: dict[str, str]) -> Box:
    """A lesion; one that the owner suspects to be marked wrongly is ignored."""
    x1, y1, x2, y2 = _numbers(row['Bounding_boxes'], 4)
    noisy = int(float(row['Possibly_noisy']))
    return Box('lesion', (x1, y1, x2, y2), bool(noisy), {'possibly_noisy': noisy})


def window_slice(pixels: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """A slice of 16 bits as 8 bits.

    Args:
        pixels: Hounsfield units + 32768, shape (H, W).
        window: Hounsfield units that become 0 and 255; what is beyond is cut off.
    """
    low, high = window
    units = pixels.astype(np.float64) - OFFSET
    return np.rint(np.clip((units - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _load(path: Path) -> np.ndarray:
    with readable(path), Image.open(path) as image:
        pixels = np.asarray(image)
    if pixels.ndim != 2 or pixels.dtype.itemsize < 2:
        raise ValueError(f'{path} is not a PNG of 16 bits')
    return pixels


def _render(path: Path, window: tuple[float, float], neighbours: bool) -> Image.Image:
    if not neighbours:
        return Image.fromarray(window_slice(_load(path), window))
    number, digits = int(path.stem), len(path.stem)
    slices = [path.with_name(f'{number + step:0{digits}d}.png') for step in (-1, 0, 1)]
    slices = [found if found.is_file() else path for found in slices]
    return Image.fromarray(np.stack([window_slice(_load(s), window) for s in slices], axis=-1))


def _pictures(item: Item, neighbours: bool) -> Iterator[Picture]:
    boxes, window = item.data
    yield Picture(item.key, boxes, pixels=lambda: _render(item.source, window, neighbours))


class _Window(argparse.Action):
    """Two numbers, or the word ``dicom``."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        try:
            window = 'dicom' if values == ['dicom'] else [float(value) for value in values]
        except ValueError:
            window = []
        if window != 'dicom' and len(window) != 2:
            parser.error('--window takes two numbers or the word dicom')
        setattr(namespace, self.dest, window)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--window',
        nargs='+',
        action=_Window,
        default=[-1024.0, 3071.0],
        metavar='HU',
        help='Hounsfield units of black and white, or "dicom": the window that the radiologist '
        'looked through, from the table (default: -1024 3071)',
    )
    parser.add_argument(
        '--neighbours',
        action='store_true',
        help='the slice below, the key slice and the one above as red, green and blue; '
        'by default the key slice alone, grey',
    )


CONVERTER = Converter(read, 'DeepLesion, key slices', add_arguments)
