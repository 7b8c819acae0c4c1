"""Several datasets as one: labels by name, samples tagged with their domain."""

import copy
import json
import pickle

import numpy as np
import pytest
from mmengine.config import ConfigDict
from mmengine.dataset import BaseDataset, Compose

from mmdet_moe.datasets import DomainDataset, MultiDomainDataset
from mmdet_moe.registry import DATASETS
from mmdet_moe.structures import LabelSpaceError

pytestmark = pytest.mark.usefixtures('mmdet_moe_scope')

# ink: cat 0, dog 1, cow 2; heat: car 3, cat 0; blue: bolt 4
UNIFIED = {'cat': 0, 'dog': 1, 'cow': 2, 'car': 3, 'bolt': 4}


def written_labels(root, name, split='train'):
    """Unified labels of each image, straight from the JSON by name."""
    data = json.loads((root / name / f'{split}.json').read_text())
    names = {cat['id']: cat['name'] for cat in data['categories']}
    return [
        [
            UNIFIED[names[ann['category_id']]]
            for ann in data['annotations']
            if ann['image_id'] == image['id']
        ]
        for image in data['images']
    ]


def test_labels_are_unified_by_name_whatever_the_order_of_categories(tiny_dataset, tiny_domains):
    dataset = DATASETS.build(tiny_dataset())
    expected = sum((written_labels(tiny_domains, name) for name in ('ink', 'heat', 'blue')), [])
    assert len(dataset) == 12 + 5 + 3 == len(expected)
    for index, labels in enumerate(expected):
        sample = dataset[index]['data_samples']
        assert sample.gt_instances.labels.tolist() == labels
        assert dataset.get_cat_ids(index) == labels
        info = dataset.get_data_info(index)
        assert [item['bbox_label'] for item in info['instances']] == labels


def test_samples_say_where_they_come_from(tiny_dataset):
    dataset = DATASETS.build(tiny_dataset())
    assert dataset.domain_sizes == {'ink': 12, 'heat': 5, 'blue': 3}
    domains = ['ink'] * 12 + ['heat'] * 5 + ['blue'] * 3
    for index, domain in enumerate(domains):
        sample = dataset[index]['data_samples']
        assert sample.domain == domain == dataset.domain_of(index)
        assert sample.metainfo['sample_idx'] == index
    assert dataset[-1]['data_samples'].sample_idx == 19
    assert len(list(dataset)) == 20  # iteration ends, as mmdet's browse_dataset needs it to
    with pytest.raises(IndexError, match='index 20 is out of range for 20 images'):
        dataset[20]


def test_the_serialised_cache_of_the_datasets_is_left_alone(tiny_dataset):
    config = tiny_dataset()
    heat = config['domains']['heat']
    heat['serialize_data'] = True
    plain = DATASETS.build({**heat, 'metainfo': {'classes': ('car', 'cat')}})
    dataset = DATASETS.build(config)
    wrapped = dataset.datasets['heat'].dataset
    for index in (0, 0, 3):
        dataset.get_data_info(12 + index)
    assert np.array_equal(wrapped.data_bytes, plain.data_bytes)
    assert 'domain' not in wrapped.get_data_info(0)


def test_metainfo_is_a_plain_dict_even_before_anything_is_read(tiny_dataset):
    config = ConfigDict(tiny_dataset(lazy_init=True))
    for item in config.domains.values():
        item.data_root = '/no/such/place/'
    meta = DATASETS.build(config).metainfo
    assert type(meta) is dict
    assert meta['classes'] == ('cat', 'dog', 'cow', 'car', 'bolt')
    assert meta['domains'] == ('ink', 'heat', 'blue')
    assert meta['domain_meta']['heat']['classes'] == ('car', 'cat')
    assert len(meta['palette']) == 5 and len(set(meta['palette'])) == 5
    assert meta == DATASETS.build(tiny_dataset()).metainfo
    assert 'ConfigDict' not in repr(pickle.dumps(meta))


def test_a_missing_file_is_reported_with_its_domain(tiny_dataset):
    config = tiny_dataset()
    config['domains']['heat']['ann_file'] = 'nowhere.json'
    with pytest.raises(FileNotFoundError, match="domain 'heat': .*nowhere.json"):
        DATASETS.build(config)


def test_leaving_a_domain_out_shifts_no_id(tiny_dataset):
    config = tiny_dataset()
    del config['domains']['ink']
    dataset = DATASETS.build(config)
    assert dataset.metainfo['classes'] == ('cat', 'dog', 'cow', 'car', 'bolt')
    assert dataset.metainfo['domains'] == ('heat', 'blue')
    assert set(dataset.get_cat_ids(5)) == {4}


def label_space(**changes):
    return {'domains': {'ink': ['cat', 'dog', 'cow'], 'heat': ['car', 'cat'], **changes}}


@pytest.mark.parametrize(
    'heat, message',
    [
        (
            ['car', 'cta'],
            r"class 'cta' .* not in .*train.json.*\['car', 'cat'\]; did you mean 'cat'",
        ),
        (['car', 'cat', 'horse'], "class 'horse' of the label space is not in"),
        (['cat'], r"boxes of \['car'\], which the label space does not list.*metainfo=dict"),
    ],
)
def test_classes_that_do_not_match_are_refused(tiny_dataset, heat, message):
    config = tiny_dataset(label_space=label_space(heat=heat, blue=['bolt']))
    with pytest.raises(LabelSpaceError, match=f"domain 'heat': .*{message}"):
        DATASETS.build(config)


def test_categories_may_be_left_out_knowingly(tiny_dataset, tiny_domains):
    config = tiny_dataset(label_space=label_space(heat=['cat'], blue=['bolt']))
    config['domains']['heat']['metainfo'] = {'classes': ['cat']}
    dataset = DATASETS.build(config)
    found = [dataset.get_cat_ids(12 + index) for index in range(5)]
    assert found == [[x for x in row if x == 0] for row in written_labels(tiny_domains, 'heat')]
    config['domains']['heat']['metainfo'] = {'classes': ['car']}
    with pytest.raises(LabelSpaceError, match=r"metainfo has classes \['car'\], the label space"):
        DATASETS.build(config)


def test_unknown_domains_are_refused(tiny_dataset):
    config = tiny_dataset()
    config['domains']['heet'] = config['domains'].pop('heat')
    with pytest.raises(LabelSpaceError, match=r"unknown domain 'heet'.*\['ink', 'heat', 'blue'\]"):
        DATASETS.build(config)
    with pytest.raises(LabelSpaceError, match="unknown domain 'hot'"):
        DATASETS.build(tiny_dataset(domain_pipelines={'hot': []}))
    config = tiny_dataset(domain_pipelines={'blue': []})
    del config['domains']['blue']
    with pytest.raises(LabelSpaceError, match=r"domain_pipelines names \['blue'\]"):
        DATASETS.build(config)
    with pytest.raises(LabelSpaceError, match='no domains given'):
        DATASETS.build(tiny_dataset(domains={}))


def mark(value):
    def transform(results):
        return {**results, 'mark': value}

    return transform


def test_pipelines_are_shared_or_per_domain_and_can_be_switched(tiny_dataset):
    config = tiny_dataset(pipeline=[mark('shared')], domain_pipelines={'heat': [mark('hot')]})
    config['domains']['blue']['pipeline'] = [mark('own')]
    dataset = DATASETS.build(config)
    assert [dataset[i]['mark'] for i in (0, 12, 17)] == ['shared', 'hot', 'own']
    assert dataset[12]['domain'] == 'heat'  # tagged though nothing packed a data sample
    dataset.pipeline = Compose([mark('switched')])  # what mmdet's PipelineSwitchHook does
    assert [dataset[i]['mark'] for i in (0, 12, 17)] == ['switched', 'hot', 'own']


def test_domains_never_share_the_state_of_a_transform(tiny_dataset):
    class Remember:
        def __init__(self):
            self.seen = []

        def __call__(self, results):
            self.seen.append(results['domain'])
            return {'seen': list(self.seen)}

    dataset = DATASETS.build(tiny_dataset(pipeline=[Remember()]))
    for index in (0, 12, 17, 1, 13):
        domains = set(dataset[index]['seen'])
        assert domains == {dataset.domain_of(index)}


def test_test_mode_is_set_on_every_domain(tiny_dataset):
    dataset = DATASETS.build(tiny_dataset(test_mode=True, pipeline=[lambda results: None]))
    with pytest.raises(Exception, match='None'):
        dataset[0]


@pytest.mark.parametrize('outer', ['RepeatDataset', 'ClassBalancedDataset'])
def test_it_may_be_wrapped(tiny_dataset, outer):
    extra = {'times': 2} if outer == 'RepeatDataset' else {'oversample_thr': 0.5}
    dataset = DATASETS.build({'type': outer, 'dataset': tiny_dataset(), **extra})
    assert len(dataset) >= 20
    assert dataset.metainfo['domains'] == ('ink', 'heat', 'blue')
    assert {dataset[index]['data_samples'].domain for index in range(len(dataset))} == {
        'ink',
        'heat',
        'blue',
    }


def test_the_datasets_of_a_domain_may_be_wrapped(tiny_dataset):
    config = tiny_dataset()
    ink, heat, blue = (config['domains'][name] for name in ('ink', 'heat', 'blue'))
    config['domains'] = {
        'ink': {
            'type': 'ConcatDataset',
            'datasets': [ink, {**ink, 'ann_file': 'val.json', 'data_prefix': {'img': 'val/'}}],
        },
        'heat': {'type': 'RepeatDataset', 'dataset': heat, 'times': 3},
        'blue': {'type': 'ClassBalancedDataset', 'dataset': blue, 'oversample_thr': 0.1},
    }
    dataset = DATASETS.build(config)
    assert dataset.domain_sizes == {'ink': 12 + 4, 'heat': 15, 'blue': 3}
    for index in range(len(dataset)):
        sample = dataset[index]['data_samples']
        assert sample.gt_instances.labels.tolist() == dataset.get_cat_ids(index)
        assert sample.domain == dataset.domain_of(index)
    assert set(dataset.get_cat_ids(16)) <= {0, 3}


def test_mosaics_stay_within_a_domain(tiny_dataset):
    config = tiny_dataset()
    config['domains']['heat'] = {
        'type': 'MultiImageMixDataset',
        'dataset': {**config['domains']['heat'], 'pipeline': config['pipeline'][:2]},
        'pipeline': [
            {'type': 'Mosaic', 'img_scale': (64, 64)},
            {'type': 'PackDetInputs', 'meta_keys': ('img_id',)},
        ],
    }
    dataset = DATASETS.build(config)
    sample = dataset[12]['data_samples']
    assert sample.domain == 'heat'
    assert set(sample.gt_instances.labels.tolist()) <= {0, 3}


VOC_XML = """<annotation><size><width>64</width><height>48</height></size>{}</annotation>"""
OBJECT = (
    '<object><name>{}</name><difficult>0</difficult><bndbox><xmin>5</xmin><ymin>5</ymin>'
    '<xmax>25</xmax><ymax>25</ymax></bndbox></object>'
)


def xml_dataset(root, per_image):
    (root / 'Annotations').mkdir()
    for index, names in enumerate(per_image):
        text = VOC_XML.format(''.join(OBJECT.format(name) for name in names))
        (root / 'Annotations' / f'{index}.xml').write_text(text)
    (root / 'train.txt').write_text('\n'.join(str(index) for index in range(len(per_image))))
    return {
        'type': 'XMLDataset',
        'data_root': str(root),
        'ann_file': 'train.txt',
        'data_prefix': {'sub_data_root': ''},
    }


def test_xml_datasets_work_too(tmp_path):
    config = xml_dataset(tmp_path, [['dog', 'cat'], ['dog']])
    space = {'domains': {'first': ['dog', 'bird'], 'xml': ['cat', 'dog', 'bird']}}
    dataset = MultiDomainDataset(space, {'xml': config})
    assert dataset.metainfo['classes'] == ('dog', 'bird', 'cat')
    assert [dataset.get_cat_ids(index) for index in (0, 1)] == [[0, 2], [0]]  # no bird: rare, fine


def test_a_class_misspelt_in_xml_is_refused_rather_than_dropped(tmp_path):
    config = xml_dataset(tmp_path, [['dog', 'cat'], ['dog']])
    space = {'domains': {'xml': ['kat', 'dog']}}
    with pytest.raises(LabelSpaceError, match="class 'kat' .* did you mean 'cat'"):
        MultiDomainDataset(space, {'xml': config})
    space = {'domains': {'xml': ['dog']}}
    with pytest.raises(LabelSpaceError, match=r"boxes of \['cat'\], which the label space does"):
        MultiDomainDataset(space, {'xml': config})
    knowingly = {**config, 'metainfo': {'classes': ['dog']}}
    dataset = MultiDomainDataset(space, {'xml': knowingly})
    assert [dataset.get_cat_ids(index) for index in (0, 1)] == [[0], [0]]


def test_a_dataset_with_classes_of_its_own_goes_by_them(tmp_path):
    """OpenMMLab's own format: labels index the classes in metainfo."""
    instances = [
        {'bbox': [1, 1, 20, 20], 'bbox_label': label, 'ignore_flag': 0} for label in (1, 0)
    ]
    content = {
        'metainfo': {'classes': ['b', 'a']},
        'data_list': [{'img_path': 'x.png', 'height': 48, 'width': 64, 'instances': instances}],
    }
    (tmp_path / 'data.json').write_text(json.dumps(content))
    config = {
        'type': 'BaseDetDataset',
        'ann_file': str(tmp_path / 'data.json'),
        'metainfo': {'classes': ['b', 'a']},
    }
    dataset = MultiDomainDataset({'domains': {'d': ['a', 'b']}}, {'d': config})
    assert dataset.get_cat_ids(0) == [0, 1]  # label 1 is 'a', label 0 'b'


def test_built_datasets_are_taken_as_they_are(tiny_dataset):
    config = tiny_dataset()
    heat = DATASETS.build({**config['domains']['heat'], 'metainfo': {'classes': ('cat', 'car')}})
    assert isinstance(heat, BaseDataset)
    dataset = MultiDomainDataset(config['label_space'], {'heat': heat}, config['pipeline'])
    twin = DATASETS.build(copy.deepcopy(config))
    assert [dataset.get_cat_ids(i) for i in range(5)] == [
        twin.get_cat_ids(12 + i) for i in range(5)
    ]


def test_subsets_are_left_to_the_wrapped_dataset(tiny_dataset):
    config = tiny_dataset()
    config['domains']['ink']['indices'] = 4
    dataset = DATASETS.build(config)
    assert dataset.domain_sizes == {'ink': 4, 'heat': 5, 'blue': 3}
    with pytest.raises(NotImplementedError, match='indices'):
        dataset.datasets['ink'].get_subset(3)


def test_it_travels_to_worker_processes(tiny_dataset):
    dataset = DATASETS.build(tiny_dataset())
    copy_ = pickle.loads(pickle.dumps(dataset))
    assert copy_.get_cat_ids(13) == dataset.get_cat_ids(13)
    assert isinstance(copy_.datasets['ink'], DomainDataset)
