"""LISA Traffic Signs (Møgelmose et al., 2012): ``allAnnotations.csv`` and folders of frames."""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
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
    read_lines,
    split_items,
)

FRAMES, ANNOTATIONS = 6610, 7855
TEST_SHARE = 0.2
CORNERS = (
    'Upper left corner X',
    'Upper left corner Y',
    'Lower right corner X',
    'Lower right corner Y',
)
FLAGS = 'Occluded,On another road'  # one column, values such as 0,1
#: The owner's tags of each superclass. Which the benchmark took was never published; this goes by
#: the names, and by MUTCD, where all yellow diamonds and advisory plates are warnings.
SUPERCLASSES = {
    'stop': ('stop',),
    'speedLimit': (
        *(f'speedLimit{miles}' for miles in (15, 25, 30, 35, 40, 45, 50, 55, 65, 'Urdbl')),
        'schoolSpeedLimit25',
        'truckSpeedLimit55',
    ),
    'noTurn': ('noLeftTurn', 'noRightTurn'),
    'warning': (
        *('addedLane', 'curveLeft', 'curveRight', 'dip', 'intersection', 'laneEnds', 'merge'),
        *('pedestrianCrossing', 'roundabout', 'school', 'signalAhead', 'slow', 'stopAhead'),
        *('thruMergeLeft', 'thruMergeRight', 'thruTrafficMergeLeft', 'turnLeft', 'turnRight'),
        *('yieldAhead', 'zoneAhead25', 'zoneAhead45'),
        *(f'rampSpeedAdvisory{miles}' for miles in (20, 35, 40, 45, 50, 'Urdbl')),
    ),
}


def read(args: argparse.Namespace) -> Reading:
    """All annotated frames, split by track: a sign is never in both halves."""
    table = find(args.src, 'allAnnotations.csv')
    superclass = superclasses(args.superclasses)
    frames: dict[str, list[Box]] = defaultdict(list)
    tracks: dict[str, str] = {}
    rows = 0
    for row in _rows(table):
        name = row['Filename'].strip()
        tag = row['Annotation tag'].strip()
        try:
            xyxy = tuple(float(row[corner]) for corner in CORNERS)
            occluded, elsewhere = (int(flag) for flag in (row.get(FLAGS) or '0,0').split(','))
        except (TypeError, ValueError):
            raise ValueError(f'{table}: a row of {name!r} cannot be read') from None
        extra = {'tag': tag, 'occluded': occluded, 'on_another_road': elsewhere}
        frames[name].append(Box(superclass.get(tag, tag), xyxy, extra=extra))
        tracks.setdefault(name, f'{row["Origin file"]}/{row["Origin track"]}')
        rows += 1
    items = [Item(name, args.src / name, boxes) for name, boxes in sorted(frames.items())]
    splits, rule, problems = split_items(args, items, lambda item: tracks[item.key], TEST_SHARE)
    if rows != ANNOTATIONS:
        problems.append(f'{table} has {rows} annotations, the dataset has {ANNOTATIONS}')
    folders = {item.source.parent for item in items}
    return Reading(splits, _pictures, {'all': FRAMES}, rule, folders=folders, problems=problems)


def _rows(table: Path) -> Iterator[dict[str, str]]:
    with open(table, newline='', encoding='utf-8-sig') as file:
        reader = csv.DictReader(file, delimiter=';')
        needed = ('Filename', 'Annotation tag', *CORNERS, 'Origin file', 'Origin track')
        lacking = [name for name in needed if name not in (reader.fieldnames or ())]
        if lacking:
            raise ValueError(f'{table} lacks the columns {", ".join(lacking)}')
        yield from reader


def superclasses(path: Path | None) -> dict[str, str]:
    """Tag -> superclass: ours, or that of a file with lines ``superclass: tag, tag``."""
    table = dict(SUPERCLASSES)
    if path is not None:
        pairs = [line.partition(':') for line in read_lines(path)]
        if not pairs or not all(colon for _, colon, _ in pairs):
            raise ValueError(f'{path}: lines must read "superclass: tag, tag"')
        table = {name.strip(): tuple(t.strip() for t in tags.split(',')) for name, _, tags in pairs}
    return {tag: name for name, tags in table.items() for tag in tags if tag}


def _pictures(item: Item) -> Iterator[Picture]:
    yield Picture(item.key, item.data, item.source)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_split_arguments(parser)
    parser.add_argument(
        '--superclasses', type=Path, help='file with lines "superclass: tag, tag" (see lisa.py)'
    )


CONVERTER = Converter(read, 'LISA Traffic Signs, four superclasses', add_arguments)
