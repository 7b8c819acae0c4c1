"""KITTI's 2D object detection (Geiger et al., CVPR 2012): ``training/{image_2,label_2}``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from uodb.layout import (
    Box,
    Converter,
    Item,
    Picture,
    Reading,
    add_split_arguments,
    find,
    label_space,
    read_lines,
    split_items,
)

#: The split of Chen et al. (3DOP, NIPS 2015), which keeps the frames of a drive together.
SIZES = {'train': 3712, 'test': 3769}
CLASSES = {'Car': 'car', 'Pedestrian': 'pedestrian', 'Cyclist': 'cyclist'}
#: KITTI's own scoring ignores what looks like a class without being one.
NEIGHBOURS = {'Van': 'car', 'Person_sitting': 'pedestrian'}


def read(args: argparse.Namespace) -> Reading:
    """Reads the training half; the labels of the testing half are not public."""
    labels = find(args.src, 'training/label_2', 'label_2')
    images = labels.with_name('image_2')
    items = [
        Item(path.stem, images / f'{path.stem}.png', path) for path in sorted(labels.glob('*.txt'))
    ]
    if not items:
        raise ValueError(f'{labels} has no label files')
    notes = []
    lists = [labels.parent.parent / f'ImageSets/{name}.txt' for name in ('train', 'val')]
    splits, rule, problems = split_items(
        args,
        items,
        lambda item: item.key,
        SIZES['test'] / sum(SIZES.values()),
        lists if all(path.is_file() for path in lists) else None,
    )
    if rule.startswith('random'):
        notes.append(
            'there is no ImageSets/{train,val}.txt, so the split is random: frames of one drive '
            'come into both halves, and scores will be too high'
        )
    return Reading(splits, _pictures, SIZES, rule, folders=[images], problems=problems, notes=notes)


def _pictures(item: Item) -> Iterator[Picture]:
    boxes = [box for line in read_lines(item.data) for box in parse_line(line, item.data)]
    yield Picture(item.source.name, boxes, item.source)


def parse_line(line: str, path: Path) -> list[Box]:
    """One line of a label file.

    ``DontCare`` regions are ignored for every class, ``Van`` for cars, ``Person_sitting`` for
    pedestrians.
    """
    words = line.split()
    try:
        xyxy = tuple(float(word) for word in words[4:8])
        kind, truncated, occluded = words[0], float(words[1]), int(words[2])
    except (IndexError, ValueError):
        raise ValueError(f'{path}: not a line of KITTI labels: {line!r}') from None
    if len(xyxy) != 4:
        raise ValueError(f'{path}: not a line of KITTI labels: {line!r}')
    if kind == 'DontCare':
        return [Box(name, xyxy, True, {'kitti': kind}) for name in label_space()['kitti']]
    name = CLASSES.get(kind) or NEIGHBOURS.get(kind) or kind
    extra = {'kitti': kind, 'truncated': truncated, 'occluded': occluded}
    return [Box(name, xyxy, kind in NEIGHBOURS, extra)]


CONVERTER = Converter(read, 'KITTI, the left colour images and labels', add_split_arguments)
