"""k objects of each class, nested, drawn by the seed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / 'tools'
sys.path.insert(0, str(TOOLS))

from fewshot_split import split  # noqa: E402


def coco(counts=((4, 1), (4, 1), (4, 1), (4, 1)), **odd):
    """Images with so many cells and dots each; annotation ids count from 1."""
    images, annotations = [], []
    for i, numbers in enumerate(counts, 1):
        images.append(dict(id=i, file_name=f'{i}.png', width=100, height=80))
        for category, number in enumerate(numbers, 1):
            for _ in range(number):
                n = len(annotations) + 1
                annotations.append(
                    dict(id=n, image_id=i, category_id=category, bbox=[n, 5, 9, 9], area=81)
                )
    categories = [dict(id=1, name='cell'), dict(id=2, name='dot')]
    return dict(images=images, annotations=annotations, categories=categories, **odd)


def shots(subset):
    """Annotation ids that train, by class."""
    found = {1: set(), 2: set()}
    for annotation in subset['annotations']:
        if not annotation.get('iscrowd'):
            found[annotation['category_id']].add(annotation['id'])
    return found


def test_every_class_has_exactly_k_objects_and_fewer_shots_are_among_more():
    subsets = split(coco(), [1, 2, 4], seed=3)
    for k, subset in subsets.items():
        assert {len(ids) for ids in shots(subset).values()} == {k}
        assert [c['name'] for c in subset['categories']] == ['cell', 'dot']
    for few, more in ((1, 2), (2, 4)):
        for category in (1, 2):
            assert shots(subsets[few])[category] < shots(subsets[more])[category]
    # Asked for alone, the two shots are the same two.
    assert split(coco(), [2], seed=3)[2] == subsets[2]
    assert shots(split(coco(), [2], seed=4)[2]) != shots(subsets[2])


def test_what_else_is_in_the_images_is_ignored_dropped_or_kept():
    data = coco()
    for others in ('ignore', 'drop', 'keep'):
        subset = split(data, [1], others=others)[1]
        images = {image['id'] for image in subset['images']}
        assert 1 <= len(images) <= 2
        whole = [a for a in data['annotations'] if a['image_id'] in images]
        crowds = [a for a in subset['annotations'] if a.get('iscrowd')]
        if others == 'ignore':
            assert len(subset['annotations']) == len(whole) and len(crowds) == len(whole) - 2
        elif others == 'drop':
            assert len(subset['annotations']) == 2 and not crowds
        else:
            assert subset['annotations'] == whole
    assert not any('iscrowd' in a for a in data['annotations'])  # the input is as it was


def test_the_order_of_the_file_does_not_matter():
    data = coco()
    turned = {**data, 'annotations': data['annotations'][::-1]}
    assert shots(split(data, [2])[2]) == shots(split(turned, [2])[2])


def test_too_few_objects_name_the_class_and_crowds_and_slivers_are_no_shots():
    with pytest.raises(ValueError, match="'dot' has 4 objects, 5 shots are asked for"):
        split(coco(), [1, 5])
    data = coco()
    dots = [a for a in data['annotations'] if a['category_id'] == 2]
    dots[0]['iscrowd'], dots[1]['bbox'], dots[2]['bbox'] = 1, [5, 5, 0.5, 9], [120, 5, 9, 9]
    with pytest.raises(ValueError, match="'dot' has 1 objects"):
        split(data, [2])
    assert shots(split(data, [1])[1])[2] == {dots[3]['id']}
    with pytest.raises(ValueError, match='1 or more'):
        split(coco(), [0])


def test_command_writes_a_file_for_each_k_and_says_what_is_wrong(tmp_path):
    source = tmp_path / 'train.json'
    source.write_text(json.dumps(coco()))

    def run(*arguments):
        command = [sys.executable, str(TOOLS / 'fewshot_split.py'), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run(source, '--out', tmp_path / 'shots', '--shots', 1, 4, '--seed', 2)
    assert done.returncode == 0 and '4 shots per class' in done.stdout
    written = json.loads((tmp_path / 'shots' / 'train_1shot_seed2.json').read_text())
    assert written == split(coco(), [1], seed=2)[1]
    failed = run(source, '--out', tmp_path / 'more', '--shots', 9)
    assert failed.returncode == 2 and "'cell' has 16" not in failed.stderr
    assert "class 'dot' has 4 objects" in failed.stderr and len(failed.stderr.splitlines()) == 1
    assert not (tmp_path / 'more').exists()


def test_what_is_not_a_coco_dataset_is_refused():
    with pytest.raises(ValueError, match='not COCO annotations, an object with images'):
        split([], [1])
    data = coco()
    data['annotations'][0]['image_id'] = 77
    number = data['annotations'][0]['id']
    with pytest.raises(ValueError, match=f'annotation {number} is of image 77, which is not'):
        split(data, [1])
