"""What every converter of UODB shares: boxes, splits, and how a domain is written to disk.

A converter (``kitti.py``, ``voc.py``, ...) reads the owner's files into a :class:`Reading`;
:func:`write_domain` turns that into the layout which ``configs/_base_/datasets/uodb.py`` expects::

    <out>/<domain>/{train,test}.json     COCO annotations
    <out>/<domain>/{train,test}/...      images, names as the owner has them
    <out>/<domain>/conversion.json       the options, and what was made

Classes stand in that config and nowhere else; category ids are their places in it, from 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from mmdet_moe.planning.checks import short, write_atomically

CONFIG = Path(__file__).resolve().parents[3] / 'configs/_base_/datasets/uodb.py'
SPLITS = ('train', 'test')
MANIFEST = 'conversion.json'
IMAGES = ('.jpg', '.png')


@lru_cache(maxsize=1)
def label_space() -> dict[str, tuple[str, ...]]:
    """Domain -> its classes, from ``configs/_base_/datasets/uodb.py``."""
    from mmengine.config import Config

    domains = Config.fromfile(str(CONFIG), format_python_code=False).label_space.domains
    return {name: tuple(classes) for name, classes in domains.items()}


# --------------------------------------------------------------------------------------------------
# What a converter reads
# --------------------------------------------------------------------------------------------------


@dataclass
class Box:
    """One annotated box.

    Attributes:
        name: Its class. One that the benchmark does not have is left out and counted.
        xyxy: Left, top, right, bottom in pixels; pixel (0, 0) covers 0 to 1, so a box of whole
            pixels i to j ends at j + 1.
        ignore: Neither an object to find nor, if found, a mistake. Written as ``iscrowd``, which is
            what mmdet's ``CocoDataset`` and the COCO and VOC metrics heed (``ignore`` is not: mmdet
            drops such an annotation, and a detection of it would count as wrong).
        extra: More entries of the annotation, as the owner gives them.
    """

    name: str
    xyxy: tuple[float, float, float, float]
    ignore: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Picture:
    """One image of the result.

    Attributes:
        file_name: Where it goes, relative to its split's folder.
        boxes: What is on it.
        source: The owner's file, placed as it is.
        pixels: Or what makes the picture; called only where it is not there yet.
        id: Its id in the json; None: the next number.
        changed: What was wrong with boxes before they came here -> how many.
    """

    file_name: str
    boxes: list[Box]
    source: Path | None = None
    pixels: Callable[[], Image.Image] | None = None
    id: int | None = None
    changed: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Item:
    """One image of the owner's.

    Attributes:
        key: Its name, as in the owner's lists and in ``--split-file``.
        source: Its file.
        data: What the converter needs to know about it.
        annotation: The file with its boxes, where every image has its own.
    """

    key: str
    source: Path
    data: Any = None
    annotation: Path | None = None

    def missing(self) -> list[Path]:
        """Those of its files that are not there."""
        files = [self.source] + ([] if self.annotation is None else [self.annotation])
        return [path for path in files if not path.is_file()]


@dataclass
class Reading:
    """The owner's dataset, read but not yet copied.

    Attributes:
        splits: ``train`` and ``test``, in the order of the json.
        pictures: Item -> what becomes of it.
        expected: Number of items of a split in the benchmark; ``all``: of both together. A number
            that nobody published is not here and not checked.
        rule: Where the split comes from; another one than an earlier run's is refused.
        folders: Where the owner's images are: images and folders in them that no split uses are
            named.
        others: Images in ``folders`` that the owner's lists know, for other tasks.
        problems: What the reader found missing.
        notes: What the user should know, but need not mend.
    """

    splits: dict[str, list[Item]]
    pictures: Callable[[Item], Iterable[Picture]]
    expected: dict[str, int] = field(default_factory=dict)
    rule: str = "the owner's lists"
    folders: Iterable[Path] = ()
    others: Iterable[Path] = ()
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Converter:
    """How the command line reads one dataset.

    Attributes:
        read: Arguments -> :class:`Reading`.
        summary: One line for ``--help``.
        add_arguments: Adds the options that only this dataset has.
    """

    read: Callable[[argparse.Namespace], Reading]
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None


# --------------------------------------------------------------------------------------------------
# Finding and splitting
# --------------------------------------------------------------------------------------------------


def find(src: Path, *places: str) -> Path:
    """The first of ``places`` that exists in ``src``.

    Raises:
        ValueError: None does.
    """
    for place in places:
        if (src / place).exists():
            return src / place
    raise ValueError(f'{src} has no {" or ".join(places)}: give --src the unpacked archive')


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, stripped, without empty ones."""
    try:
        lines = path.read_text(encoding='utf-8-sig').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'cannot read {path}: {error}') from None
    return [line.strip() for line in lines if line.strip()]


def split_items(
    args: argparse.Namespace,
    items: Sequence[Item],
    group: Callable[[Item], str],
    test_share: float,
    lists: Sequence[Path] | None = None,
) -> tuple[dict[str, list[Item]], str, list[str]]:
    """Split by ``--split-file``, by ``lists`` that came with the archive, or else by ``--seed``.

    Returns:
        The splits, the rule in words, and what the lists name but ``items`` lack.
    """
    lists = args.split_file or lists
    if lists is None:
        splits = split_by_seed(items, group, test_share, args.seed)
        names = hashlib.sha256('\n'.join(sorted(item.key for item in items)).encode()).hexdigest()
        return splits, f'random, seed {args.seed}, of {len(items)} images {names[:8]}', []
    splits, problems = split_by_lists(items, dict(zip(SPLITS, lists, strict=True)))
    return splits, f'the lists with sha256 {digest(*lists)}', problems


def digest(*paths: Path) -> str:
    """The start of a hash of the lines of some text files."""
    text = '\n\n'.join('\n'.join(read_lines(path)) for path in paths)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def split_by_lists(
    items: Sequence[Item], lists: Mapping[str, Path]
) -> tuple[dict[str, list[Item]], list[str]]:
    """Split by text files with one name a line, in their order.

    Returns:
        The splits, and a line for each list with names that are not among ``items``.

    Raises:
        ValueError: A name is in both lists, or twice in one.
    """
    by_key = {item.key: item for item in items}
    keys = {split: read_lines(path) for split, path in lists.items()}
    problems = []
    for split, names in keys.items():
        unknown = [name for name in names if name not in by_key]
        if unknown:
            problems.append(
                f'{lists[split]}: {len(unknown)} names have no annotation: {short(unknown, 3)}'
            )
        if len(set(names)) < len(names):
            twice = [name for name, count in Counter(names).items() if count > 1]
            raise ValueError(f'{lists[split]} lists names twice: {short(twice, 3)}')
    both = sorted(set(keys['train']) & set(keys['test']))
    if both:
        raise ValueError(f'{len(both)} names are in both lists: {short(both, 3)}')
    splits = {
        split: [by_key[name] for name in names if name in by_key] for split, names in keys.items()
    }
    return splits, problems


def split_by_seed(
    items: Sequence[Item], group: Callable[[Item], str], test_share: float, seed: int
) -> dict[str, list[Item]]:
    """Split at random, whole groups at a time, without a list.

    Groups are sorted by a hash of seed and name, and taken for the test until it has its share: the
    same names give the same split everywhere.
    """
    sizes = Counter(group(item) for item in items)
    order = sorted(sizes, key=lambda name: hashlib.sha256(f'{seed}/{name}'.encode()).digest())
    wanted = round(test_share * len(items))
    test: set[str] = set()
    for name in order:
        if wanted <= 0:
            break
        test.add(name)
        wanted -= sizes[name]
    return {
        'train': [item for item in items if group(item) not in test],
        'test': [item for item in items if group(item) in test],
    }


def add_split_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of datasets whose split was never published."""
    parser.add_argument(
        '--split-file',
        nargs=2,
        type=Path,
        metavar=('TRAIN.txt', 'TEST.txt'),
        help='names of the images of each split, one a line',
    )
    parser.add_argument('--seed', type=int, default=0, help='of the random split (default: 0)')


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


def clean_box(
    xyxy: Sequence[float], width: int, height: int
) -> tuple[list[float] | None, str | None]:
    """Fit a box into its image.

    Returns:
        ``[x, y, w, h]`` in pixels, or None where nothing usable is left; and what was wrong.
    """
    if not all(math.isfinite(value) for value in xyxy):
        return None, 'not a number'
    x1, y1, x2, y2 = xyxy
    if x2 <= x1 or y2 <= y1:
        return None, 'empty'
    left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if right <= left or bottom <= top:
        return None, 'outside the image'
    if right - left < 1 or bottom - top < 1:
        return None, 'smaller than 1 px'
    clipped = (left, top, right, bottom) != (x1, y1, x2, y2)
    box = [round(float(v), 3) for v in (left, top, right - left, bottom - top)]
    return box, 'clipped' if clipped else None


def fit(
    box: Box, width: int, height: int, classes: Container[str]
) -> tuple[list[float] | None, str | None]:
    """:func:`clean_box` of a box of ours.

    Args:
        box: The box.
        width: Of its image, px.
        height: Of its image, px.
        classes: Those of the domain.

    Returns:
        ``[x, y, w, h]`` or None, and what to count: ``clipped``, ``left out: ...``.
    """
    if box.name not in classes:
        return None, f'left out: no class {box.name!r}'
    bbox, reason = clean_box(box.xyxy, width, height)
    if bbox is None:
        return None, f'left out: {reason}'
    if not box.extra.get('area', 1) > 0:  # mmdet's CocoDataset drops it without a word
        return None, 'left out: its mask has no area'
    return bbox, reason


@dataclass(frozen=True)
class Header:
    """What an image file says of itself.

    Attributes:
        size: Width and height in pixels, as stored.
        turned: Whether its EXIF data ask readers to rotate or mirror it.
    """

    size: tuple[int, int]
    turned: bool


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """While the image file ``path`` is read.

    Raises:
        ValueError: It cannot be.
    """
    try:
        yield
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f'{path} is not a readable image: {error}') from None


def read_header(path: Path) -> Header:
    """The header of an image file.

    Raises:
        ValueError: It is not an image.
    """
    with readable(path), Image.open(path) as image:
        # Of a PNG, PIL would decode all pixels to see whether EXIF data come after them.
        exif = image.getexif() if image.format != 'PNG' or 'exif' in image.info else {}
        return Header(image.size, exif.get(ExifTags.Base.Orientation, 1) != 1)


def place(picture: Picture, target: Path, link: str) -> None:
    """Put an image where it belongs, whole or not at all; do nothing where it is already.

    Args:
        picture: The image.
        target: Its place.
        link: ``hard``, ``symbolic`` or ``copy``, for images that are placed as they are.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f'.{target.name}.part')
    if picture.pixels is not None:
        if not target.exists():
            picture.pixels().save(part, format='PNG')
            os.replace(part, target)
        return
    source = picture.source
    assert source is not None, 'a picture has a source or pixels'
    source = source.resolve()
    if target.exists() and target.stat().st_size == source.stat().st_size:
        return
    part.unlink(missing_ok=True)
    if link == 'copy':
        shutil.copyfile(source, part)
    elif link == 'symbolic':
        part.symlink_to(source)
    else:
        try:
            os.link(source, part)
        except OSError as error:
            raise ValueError(
                f'cannot hard-link {source} to {target} ({error.strerror}): '
                'give --link symbolic or --link copy'
            ) from None
    os.replace(part, target)


def check_reading(reading: Reading) -> list[str]:
    """What the owner's folder lacks, or has too much of, against the benchmark."""
    problems = list(reading.problems)
    counts = {split: len(items) for split, items in reading.splits.items()}
    counts['all'] = sum(counts.values())
    for split, expected in reading.expected.items():
        if counts[split] != expected:
            much = counts[split] - expected
            word = f'{much} too many' if much > 0 else f'{-much} missing'
            problems.append(
                f'{split}: {counts[split]} images, the benchmark has {expected} ({word})'
            )
    for split, items in reading.splits.items():
        missing = [str(path) for item in items for path in item.missing()]
        if missing:
            problems.append(f'{split}: {len(missing)} files are missing: {short(missing, 3)}')
    return problems


def surplus(reading: Reading) -> list[str]:
    """What the owner's image folders hold that is in no split, a line for each folder."""
    known = {*reading.others}
    for item in (item for items in reading.splits.values() for item in items):
        known |= {item.source, item.source.parent}
    lines = []
    for folder in sorted({*reading.folders}):
        names = sorted(
            path.name
            for path in (folder.iterdir() if folder.is_dir() else ())
            if path not in known and (path.suffix in IMAGES or path.is_dir())
        )
        if names:
            lines.append(
                f'{folder}: {len(names)} images or folders are in no split: {short(names, 3)}'
            )
    return lines


def write_domain(
    domain: str,
    reading: Reading,
    out: Path,
    *,
    options: Mapping[str, Any] | None = None,
    link: str = 'hard',
    partial: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Write one domain.

    Images that are there are not done again, so a run that was interrupted goes on. A json appears
    when all images of its split are there.

    Args:
        domain: A name of the label space.
        reading: What to write.
        out: The folder of all domains.
        options: What the result depends on besides the owner's files; other options than those of
            an earlier run are refused.
        link: How images get there: ``hard``, ``symbolic`` or ``copy``.
        partial: Go on where the owner's folder is not complete.
        overwrite: Remove what an earlier run made, first.
        progress: Show a bar.

    Returns:
        Split -> numbers of ``images``, ``boxes`` and ``ignored`` boxes; ``changed``: what was wrong
        with boxes -> how many; ``without``: classes without a box; ``turned``: images that readers
        may rotate.

    Raises:
        ValueError: The owner's folder is not complete, or ``out`` holds something else.
    """
    problems = check_reading(reading)
    if problems and not partial:
        found = '; '.join([*problems, *surplus(reading)])
        raise ValueError(f'{domain}: {found}. Give --partial to convert what there is')
    folder = Path(out) / domain
    options = json.loads(json.dumps({**(options or {}), 'split': reading.rule}))
    _claim(folder, options, overwrite)
    classes = label_space()[domain]
    ids = {name: number for number, name in enumerate(classes, start=1)}
    report = {}
    manifest = {'domain': domain, 'options': options}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2) + '\n')
    for split in SPLITS:
        items = [item for item in reading.splits[split] if not item.missing()]
        images: list[dict] = []
        annotations: list[dict] = []
        changed: Counter[str] = Counter()
        turned: list[str] = []
        (folder / split).mkdir(exist_ok=True)
        with _bar(f'{domain} {split}', len(items), progress) as tick:
            for item in items:
                for picture in reading.pictures(item):
                    target = folder / split / picture.file_name
                    place(picture, target, link)
                    header = read_header(target)
                    width, height = header.size
                    if header.turned:
                        turned.append(picture.file_name)
                    image_id = len(images) + 1 if picture.id is None else picture.id
                    images.append(
                        {
                            'id': image_id,
                            'file_name': picture.file_name,
                            'width': width,
                            'height': height,
                        }
                    )
                    changed.update(picture.changed)
                    for box in picture.boxes:
                        bbox, reason = fit(box, width, height, ids)
                        if reason is not None:
                            changed[reason] += 1
                        if bbox is not None:
                            annotations.append(
                                {
                                    'id': len(annotations) + 1,
                                    'image_id': image_id,
                                    'category_id': ids[box.name],
                                    'bbox': bbox,
                                    'area': round(bbox[2] * bbox[3], 3),
                                    'iscrowd': int(box.ignore),
                                    **box.extra,
                                }
                            )
                tick()
        used = {annotation['category_id'] for annotation in annotations}
        report[split] = {
            'images': len(images),
            'boxes': len(annotations),
            'ignored': sum(annotation['iscrowd'] for annotation in annotations),
            'changed': dict(sorted(changed.items())),
            'without': [name for name, number in ids.items() if number not in used],
            'turned': turned,
        }
        content = {
            'images': images,
            'annotations': annotations,
            'categories': [{'id': number, 'name': name} for name, number in ids.items()],
        }
        write_atomically(folder / f'{split}.json', json.dumps(content))
    manifest |= {'missing': problems, 'made': report}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2) + '\n')
    return report


def _claim(folder: Path, options: Mapping[str, Any], overwrite: bool) -> None:
    """Make sure that ``folder`` is new or an earlier run's with the same options."""
    if folder.exists() and any(folder.iterdir()):
        try:
            found = json.loads((folder / MANIFEST).read_text())['options']
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(
                f'{folder} holds files that no converter made: choose another --out'
            ) from None
        if overwrite:
            for split in SPLITS:
                shutil.rmtree(folder / split, ignore_errors=True)
                (folder / f'{split}.json').unlink(missing_ok=True)
            (folder / MANIFEST).unlink()
        elif found != options:
            changed = sorted(
                key for key in {*found, *options} if found.get(key, None) != options.get(key, None)
            )
            raise ValueError(
                f'{folder} was made with other options ({", ".join(changed)}): '
                'give --overwrite to make it anew'
            )
    folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def _bar(what: str, total: int, show: bool) -> Iterator[Callable[[], None]]:
    """A progress bar; yields what to call after each item."""
    if not show:
        yield lambda: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
