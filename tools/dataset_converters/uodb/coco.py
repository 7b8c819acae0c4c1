"""COCO (Lin et al., ECCV 2014): 2014's valminusminival to train on, minival to test on.

Minival is 5,000 images of val2014 that Girshick chose; COCO made them its val2017 later, with the
same annotations. So their ids come from ``instances_val2017.json``, everything else from
``instances_val2014.json``. Images may be those of 2014 or of 2017.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uodb.layout import Box, Converter, Item, Picture, Reading, find

SIZES = {'train': 35504, 'test': 5000}


def read(args: argparse.Namespace) -> Reading:
    """``annotations/instances_val2014.json``, the ids of minival, and the images."""
    path = find(args.src, 'annotations/instances_val2014.json')
    content = _load(path, 'images', 'annotations', 'categories')
    names = {category['id']: category['name'] for category in content['categories']}
    boxes: dict[int, list[Box]] = defaultdict(list)
    for annotation in content['annotations']:
        x, y, w, h = annotation['bbox']
        # The area of the mask, not of the box: COCO's small, medium and large go by it.
        extra = {'area': annotation['area'], 'coco_id': annotation['id']}
        name = names[annotation['category_id']]
        boxes[annotation['image_id']].append(
            Box(name, (x, y, x + w, y + h), bool(annotation['iscrowd']), extra)
        )
    minival = minival_ids(args)
    items: dict[str, list[Item]] = {'train': [], 'test': []}
    for image in sorted(content['images'], key=lambda image: image['id']):
        number = image['id']
        source = _image(args.src, number)
        items['test' if number in minival else 'train'].append(
            Item(str(number), source, (number, boxes[number]))
        )
    unknown = minival - {image['id'] for image in content['images']}
    problems = []
    if unknown:
        problems.append(f'{len(unknown)} images of minival are not in {path}')
    return Reading(items, _pictures, SIZES, folders=[args.src / 'val2014'], problems=problems)


def minival_ids(args: argparse.Namespace) -> set[int]:
    """The ids of ``--minival`` or of the first file that has them."""
    path = args.minival or find(
        args.src,
        'annotations/instances_minival2014.json',
        'annotations/instances_val2017.json',
    )
    ids = [image['id'] for image in _load(path, 'images')['images']]
    twice = [number for number, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f'{path} lists {len(twice)} images twice, such as {twice[0]}')
    return set(ids)


def _load(path: Path, *parts: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f'cannot read {path}: {error}') from None
    lacking = [part for part in parts if not isinstance(content, dict) or part not in content]
    if lacking:
        raise ValueError(f'{path} is not a file of COCO annotations: it has no {lacking[0]}')
    return content


def _image(src: Path, number: int) -> Path:
    """Where an image is; the place in val2014 if it is nowhere."""
    old = src / f'val2014/COCO_val2014_{number:012d}.jpg'
    new = [src / f'{folder}/{number:012d}.jpg' for folder in ('val2017', 'train2017')]
    return next((path for path in (old, *new) if path.is_file()), old)


def _pictures(item: Item) -> Iterator[Picture]:
    number, boxes = item.data
    yield Picture(item.source.name, boxes, item.source, id=number)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--minival',
        type=Path,
        help='COCO json with the images of minival '
        '(default: annotations/instances_minival2014.json or instances_val2017.json)',
    )


CONVERTER = Converter(read, 'COCO 2014, valminusminival and minival', add_arguments)
