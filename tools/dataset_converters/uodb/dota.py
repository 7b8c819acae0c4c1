"""DOTA-v1.0 (Xia et al., CVPR 2018): ``{train,val}/{images,labelTxt}``, cut into tiles."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

from PIL import Image

from uodb.layout import (
    Box,
    Converter,
    Item,
    Picture,
    Reading,
    find,
    fit,
    label_space,
    read_header,
    read_lines,
    readable,
)

SIZES = {'train': 1411, 'test': 458}


def read(args: argparse.Namespace) -> Reading:
    """Training and validation; the labels of the test half are not public."""
    if not 0 <= args.overlap < args.tile:
        raise ValueError(f'--overlap must be in [0, {args.tile}), got {args.overlap}')
    if not 0 < args.min_share <= 1:
        raise ValueError(f'--min-share must be in (0, 1], got {args.min_share}')
    Image.MAX_IMAGE_PIXELS = None  # some are larger than PIL takes for granted
    splits, folders = {}, []
    for split, owners in (('train', 'train'), ('test', 'val')):
        labels = find(
            args.src,
            f'{owners}/labelTxt',
            f'{owners}/labelTxt-v1.0/labelTxt',
            f'{owners}/labelTxt-v1.0',
        )
        images = find(args.src, f'{owners}/images')
        splits[split] = [
            Item(path.stem, images / f'{path.stem}.png', path)
            for path in sorted(labels.glob('*.txt'))
        ]
        folders.append(images)
    cut = partial(_pictures, tile=args.tile, overlap=args.overlap, min_share=args.min_share)
    return Reading(splits, cut, SIZES, folders=folders)


def parse_label(path: Path) -> list[Box]:
    """The upright boxes around the quadrilaterals of a label file.

    Lines ``imagesource:...`` and ``gsd:...`` stand first; objects marked difficult are ignored, as
    DOTA's own scoring does.
    """
    boxes = []
    for line in read_lines(path):
        if line.startswith(('imagesource', 'gsd')):
            continue
        words = line.split()
        try:
            corners = [float(word) for word in words[:8]]
            name, difficult = words[8], int(words[9]) if len(words) > 9 else 0
        except (IndexError, ValueError):
            raise ValueError(f'{path}: not a line of DOTA labels: {line!r}') from None
        xs, ys = corners[::2], corners[1::2]
        extra = {'difficult': difficult}
        boxes.append(Box(name, (min(xs), min(ys), max(xs), max(ys)), bool(difficult), extra))
    return boxes


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles along one side begin: the last ends with the image."""
    last = max(length - tile, 0)
    return [*range(0, last, tile - overlap), last]


def cut_boxes(boxes: list[Box], tile: tuple[int, int, int, int], min_share: float) -> list[Box]:
    """The boxes of one tile, in its coordinates.

    One of which less than ``min_share`` of the area is in the tile is ignored there: it is too
    little to ask for, but finding it is no mistake. Slivers of less than 1 px are left out.

    Args:
        boxes: Of the whole image, and within it.
        tile: Left, top, right, bottom.
        min_share: Between 0 and 1.
    """
    left, top, right, bottom = tile
    found = []
    for box in boxes:
        x1, y1, x2, y2 = box.xyxy
        area = (x2 - x1) * (y2 - y1)
        part = (max(x1, left), max(y1, top), min(x2, right), min(y2, bottom))
        width, height = part[2] - part[0], part[3] - part[1]
        if width < 1 or height < 1:
            continue
        share = round(width * height / area, 3)
        xyxy = (part[0] - left, part[1] - top, part[2] - left, part[3] - top)
        extra = {**box.extra, 'share': share}
        found.append(Box(box.name, xyxy, box.ignore or share < min_share, extra))
    return found


@lru_cache(maxsize=1)
def _open(path: Path) -> Image.Image:
    with readable(path), Image.open(path) as image:
        return image.convert('RGB')


def _crop(path: Path, place: tuple[int, int, int, int]) -> Image.Image:
    return _open(path).crop(place)


def _pictures(item: Item, tile: int, overlap: int, min_share: float) -> Iterator[Picture]:
    width, height = read_header(item.source).size
    # An object is clipped to the image or left out, and counted, once; then come the tiles.
    boxes = []
    changed: Counter[str] = Counter()
    for box in parse_label(item.data):
        bbox, reason = fit(box, width, height, label_space()['dota'])
        if reason is not None:
            changed[reason] += 1
        if bbox is not None:
            x, y, w, h = bbox
            boxes.append(replace(box, xyxy=(x, y, x + w, y + h)))
    for top in starts(height, tile, overlap):
        for left in starts(width, tile, overlap):
            place = (left, top, min(left + tile, width), min(top + tile, height))
            yield Picture(
                f'{item.key}_{left}_{top}.png',
                cut_boxes(boxes, place, min_share),
                pixels=partial(_crop, item.source, place),
                changed=changed,
            )
            changed = Counter()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--tile', type=int, default=1024, help='side of a tile, px (default: 1024)')
    parser.add_argument('--overlap', type=int, default=200, help='of two tiles, px (default: 200)')
    parser.add_argument(
        '--min-share',
        type=float,
        default=0.7,
        help='an object with less of its area in the tile is ignored there (default: 0.7)',
    )


CONVERTER = Converter(read, 'DOTA-v1.0, upright boxes, in tiles', add_arguments)
