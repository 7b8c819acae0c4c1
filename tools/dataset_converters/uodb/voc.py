"""Pascal VOC 07+12 (Everingham et al.), and the three art sets in its format (Inoue et al., 2018).

mmdet's ``VOCDataset`` reads the xml files.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mmdet.datasets import VOCDataset

from uodb.layout import Box, Converter, Item, Picture, Reading, find, label_space, read_lines

ART = {
    'comic': ('comic', {'train': 1000, 'test': 1000}),
    'clipart': ('clipart', {'train': 500, 'test': 500}),
    'watercolor': ('watercolor', {'train': 1000, 'test': 1000}),
}


class VOCReader(VOCDataset):
    """mmdet's reader of VOC's xml, one file at a time.

    Args:
        classes: Names to keep.
    """

    def __init__(self, classes: tuple[str, ...]) -> None:
        super().__init__(metainfo={'classes': classes}, lazy_init=True)
        self.cat2label = {name: label for label, name in enumerate(classes)}
        self.others: list[dict] = []

    def _parse_instance_info(self, raw_ann_info: Any, minus_one: bool = True) -> list[dict]:
        """mmdet's, which passes over other classes in silence: keep them, to be counted."""
        names = [obj.findtext('name') for obj in raw_ann_info.findall('object')]
        self.others = [name for name in names if name not in self.cat2label]
        return super()._parse_instance_info(raw_ann_info, minus_one)

    def boxes(self, xml: Path, image: Path) -> list[Box]:
        """The boxes of one file, ``difficult`` ones ignored.

        VOC counts pixels from 1 and includes the last; mmdet takes 1 off all four numbers. The last
        pixel is put back, so that a box's width is that which VOC's own scoring works with.
        """
        info = {'img_id': xml.stem, 'file_name': str(image), 'xml_path': str(xml)}
        try:
            instances = self.parse_data_info(info)['instances']
        except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f'{xml} is not an annotation of VOC: {error}') from None
        classes = self.metainfo['classes']
        boxes = []
        for instance in instances:
            x1, y1, x2, y2 = instance['bbox']
            difficult = instance['ignore_flag']
            name = classes[instance['bbox_label']]
            xyxy = (x1, y1, x2 + 1, y2 + 1)
            boxes.append(Box(name, xyxy, bool(difficult), {'difficult': difficult}))
        return boxes + [Box(str(name), (0, 0, 1, 1)) for name in self.others]


def xml_pictures(reader: VOCReader, item: Item) -> Iterator[Picture]:
    """``item.data``: the image's name in the result."""
    assert item.annotation is not None, 'listed with its xml'
    yield Picture(item.data, reader.boxes(item.annotation, item.source), item.source)


def listed(root: Path, subset: str) -> list[Item]:
    """The images of ``root/ImageSets/Main/<subset>.txt``."""
    return [
        Item(
            f'{root.name}/{name}',
            root / f'JPEGImages/{name}.jpg',
            f'{name}.jpg',
            root / f'Annotations/{name}.xml',
        )
        for name in read_lines(root / f'ImageSets/Main/{subset}.txt')
    ]


def in_lists(root: Path) -> Iterator[Path]:
    """The images of all lists of ``root/ImageSets``, those of other tasks too."""
    names = {
        line.split()[0]
        for path in (root / 'ImageSets').glob('*/[!.]*.txt')
        for line in read_lines(path)
    }
    return (root / f'JPEGImages/{name}.jpg' for name in names)


def read_voc(args: argparse.Namespace) -> Reading:
    """``VOC2007`` and ``VOC2012``: both trainval for training, 2007's test."""
    voc07 = find(args.src, 'VOC2007', 'VOCdevkit/VOC2007')
    voc12 = find(args.src, 'VOC2012', 'VOCdevkit/VOC2012')
    splits = {
        'train': listed(voc07, 'trainval') + listed(voc12, 'trainval'),
        'test': listed(voc07, 'test'),
    }
    reader = VOCReader(label_space()['voc'])
    expected = {'train': 5011 + 11540, 'test': 4952}
    return _reading(splits, reader, expected, voc07, voc12)


def read_art(args: argparse.Namespace) -> Reading:
    """One of ``comic``, ``clipart`` and ``watercolor``; the folder, or the one it is in."""
    folder, expected = ART[args.domain]
    lists = find(args.src, f'{folder}/ImageSets/Main', 'ImageSets/Main')
    root = lists.parent.parent
    reader = VOCReader(label_space()[args.domain])
    splits = {split: listed(root, split) for split in ('train', 'test')}
    return _reading(splits, reader, expected, root)


def _reading(
    splits: dict[str, list[Item]], reader: VOCReader, expected: dict[str, int], *roots: Path
) -> Reading:
    return Reading(
        splits,
        partial(xml_pictures, reader),
        expected,
        folders=[root / 'JPEGImages' for root in roots],
        others=[path for root in roots for path in in_lists(root)],
    )


VOC = Converter(read_voc, 'Pascal VOC 2007 and 2012 (VOCdevkit)')
COMIC = Converter(read_art, 'Comic2k')
CLIPART = Converter(read_art, 'Clipart1k')
WATERCOLOR = Converter(read_art, 'Watercolor2k')
