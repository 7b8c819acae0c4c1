"""GMU Kitchen Scenes (Georgakis et al., 3DV 2016): ``gmu_scene_00N/{Images,Annotations}``."""

from __future__ import annotations

import argparse
from functools import partial

from uodb.layout import Converter, Item, Reading, add_split_arguments, label_space, split_items
from uodb.voc import VOCReader, xml_pictures

SCENES = 9


def read(args: argparse.Namespace) -> Reading:
    """Whole scenes for the test, as in the dataset's own protocol (six to train on, three to test).

    Which three the benchmark took was never published.
    """
    scenes = sorted(path for path in args.src.glob('gmu_scene_*') if path.is_dir())
    problems = []
    if len(scenes) != SCENES:
        problems.append(f'{len(scenes)} scenes (gmu_scene_*), the dataset has {SCENES}')
    items = []
    for scene in scenes:
        xmls = sorted((scene / 'Annotations').glob('*.xml'))
        for xml in xmls:
            name = f'{scene.name}/{xml.stem}'
            image = scene / f'Images/{xml.stem}.png'
            items.append(Item(name, image, f'{name}.png', xml))
    test = {f'gmu_scene_{number:03d}' for number in args.test_scenes}
    unknown = sorted(test - {scene.name for scene in scenes})
    if unknown and not args.split_file:
        raise ValueError(f'--test-scenes: {args.src} has no {", ".join(unknown)}')
    if args.split_file:
        splits, rule, unlisted = split_items(args, items, lambda item: item.key, 0)
        problems += unlisted
    else:
        splits = {'train': [], 'test': []}
        for item in items:
            splits['test' if item.key.split('/')[0] in test else 'train'].append(item)
        rule = f'test scenes {" ".join(sorted(test))}'
    reader = VOCReader(label_space()['kitchen'])
    folders = [scene / 'Images' for scene in scenes]
    return Reading(
        splits, partial(xml_pictures, reader), rule=rule, folders=folders, problems=problems
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_split_arguments(parser)
    parser.add_argument(
        '--test-scenes',
        nargs='+',
        type=int,
        default=[2, 4, 5],
        help='numbers of the scenes to test on (default: 2 4 5)',
    )


CONVERTER = Converter(read, 'GMU Kitchen Scenes', add_arguments)
