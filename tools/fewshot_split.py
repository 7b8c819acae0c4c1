"""Draw k shots per class from a COCO json, nested: 1 shot is among the 5, and they among the 10.

    python tools/fewshot_split.py train.json --out shots/ --shots 1 5 10 --seed 0

writes ``shots/train_1shot_seed0.json`` and so on. A shot is one annotated object: the field counts
k objects of each class, not images. Each class's objects are put in an order drawn from the seed
and the class's name; its first k are the shots, and the images are those that hold one. What else
is in these images:

* ``--others ignore`` (default): stays, marked ``iscrowd``: mmdet then counts it neither as an
  object nor as background. A detector is told of k objects, and nothing false.
* ``--others drop``: is left out, as in the lists of Wang et al. 2020 (TFA, arXiv 2003.06957), where
  it trains as background.
* ``--others keep``: stays as it is. Classes that share images then have more than k objects.

Crowds and boxes thinner than a pixel, which mmdet leaves out of training, are no shots.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a clone, uninstalled

from mmdet_moe.planning.checks import read_json, write_atomically

OTHERS = ('ignore', 'drop', 'keep')


def draw_order(ids: Sequence[int], seed: int, name: str) -> list[int]:
    """Annotation ids in an order that depends on the ids, the seed and the class's name alone."""
    words = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], dtype='<u4').tolist()
    order = np.random.default_rng([seed, *words]).permutation(len(ids))
    return [sorted(ids)[i] for i in order]


def split(
    data: Mapping[str, Any], shots: Sequence[int], seed: int = 0, others: str = 'ignore'
) -> dict[int, dict[str, Any]]:
    """The k-shot subsets of a COCO dataset.

    Args:
        data: The COCO json's content.
        shots: The numbers k.
        seed: Of the draw.
        others: What becomes of the other objects in the chosen images, see the module.

    Returns:
        k -> COCO json, with all categories, and images and annotations in the order of ``data``.

    Raises:
        ValueError: A class has fewer than k objects that can be shots.
    """
    if others not in OTHERS:
        raise ValueError(f'others must be one of {", ".join(OTHERS)}, got {others!r}')
    if not shots or min(shots) < 1:
        raise ValueError(f'shots must be numbers of 1 or more, got {list(shots)}')
    parts = ('images', 'annotations', 'categories')
    if not isinstance(data, Mapping) or not all(part in data for part in parts):
        raise ValueError(f'not COCO annotations, an object with {", ".join(parts)}')
    sizes = {image['id']: (image['width'], image['height']) for image in data['images']}
    for annotation in data['annotations']:
        if annotation['image_id'] not in sizes:
            raise ValueError(
                f'annotation {annotation["id"]} is of image {annotation["image_id"]}, '
                'which is not among the images'
            )
    orders: dict[str, list[int]] = {}
    for category in data['categories']:
        ids = [
            annotation['id']
            for annotation in data['annotations']
            if annotation['category_id'] == category['id'] and _is_shot(annotation, sizes)
        ]
        if len(ids) < max(shots):
            raise ValueError(
                f'class {category["name"]!r} has {len(ids)} objects, {max(shots)} shots are asked '
                f'for; ask for {len(ids)} at most'
            )
        orders[category['name']] = draw_order(ids, seed, category['name'])
    return {
        k: _subset(data, {i for order in orders.values() for i in order[:k]}, others) for k in shots
    }


def _is_shot(annotation: Mapping[str, Any], sizes: Mapping[int, tuple[int, int]]) -> bool:
    """Whether mmdet's CocoDataset trains on the object."""
    x, y, w, h = annotation['bbox']
    width, height = sizes[annotation['image_id']]
    inside = min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
    whole = w >= 1 and h >= 1 and annotation.get('area', w * h) > 0
    return bool(inside and whole and not annotation.get('iscrowd') and not annotation.get('ignore'))


def _subset(data: Mapping[str, Any], chosen: set[int], others: str) -> dict[str, Any]:
    images = {a['image_id'] for a in data['annotations'] if a['id'] in chosen}
    annotations = []
    for annotation in data['annotations']:
        if annotation['id'] not in chosen:
            if annotation['image_id'] not in images or others == 'drop':
                continue
            if others == 'ignore':
                annotation = {**annotation, 'iscrowd': 1}
        annotations.append(annotation)
    kept = [image for image in data['images'] if image['id'] in images]
    return {**data, 'images': kept, 'annotations': annotations}


def split_path(out: Path, source: Path, k: int, seed: int) -> Path:
    """Where the k-shot subset of ``source`` is written."""
    return out / f'{source.stem}_{k}shot_seed{seed}.json'


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('source', type=Path, help='COCO json of the training images')
    parser.add_argument('--out', type=Path, required=True, help='folder for the subsets')
    parser.add_argument('--shots', type=int, nargs='+', default=[1, 5, 10], help='default: 1 5 10')
    parser.add_argument('--seed', type=int, default=0, help='of the draw (default: 0)')
    parser.add_argument('--others', choices=OTHERS, default='ignore', help='default: ignore')
    args = parser.parse_args(argv)
    try:
        subsets = split(read_json(args.source, 'COCO json'), args.shots, args.seed, args.others)
    except (ValueError, KeyError, TypeError) as error:
        what = f'an entry has no {error}' if isinstance(error, KeyError) else error
        print(f'fewshot_split: {args.source}: {what}', file=sys.stderr)
        return 2
    for k, subset in subsets.items():
        path = split_path(args.out, args.source, k, args.seed)
        write_atomically(path, json.dumps(subset) + '\n')
        print(f'{path}: {len(subset["images"])} images for {k} shots per class')
    return 0


if __name__ == '__main__':
    sys.exit(main())
