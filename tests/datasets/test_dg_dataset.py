"""Data sets of domain generalisation: layouts, completeness, splits, batches."""

import csv
import gzip
import struct
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip('mmpretrain')
pytest.importorskip('sklearn')

from mmengine.dataset import InfiniteSampler
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import DataLoader

from mmdet_moe.datasets import DGDataset, DomainBatchSampler, dg_catalog
from mmdet_moe.datasets.dg_catalog import CATALOG, leave_outs, recipe
from mmdet_moe.datasets.dg_dataset import domain_parts
from mmdet_moe.engine.hooks.random_state_hook import _ResumedIterator

FOLDERS = [name for name, info in CATALOG.items() if info.layout == 'folders']


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((4, 4, 3), 99, np.uint8))


def read(*args, **kwargs):
    return DGDataset(*args, serialize_data=False, **kwargs)  # spares a garbage collection


def infos(dataset):
    return [dataset.get_data_info(i) for i in range(len(dataset))]


def stems(dataset, **wanted):
    found = [x for x in infos(dataset) if all(x[k] == v for k, v in wanted.items())]
    return {Path(x['img_path']).stem for x in found}


def write_folders(root: Path, name: str, images: int = 5, skip: str = '') -> int:
    """A miniature of a data set of folders; the number of its images."""
    info = CATALOG[name]
    classes = info.classes or [f'class{i:03d}' for i in range(info.num_classes)]
    for domain in info.domains:
        for label in classes if domain != skip else ():
            for i in range(images):
                # Touching is enough: nothing is decoded here.
                path = root / info.folder / domain / label / f'{i}.jpg'
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    return len(info.domains) * len(classes) * images


@pytest.mark.parametrize('name', [n for n in FOLDERS if n != 'DomainNet'])
def test_every_folder_layout_is_read_and_checked(tmp_path, monkeypatch, name):
    count = write_folders(tmp_path, name)
    info = CATALOG[name]
    if info.images:
        known = ' or '.join(map(str, info.images))
        with pytest.raises(ValueError, match=f'{name}: .* has {count} images, not {known}'):
            read(str(tmp_path), name)
        images = (*info.images, count)  # the owner publishes another complete copy
        monkeypatch.setitem(dg_catalog.CATALOG, name, replace(info, images=images))
    dataset = read(str(tmp_path), name)
    assert len(dataset) == count
    assert dataset.metainfo['domains'] == info.domains
    assert len(dataset.metainfo['classes']) == info.num_classes
    assert dataset.metainfo['dataset'] == name


def test_what_is_missing_is_named_with_its_owner(tmp_path):
    with pytest.raises(ValueError, match='PACS: .*PACS is not a folder.*It is from.*iccv2017'):
        read(str(tmp_path), 'PACS')
    write_folders(tmp_path, 'PACS', images=1, skip='photo')
    with pytest.raises(ValueError, match="PACS has no domain 'photo'"):
        read(str(tmp_path), 'PACS')
    (tmp_path / 'PACS/photo/dog').mkdir(parents=True)
    with pytest.raises(ValueError, match="has class 'elephant', domain 'photo' has not"):
        read(str(tmp_path), 'PACS')
    with pytest.raises(ValueError, match="'PACs' is unknown; did you mean 'PACS'"):
        read(str(tmp_path), 'PACs')


def write_csv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_camelyon17_is_read_by_hospital_from_its_own_table(tmp_path):
    root = tmp_path / 'camelyon17_v1.0'
    rows = []
    for i in range(50):
        patient, node, x, y = f'{i:03d}', i % 3, 10 * i, 20 * i
        rows.append({'': i, 'patient': patient, 'node': node, 'x_coord': x, 'y_coord': y})
        rows[-1] |= {'tumor': int(i % 4 == 0), 'slide': 0, 'center': i % 5, 'split': 0}
        stem = f'patient_{patient}_node_{node}'
        picture(root / 'patches' / stem / f'patch_{stem}_x_{x}_y_{y}.png')
    write_csv(root / 'metadata.csv', rows)
    with pytest.raises(ValueError, match='50 images, not 455954.*wilds.stanford.edu'):
        read(str(tmp_path), 'WILDSCamelyon')
    dataset = read(str(tmp_path), 'WILDSCamelyon', check=False)
    assert all(Path(x['img_path']).is_file() for x in infos(dataset))
    by_patient = {int(Path(x['img_path']).stem.split('_')[2]): x for x in infos(dataset)}
    assert all(x['domain'] == f'hospital_{i % 5}' for i, x in by_patient.items())
    assert all(x['gt_label'] == int(i % 4 == 0) for i, x in by_patient.items())
    (root / 'metadata.csv').unlink()
    with pytest.raises(ValueError, match='WILDSCamelyon: .*metadata.csv is not there'):
        read(str(tmp_path), 'WILDSCamelyon')


def test_fmow_is_read_by_continent_and_without_the_sequences(tmp_path):
    root = tmp_path / 'fmow_v1.1'
    countries = ['CHN', 'FRA', 'KEN', 'BRA', 'FJI', 'XXX']
    regions = ['Asia', 'Europe', 'Africa', 'Americas', 'Oceania']
    codes = [
        {'name': c, 'alpha-3': c, 'region': r} for c, r in zip(countries[:5], regions, strict=True)
    ]
    write_csv(root / 'country_code_mapping.csv', codes)
    rows = []
    for i in range(70):
        split = 'seq' if i >= 60 else 'train'
        category = ['zoo', 'airport'][i % 2]
        rows.append({'split': split, 'category': category, 'country_code': countries[i % 6]})
    write_csv(root / 'rgb_metadata.csv', rows)
    dataset = read(str(tmp_path), 'WILDSFMoW', check=False)
    assert len(dataset) == 60 and dataset.metainfo['classes'] == ('airport', 'zoo')
    for x in infos(dataset):
        row = int(Path(x['img_path']).stem.removeprefix('rgb_img_'))
        assert x['domain'] == [*regions, 'Other'][row % 6] and x['gt_label'] == 1 - row % 2


def write_idx(path: Path, array: np.ndarray, opener=open) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with opener(path, 'wb') as file:
        file.write(bytes([0, 0, 8, array.ndim]) + struct.pack(f'>{array.ndim}I', *array.shape))
        file.write(array.tobytes())


def test_mnist_is_read_from_idx_files_plain_or_zipped(tmp_path):
    raw = tmp_path / 'MNIST/raw'
    rng = np.random.default_rng(0)
    images = {
        part: rng.integers(0, 255, (60, 28, 28), dtype=np.uint8) for part in ('train', 't10k')
    }
    for part, opener, end in (('train', open, ''), ('t10k', gzip.open, '.gz')):
        write_idx(raw / f'{part}-images-idx3-ubyte{end}', images[part], opener)
        labels = np.arange(60, dtype=np.uint8) % 10
        write_idx(raw / f'{part}-labels-idx1-ubyte{end}', labels, opener)
    with pytest.raises(ValueError, match='RotatedMNIST: .* 120 images, not 70000'):
        read(str(tmp_path), 'RotatedMNIST')
    rotated = infos(read(str(tmp_path), 'RotatedMNIST', check=False))
    assert Counter(x['domain'] for x in rotated) == dict.fromkeys(
        CATALOG['RotatedMNIST'].domains, 20
    )
    everything = {image.tobytes() for part in images.values() for image in part}
    upright = [x for x in rotated if x['domain'] == '0']
    assert all(x['img'][..., 0].tobytes() in everything for x in upright)
    colored = infos(read(str(tmp_path), 'ColoredMNIST', check=False))
    for x in colored:  # one colour, the digit in it
        channels = x['img'].reshape(-1, 3).any(0)
        assert channels.sum() == 1 and not channels[0] and x['img'].max(2).tobytes() in everything
    (raw / 'train-images-idx3-ubyte').unlink()
    with pytest.raises(ValueError, match=r'train-images-idx3-ubyte \(or .gz\) is not there'):
        read(str(tmp_path), 'RotatedMNIST')


def test_colour_goes_with_the_label_as_often_as_the_domain_says():
    found = infos(read('', 'ColoredDigits'))
    assert len(found) == 1797
    for domain, share in (('+90%', 0.9), ('+80%', 0.8), ('-90%', 0.1)):
        mine = [x for x in found if x['domain'] == domain]
        agree = np.mean([x['img'][..., 1 + x['gt_label']].any() for x in mine])
        assert agree == pytest.approx(share, abs=0.04)  # 599 images: 3 sigma


# -- splits ----------------------------------------------------------------------------------------


def test_each_domain_is_cut_80_to_20_by_the_trial():
    train, val = (read('', 'RotatedDigits', parts=[part]) for part in ('train', 'val'))
    sizes = Counter(x['domain'] for x in infos(train)), Counter(x['domain'] for x in infos(val))
    for domain in CATALOG['RotatedDigits'].domains:
        size = sizes[0][domain] + sizes[1][domain]
        assert sizes[1][domain] == int(0.2 * size)
    assert len(train) + len(val) == 1797
    parts = [domain_parts(100, {'train': 0.8, 'val': 0.2}, trial, 1) for trial in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
    assert parts[0] != domain_parts(100, {'train': 0.8, 'val': 0.2}, 0, 2)


def test_the_split_is_domainbeds():
    # The 20 % of 10 images: the first two of numpy's legacy shuffling by md5('(3, 1)') mod 2^31.
    import hashlib

    seed = int(hashlib.md5(b'(3, 1)').hexdigest(), 16) % 2**31
    order = list(range(10))
    np.random.RandomState(seed).shuffle(order)
    parts = domain_parts(10, {'train': 0.8, 'val': 0.2}, trial=3, domain=1)
    assert {i for i, part in enumerate(parts) if part == 'val'} == set(order[:2])


@pytest.fixture(scope='module')
def styles(tmp_path_factory):
    """Three styles of the same forty concepts; two of them are one drawing."""
    root = tmp_path_factory.mktemp('styles')
    for style in ('flat', 'bold', 'line'):
        for i in range(40):
            path = root / style / ('cat' if i % 2 else 'dog') / f'thing{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return str(root)


def test_by_stem_no_concept_is_in_two_parts_of_any_domains(styles):
    cut = dict(split_by='stem', fractions=dict(train=0.6, val=0.2, test=0.2))
    seen = {part: stems(read(styles, parts=[part], **cut)) for part in cut['fractions']}
    assert not seen['train'] & seen['val'] and not seen['val'] & seen['test']
    assert set.union(*seen.values()) == {f'thing{i}' for i in range(40)}
    assert stems(read(styles, parts=['val'], **cut), domain='line') == seen['val']
    assert stems(read(styles, parts=['val'], trial=1, **cut)) != seen['val']


def test_a_group_is_held_out_as_a_whole(styles):
    groups = [['flat', 'bold']]
    dataset = read(styles, held_out=['flat'], groups=groups, sources_only=True)
    assert {x['domain'] for x in infos(dataset)} == {'line'}
    assert dataset.metainfo['held_out'] == ('bold', 'flat')
    assert leave_outs(['bold', 'flat', 'line'], groups) == [('bold', 'flat'), ('line',)]
    with pytest.raises(ValueError, match='leaves no domain to train on'):
        read(styles, held_out=['flat', 'line'], groups=groups)
    with pytest.raises(
        ValueError, match="held_out: domain 'lines' is unknown; did you mean 'line'"
    ):
        read(styles, held_out=['lines'])
    with pytest.raises(ValueError, match="'flat' is in two groups"):
        leave_outs(['flat', 'bold', 'line'], [['flat', 'bold'], ['flat', 'line']])


def test_wrong_parts_are_refused(styles):
    with pytest.raises(ValueError, match=r"parts \['test'\] must be among the fractions"):
        read(styles, parts=['test'])
    with pytest.raises(ValueError, match="parts must be a list of names, got 'val'"):
        read(styles, parts='val')
    with pytest.raises(ValueError, match="split_by must be 'domain' or 'stem'"):
        read(styles, split_by='class')


# -- batches ---------------------------------------------------------------------------------------


def batches(dataset, seed=0, size=4):
    return DomainBatchSampler(InfiniteSampler(dataset, seed=seed), batch_size=size)


def test_a_batch_has_as_many_images_of_every_source(styles):
    dataset = read(styles, held_out=['bold'], sources_only=True, parts=['train'])
    domains = [x['domain'] for x in infos(dataset)]
    drawn = list(islice(batches(dataset), 16))
    for batch in drawn:
        assert [domains[i] for i in batch] == ['flat'] * 4 + ['line'] * 4
    # 32 images a domain: eight batches are one pass, then another in a new order.
    for domain in ('flat', 'line'):
        members = [[i for i in batch if domains[i] == domain] for batch in drawn]
        passes = sum(members[:8], []), sum(members[8:], [])
        assert sorted(passes[0]) == sorted(passes[1]) and len(set(passes[0])) == 32
        assert passes[0] != passes[1]
    assert drawn == list(islice(batches(dataset), 16))
    assert drawn != list(islice(batches(dataset, seed=1), 16))


def test_processes_share_a_domains_pass(styles, monkeypatch):
    dataset = read(styles, held_out=['bold'], sources_only=True, parts=['train'])
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr('mmdet_moe.datasets.sampler.get_dist_info', lambda rank=rank: (rank, 2))
        seen += sum(islice(batches(dataset), 4), [])
    assert sorted(seen) == list(range(64))


def test_a_resumed_training_goes_to_its_batch_without_loading_those_before(styles):
    dataset = read(styles, held_out=['bold'], sources_only=True, parts=['train'])
    wanted = list(islice(batches(dataset), 8))
    loaded = []

    class Numbers:
        def __getitem__(self, index):
            loaded.append(index)
            return index

    loader = DataLoader(Numbers(), batch_sampler=batches(dataset), collate_fn=list)
    stream = _ResumedIterator(_InfiniteDataloaderIterator(loader), 5, lambda: None)
    if hasattr(stream, 'skip_iter'):
        stream.skip_iter(5)  # as the loop does
    else:
        for _ in range(5):
            next(stream)
    assert [next(stream) for _ in range(3)] == wanted[5:]
    assert loaded == sum(wanted[5:], [])


def test_recipes_are_those_that_were_published():
    assert recipe('sf_moe', 'VLCS') == dict(lr=1e-5, weight_decay=1e-6)
    assert recipe('gmoe', 'OfficeHome')['lr'] == 1e-5
    assert recipe('moa', 'DomainNet') == dict(lr=5e-5, weight_decay=0.0)
    with pytest.raises(ValueError, match="'gmoes' is unknown; did you mean 'gmoe'"):
        recipe('gmoes', 'PACS')
