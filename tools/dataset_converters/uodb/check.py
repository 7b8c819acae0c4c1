"""What is wrong with a domain that has been converted."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from mmdet_moe.planning.checks import short
from uodb.layout import MANIFEST, SPLITS, label_space, read_header


def check_domain(out: Path, domain: str) -> list[str]:
    """The defects of ``out/domain``, a line for each kind; none: it is in order."""
    folder = Path(out) / domain
    manifest = _read(folder / MANIFEST)
    defects = []
    if not isinstance(manifest, dict):
        defects.append(f'{MANIFEST} is missing or broken: no converter finished here')
        manifest = {}
    elif 'made' not in manifest:
        defects.append('the conversion was interrupted: run it again')
    defects += [f'incomplete archive: {problem}' for problem in manifest.get('missing', [])]
    names: dict[str, set[str]] = {}
    for split in SPLITS:
        content = _read(folder / f'{split}.json')
        if not isinstance(content, dict):
            defects.append(f'{split}.json is missing or broken')
            continue
        made = manifest.get('made', {}).get(split)
        try:
            found = _check_split(folder / split, content, label_space()[domain], made)
            names[split] = {image['file_name'] for image in content['images']}
        except (KeyError, TypeError, ValueError) as error:
            found = [f'not COCO annotations ({type(error).__name__}: {error})']
        defects += [f'{split}: {defect}' for defect in found]
    both = sorted(names.get('train', set()) & names.get('test', set()))
    if both:
        defects.append(f'{len(both)} images are in both splits: {short(both, 3)}')
    return defects


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _check_split(
    folder: Path, content: dict, classes: tuple[str, ...], made: dict | None
) -> list[str]:
    """The defects of one json and its images."""
    images, annotations = content['images'], content['annotations']
    found: dict[str, list[str]] = defaultdict(list)
    expected = [{'id': number, 'name': name} for number, name in enumerate(classes, start=1)]
    if content['categories'] != expected:
        names = [category['name'] for category in content['categories']]
        found["categories are not the label space's, in its order"] = names
    if made is not None:
        for what, number in (('images', len(images)), ('boxes', len(annotations))):
            if number != made[what]:
                found[f'{what} in the json, against {made[what]} when it was made'] = [str(number)]
    for what, entries in (('image', images), ('annotation', annotations)):
        counts = Counter(entry['id'] for entry in entries)
        found[f'{what} ids come twice'] += [str(i) for i, count in counts.items() if count > 1]
    counts = Counter(image['file_name'] for image in images)
    found['file names come twice'] += [name for name, count in counts.items() if count > 1]

    sizes = {}
    for image in images:
        size = sizes[image['id']] = (image['width'], image['height'])
        path = folder / image['file_name']
        if not path.is_file():
            found['images are missing'].append(image['file_name'])
            continue
        try:
            if read_header(path).size != size:
                found['images have another size than the json says'].append(image['file_name'])
        except ValueError:
            found['images cannot be read'].append(image['file_name'])
    on_disk = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob('*')
        if path.is_file() or path.is_symlink()
    }
    found['files do not belong here'] += sorted(on_disk - {i['file_name'] for i in images})

    for annotation in annotations:
        name = str(annotation['id'])
        if annotation['image_id'] not in sizes:
            found['annotations are of no image'].append(name)
            continue
        if not 1 <= annotation['category_id'] <= len(classes):
            found['annotations are of no class'].append(name)
        if annotation['iscrowd'] not in (0, 1) or annotation.get('ignore'):
            found['annotations must say ignore by iscrowd 1 and not otherwise'].append(name)
        x, y, w, h = annotation['bbox']
        width, height = sizes[annotation['image_id']]
        slack = 2e-3  # coordinates are rounded to 1e-3
        inside = -slack <= x and -slack <= y and x + w <= width + slack and y + h <= height + slack
        if not (all(map(math.isfinite, (x, y, w, h))) and inside):
            found['boxes reach out of their image'].append(name)
        elif w < 1 - slack or h < 1 - slack or not annotation['area'] > 0:
            found['boxes are smaller than 1 px'].append(name)
    return [f'{len(names)} {what}: {short(names, 3)}' for what, names in found.items() if names]
