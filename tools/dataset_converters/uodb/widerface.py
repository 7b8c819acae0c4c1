"""WIDER FACE (Yang et al., CVPR 2016): ``wider_face_split/wider_face_{train,val}_bbx_gt.txt``.

mmdet's ``WIDERFaceDataset`` reads a third party's xml of it; this reads the owner's text.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from uodb.layout import Box, Converter, Item, Picture, Reading, find, read_lines

SIZES = {'train': 12880, 'test': 3226}
ATTRIBUTES = ('blur', 'expression', 'illumination', 'invalid', 'occlusion', 'pose')


def read(args: argparse.Namespace) -> Reading:
    """Training and validation; the labels of the test half are not public."""
    lists = find(args.src, 'wider_face_split')
    splits, folders = {}, []
    for split, owners in (('train', 'train'), ('test', 'val')):
        images = args.src / f'WIDER_{owners}/images'
        path = lists / f'wider_face_{owners}_bbx_gt.txt'
        splits[split] = [
            Item(name, images / name, rows) for name, rows in parse_list(read_lines(path), path)
        ]
        folders += [images, *(item.source.parent for item in splits[split])]
    return Reading(splits, _pictures, SIZES, folders=folders)


def parse_list(lines: list[str], path: Path) -> Iterator[tuple[str, list[list[int]]]]:
    """The images of the owner's list, and the rows of numbers of each.

    An image without faces has the count 0 and, all the same, a row of zeros.
    """
    place = 0
    while place < len(lines):
        name = lines[place]
        try:
            count = int(lines[place + 1])
            rows = [
                [int(word) for word in line.split()]
                for line in lines[place + 2 : place + 2 + count]
            ]
        except (IndexError, ValueError):
            raise ValueError(f'{path}: no count or no boxes after {name!r}') from None
        if len(rows) != count or any(len(row) != 4 + len(ATTRIBUTES) for row in rows):
            raise ValueError(f'{path}: {name!r} should have {count} rows of ten numbers')
        place += 2 + count
        if count == 0 and place < len(lines) and not lines[place].endswith('.jpg'):
            place += 1
        yield name, rows


def _pictures(item: Item) -> Iterator[Picture]:
    boxes = []
    for x, y, w, h, *values in item.data:
        extra = dict(zip(ATTRIBUTES, values, strict=True))
        boxes.append(Box('face', (x, y, x + w, y + h), bool(extra['invalid']), extra))
    yield Picture(item.key, boxes, item.source)


CONVERTER = Converter(read, 'WIDER FACE, training and validation')
