"""Images in folders of domains: what is read, and that no concept stands in two splits."""

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip('mmpretrain')

from mmpretrain.registry import DATASETS

from mmdet_moe.datasets import DomainImageFolder
from mmdet_moe.datasets.domain_folder import split_of

REAL = Path(__file__).resolve().parents[3] / 'shared/data/emoji_dg'
CONCEPTS = [f'thing{i}' for i in range(40)]


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """Two domains x two classes x 20 concepts, the images told apart by their brightness."""
    root = tmp_path_factory.mktemp('folders')
    for d, domain in enumerate(['ink', 'heat']):
        for i, concept in enumerate(CONCEPTS):
            folder = root / domain / ('cat' if i % 2 else 'dog')
            folder.mkdir(parents=True, exist_ok=True)
            suffix = ['.png', '.JPG', '.webp'][i % 3]
            cv2.imwrite(f'{folder / concept}{suffix}', np.full((6, 4, 3), 100 * d, np.uint8))
        (root / domain / 'cat' / 'notes.txt').write_text('no image')
    (root / '.cache').mkdir()
    (root / 'README.md').write_text('no domain')
    return root


def infos(dataset):
    return [dataset.get_data_info(i) for i in range(len(dataset))]


def concepts(dataset, domain=None):
    return {Path(x['img_path']).stem for x in infos(dataset) if domain in (None, x['domain'])}


def test_every_image_has_its_class_and_domain(root):
    dataset = DomainImageFolder(str(root))
    assert dataset.metainfo['classes'] == ('cat', 'dog')
    assert dataset.metainfo['domains'] == ('heat', 'ink')
    assert len(dataset) == 80
    for info in infos(dataset):
        domain, name = Path(info['img_path']).parts[-3:-1]
        assert info['domain'] == domain and info['domain_label'] == ['heat', 'ink'].index(domain)
        assert info['gt_label'] == ['cat', 'dog'].index(name)
    assert Counter(dataset.get_gt_labels().tolist()) == {0: 40, 1: 40}


def test_the_domain_reaches_the_metainfo_from_mmpretrains_scope(root):
    cfg = dict(
        type='mmdet_moe.DomainImageFolder',
        data_root=str(root),
        domains=['ink'],
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='PackInputs', meta_keys=('domain', 'domain_label')),
        ],
    )
    dataset = DATASETS.build(cfg)
    item = dataset[0]
    assert item['inputs'].shape == (3, 6, 4) and (item['inputs'] == 0).all()
    assert item['data_samples'].domain == 'ink' and item['data_samples'].domain_label == 0
    assert item['data_samples'].gt_label.item() == 0


def test_domains_and_classes_keep_the_order_they_are_named_in(root):
    dataset = DomainImageFolder(str(root), domains=['ink', 'heat'], classes=['dog', 'cat'])
    assert dataset.metainfo['domains'] == ('ink', 'heat')
    first = dataset.get_data_info(0)
    assert (first['domain'], first['domain_label'], first['gt_label']) == ('ink', 0, 0)
    assert Path(first['img_path']).parent.name == 'dog'


def test_a_concept_stands_in_one_split_whatever_its_domain(root):
    fractions = dict(train=0.5, val=0.25, test=0.25)
    splits = {
        name: DomainImageFolder(str(root), split=name, fractions=fractions) for name in fractions
    }
    found = {name: concepts(dataset) for name, dataset in splits.items()}
    assert sum(map(len, found.values())) == 40 and set().union(*found.values()) == set(CONCEPTS)
    for name, dataset in splits.items():
        assert concepts(dataset, 'ink') == concepts(dataset, 'heat') == found[name]
        alone = DomainImageFolder(str(root), ['heat'], split=name, fractions=fractions)
        assert concepts(alone) == found[name]
    other = DomainImageFolder(str(root), split='train', fractions=fractions, seed=1)
    assert concepts(other) != found['train']


def test_splits_have_their_fractions_on_average():
    fractions = dict(train=0.7, val=0.1, test=0.2)
    found = Counter(split_of(f'concept {i}', fractions) for i in range(10_000))
    # Binomial: standard deviation at most sqrt(.7 · .3 / 10000) = .0046.
    assert {k: n / 10_000 for k, n in found.items()} == pytest.approx(fractions, abs=0.02)
    assert {split_of(str(i), dict(train=1.0, val=0.0)) for i in range(500)} == {'train'}
    # The same on every machine, in every process.
    assert [split_of(c, fractions) for c in ('cat', 'dog', 'owl')] == ['test', 'train', 'train']


def test_classes_that_differ_are_named_with_their_domain(tmp_path):
    for path in ('ink/cat', 'ink/dog', 'heat/cat', 'heat/cow'):
        (tmp_path / path).mkdir(parents=True)
    message = "domain 'heat' has class 'cow', domain 'ink' has not"
    with pytest.raises(ValueError, match=message):
        DomainImageFolder(str(tmp_path), ['ink'])
    message = "domain 'heat' has class 'cow', the list of classes has not"
    with pytest.raises(ValueError, match=message):
        DomainImageFolder(str(tmp_path), classes=['cat', 'dog'])
    (tmp_path / 'heat/cow').rmdir()
    message = "domain 'ink' has class 'dog', domain 'heat' has not"
    with pytest.raises(ValueError, match=message):
        DomainImageFolder(str(tmp_path))


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(domains=['moon']), r"no domain 'moon'; it has \['heat', 'ink'\]"),
        (dict(domains='ink'), "domains must be a list of names or None, got 'ink'"),
        (dict(split='dev'), r"no split 'dev' in \['train', 'val', 'test'\]"),
        (dict(fractions=dict(train=0.5)), 'add up to 1'),
        (dict(fractions=dict(train=1.5, val=-0.5)), '>= 0'),
        (dict(split='val', fractions=dict(train=1, val=0)), "no image in split 'val'"),
        (dict(data_root='/nowhere'), '/nowhere is not a folder'),
    ],
)
def test_what_cannot_be_read_is_refused(root, options, message):
    with pytest.raises(ValueError, match=message):
        DomainImageFolder(**{'data_root': str(root), **options})


@pytest.mark.skipif(not REAL.is_dir(), reason=f'{REAL} is not there')
def test_emoji_styles_share_their_concepts_within_a_split():
    train, val = (DomainImageFolder(str(REAL), split=name) for name in ('train', 'val'))
    assert len(train.metainfo['domains']) == 5 and len(train.metainfo['classes']) == 6
    assert not concepts(train) & concepts(val)
    assert len({frozenset(concepts(val, name)) for name in val.metainfo['domains']}) == 1
    assert len(train) + len(val) + len(DomainImageFolder(str(REAL), split='test')) == 5 * 1015
