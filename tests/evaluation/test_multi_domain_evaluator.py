"""Each image counts in its own domain, in that domain's labels."""

import json
import math
import multiprocessing
import os

import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric, DumpDetResults
from mmdet.structures import DetDataSample
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.structures import InstanceData

from mmdet_moe.evaluation import MultiDomainEvaluator
from mmdet_moe.registry import DATASETS, EVALUATOR, METRICS
from mmdet_moe.structures import LabelSpaceError

DOMAINS = ('ink', 'heat', 'blue')


@pytest.fixture
def val(tiny_dataset, mmdet_moe_scope):
    return DATASETS.build(tiny_dataset('val'))


def coco(root, name, **kwargs):
    return {'type': 'CocoMetric', 'ann_file': f'{root}/{name}/val.json', **kwargs}


def perfect(sample):
    """The ground truth of ``sample`` as its prediction."""
    truth = sample.gt_instances
    sample.pred_instances = InstanceData(
        bboxes=truth.bboxes.tensor.clone(),
        labels=truth.labels.clone(),
        scores=torch.ones(len(truth)),
    )
    truth.bboxes = truth.bboxes.tensor
    sample.ignored_instances.bboxes = sample.ignored_instances.bboxes.tensor
    return sample


def noisy(sample, seed):
    """Boxes shifted, some of another class of the same domain, some extra."""
    sample = perfect(sample)
    rng = np.random.default_rng(seed)
    boxes = sample.pred_instances.bboxes.numpy()
    boxes = np.concatenate([boxes, boxes + rng.integers(2, 9, boxes.shape)])
    labels = np.tile(sample.pred_instances.labels.numpy(), 2)
    choices = {'ink': [0, 1, 2], 'heat': [3, 0], 'blue': [4]}[sample.domain]
    swap = rng.random(len(labels)) < 0.4
    labels[swap] = rng.choice(choices, swap.sum())
    sample.pred_instances = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32),
        labels=torch.tensor(labels),
        scores=torch.tensor(rng.random(len(labels)), dtype=torch.float32),
    )
    return sample


def run(evaluator, dataset, predict=perfect, order=None):
    evaluator.dataset_meta = dataset.metainfo
    for index in range(len(dataset)) if order is None else order:
        evaluator.process([predict(dataset[index]['data_samples'])], None)
    return evaluator.evaluate(len(dataset))


def test_perfect_predictions_score_one_in_every_domain(val, tiny_domains, tiny_label_space):
    evaluator = EVALUATOR.build(
        dict(
            type='MultiDomainEvaluator',
            label_space=tiny_label_space,
            metrics=dict(
                ink=[coco(tiny_domains, 'ink', classwise=True), dict(type='VOCMetric')],
                heat=coco(tiny_domains, 'heat'),
                blue=[dict(type='VOCMetric')],
            ),
        )
    )
    values = run(evaluator, val)
    assert values['ink/coco/bbox_mAP'] == values['heat/coco/bbox_mAP'] == 1.0
    assert values['ink/pascal_voc/mAP'] == values['blue/pascal_voc/mAP'] == 1.0
    assert values['macro/coco/bbox_mAP'] == values['macro/pascal_voc/mAP'] == 1.0
    assert not any(name.startswith('blue/coco') for name in values)


def test_coco_metric_may_take_the_ground_truth_from_the_samples(tiny_dataset, mmdet_moe_scope):
    pipeline = tiny_dataset()['pipeline']
    meta_keys = ('img_id', 'ori_shape', 'instances')
    pipeline[-1] = {'type': 'PackDetInputs', 'meta_keys': meta_keys}
    dataset = DATASETS.build(tiny_dataset('val', pipeline=pipeline))
    metrics = {name: {'type': 'CocoMetric'} for name in DOMAINS}
    evaluator = MultiDomainEvaluator(dataset.label_space, metrics)
    values = run(evaluator, dataset)
    assert [values[f'{name}/coco/bbox_mAP'] for name in DOMAINS] == [1.0, 1.0, 1.0]


def test_numbers_are_those_of_mmdet_alone(val, tiny_dataset, tiny_domains):
    evaluator = MultiDomainEvaluator(
        val.label_space, {name: coco(tiny_domains, name, classwise=True) for name in DOMAINS}
    )
    # Shuffled, so that domains interleave.
    order = np.random.default_rng(0).permutation(len(val)).tolist()
    values = run(evaluator, val, lambda s: noisy(s, s.sample_idx), order)
    expected = {}
    start = 0
    for name in DOMAINS:
        config = tiny_dataset('val')['domains'][name]
        classes = val.label_space.local_classes(name)
        data = json.loads((tiny_domains / name / 'val.json').read_text())
        data['categories'].sort(key=lambda cat: cat['id'])  # where mmdet's class names are right
        (tiny_domains / f'{name}_sorted.json').write_text(json.dumps(data))
        plain = DATASETS.build(
            {**config, 'metainfo': {'classes': classes}, 'ann_file': f'../{name}_sorted.json'}
        )
        names = [cat['name'] for cat in data['categories']]
        metric = CocoMetric(ann_file=f'{tiny_domains}/{name}_sorted.json', classwise=True)
        alone = Evaluator(metric)
        alone.dataset_meta = plain.metainfo
        for index in range(len(plain)):
            sample = noisy(val[start + index]['data_samples'], start + index)
            local = [
                names.index(val.label_space.classes[label])
                for label in sample.pred_instances.labels
            ]
            sample.pred_instances.labels = torch.tensor(local)
            alone.process([sample], None)
        for key, value in alone.evaluate(len(plain)).items():
            expected[f'{name}/{key}'] = value
        start += len(plain)
    got = {key: value for key, value in values.items() if not key.startswith('macro/')}
    assert got.keys() == expected.keys()
    assert 0 < expected['ink/coco/bbox_mAP'] < 1
    for key, value in expected.items():
        assert got[key] == value or (math.isnan(got[key]) and math.isnan(value)), key
    mean = np.mean([expected[f'{name}/coco/bbox_mAP'] for name in DOMAINS])
    assert values['macro/coco/bbox_mAP'] == pytest.approx(mean)


@METRICS.register_module()
class Tally(BaseMetric):
    """Reports how many images it saw, and whatever it is told to."""

    default_prefix = 'tally'

    def __init__(self, **values):
        super().__init__()
        self.values = values

    def process(self, data_batch, data_samples):
        for sample in data_samples:
            labels = sample['pred_instances']['labels']
            self.results.append((sample['img_id'], torch.as_tensor(labels).tolist()))

    def compute_metrics(self, results):
        self.seen = results
        return {'images': len(results), **self.values}


def tally_evaluator(**values):
    space = {'domains': {'a': ['x', 'y'], 'b': ['z', 'x'], 'c': ['w']}}
    metrics = {name: Tally(**values.get(name, {})) for name in 'abc'}
    return MultiDomainEvaluator(space, metrics), metrics


def sample(domain, img_id, labels=(), truth=(0,), **meta):
    element = DetDataSample(metainfo=dict(domain=domain, img_id=img_id, **meta))
    element.pred_instances = InstanceData(
        labels=torch.tensor(labels, dtype=torch.long), scores=torch.rand(len(labels))
    )
    if truth is not None:
        element.gt_instances = InstanceData(labels=torch.tensor(truth, dtype=torch.long))
    return element


def test_each_image_goes_to_its_domain_in_local_labels():
    evaluator, metrics = tally_evaluator()
    # unified: x 0, y 1, z 2, w 3
    evaluator.process([sample('a', 1, (0, 1)), sample('b', 1, (0, 2)), sample('a', 2, (1, 3, 0))])
    values = evaluator.evaluate(3)
    assert metrics['a'].seen == [(1, [0, 1]), (2, [1, 0])]  # w is not a class of a: dropped
    assert metrics['b'].seen == [(1, [1, 0])]  # b lists z first
    assert values['a/tally/images'] == 2 and values['b/tally/images'] == 1
    assert 'c/tally/images' not in values
    assert values['macro/tally/images'] == 1.5


def test_samples_are_left_as_they_were():
    evaluator, _ = tally_evaluator()
    element = sample('b', 1, (0, 2, 3), truth=(2,))
    evaluator.process([element])
    assert element.pred_instances.labels.tolist() == [0, 2, 3]
    assert element.gt_instances.labels.tolist() == [2]


def test_padding_counts_once():
    evaluator, metrics = tally_evaluator()
    batch = [sample('a', 7, sample_idx=0), sample('a', 7, sample_idx=1), sample('a', 8)]
    evaluator.process(batch + batch)
    assert evaluator.evaluate(3)['a/tally/images'] == 3  # image ids may repeat, indices do not
    evaluator.process(batch)
    assert evaluator.evaluate(3)['a/tally/images'] == 3  # and nothing stays from one to the next


def test_the_average_leaves_out_domains_that_say_nothing():
    evaluator, _ = tally_evaluator(
        a={'ap': 0.5, 'note': '0.5'}, b={'ap': 0.1}, c={'ap': 0.9, 'nowhere': -1.0}
    )
    evaluator.process([sample('a', 1), sample('b', 1), sample('c', 1, truth=())])
    values = evaluator.evaluate(3)
    assert values['c/tally/ap'] == 0.9  # reported, but c has no ground truth at all
    assert values['macro/tally/ap'] == pytest.approx((0.5 + 0.1) / 2)
    assert math.isnan(values['macro/tally/nowhere'])
    assert 'macro/tally/note' not in values
    evaluator, _ = tally_evaluator(a={'ap': 0.5}, b={'ap': -1.0}, c={'ap': math.nan})
    evaluator.process([sample(name, 1, truth=None) for name in 'abc'])
    assert evaluator.evaluate(3)['macro/tally/ap'] == 0.5


def test_a_domain_without_detections_counts_as_zero(val, tiny_domains):
    def only_ink(element):
        element = perfect(element)
        if element.domain != 'ink':
            element.pred_instances = element.pred_instances[:0]
        return element

    evaluator = MultiDomainEvaluator(
        val.label_space, {name: coco(tiny_domains, name, classwise=True) for name in DOMAINS}
    )

    def no_detections(element):
        element = perfect(element)
        element.pred_instances = element.pred_instances[:0]
        return element

    values = run(evaluator, val, only_ink)
    aps = [values[f'{name}/coco/bbox_mAP'] for name in DOMAINS]
    assert aps == [1.0, 0.0, 0.0]
    assert values['macro/coco/bbox_mAP'] == pytest.approx(1 / 3)
    nothing = run(evaluator, val, no_detections)
    assert nothing['macro/coco/bbox_mAP'] == 0  # a key for save_best even then


def test_dumped_predictions_evaluate_offline(val, tiny_domains, tmp_path):
    metrics = {name: coco(tiny_domains, name) for name in DOMAINS}
    evaluator = MultiDomainEvaluator(val.label_space, metrics)
    # What mmdet's tools/test.py --out does.
    evaluator.metrics.append(DumpDetResults(out_file_path=str(tmp_path / 'out.pkl')))
    online = run(evaluator, val)
    from mmengine.fileio import load

    dumped = load(str(tmp_path / 'out.pkl'))
    assert len(dumped) == len(val)
    for index, item in enumerate(dumped):  # in the dataset's order and in unified labels
        assert item['pred_instances']['labels'].tolist() == val.get_cat_ids(index)
    again = MultiDomainEvaluator(val.label_space, metrics)
    again.dataset_meta = val.metainfo
    assert again.offline_evaluate(dumped, chunk_size=2) == online


def test_wrong_input_is_refused(val, tiny_domains, tiny_label_space):
    space = tiny_label_space
    with pytest.raises(TypeError, match=r"metrics must map.*\['ink', 'heat', 'blue'\]"):
        MultiDomainEvaluator(space, {'type': 'CocoMetric'})
    with pytest.raises(LabelSpaceError, match="unknown domain 'hot'"):
        MultiDomainEvaluator(space, {'hot': Tally()})
    with pytest.raises(LabelSpaceError, match="domain 'ink': class 'cat' is not in the annot"):
        MultiDomainEvaluator(space, {'ink': coco(tiny_domains, 'blue')})
    evaluator = MultiDomainEvaluator(space, {'ink': Tally()})
    with pytest.raises(LabelSpaceError, match=r"no metrics for domain 'heat'.*\['ink'\]"):
        evaluator.dataset_meta = val.metainfo
    with pytest.raises(LabelSpaceError, match="image 3 has domain None.*\\['ink'\\]"):
        evaluator.process([{'img_id': 3, 'pred_instances': {}}])
    other = MultiDomainEvaluator({'domains': {'ink': ['cat']}}, {'ink': Tally()})
    with pytest.raises(LabelSpaceError, match="the dataset's label space is not the evaluator's"):
        other.dataset_meta = val.metainfo
    twice = MultiDomainEvaluator(space, {'ink': [Tally(), Tally()]})
    twice.process([sample('ink', 1)])
    with pytest.raises(ValueError, match="two metrics of domain 'ink' report 'tally/images'"):
        twice.evaluate(1)


def evaluate_share(rank, folder, queue):
    """One of two processes: evaluates every second image of a stream, the last one padding."""
    os.chdir(folder)  # mmengine leaves its temporary results in the working directory
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2
    )
    stream = [sample(name, index, sample_idx=index) for index, name in enumerate('aaabacb')]
    stream.append(stream[0])
    evaluator, metrics = tally_evaluator()
    evaluator.process(stream[rank::2])
    values = evaluator.evaluate(7)
    queue.put((rank, values, [getattr(metric, 'seen', None) for metric in metrics.values()]))


def test_two_processes_evaluate_as_one(tmp_path):
    """Their shares of the domains are unequal: 2, 1, 1 images and 2 (+ 1 of padding), 1, 0."""
    context = multiprocessing.get_context('fork')
    queue = context.Queue()
    workers = [
        context.Process(target=evaluate_share, args=(rank, tmp_path, queue), daemon=True)
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    results = sorted(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    counts = {'a/tally/images': 4, 'b/tally/images': 2, 'c/tally/images': 1}
    for _, values, _ in results:
        assert values == {**counts, 'macro/tally/images': 7 / 3}
    # In the dataset's order.
    seen = [[img_id for img_id, _ in items] for items in results[0][2]]
    assert seen == [[0, 1, 2, 4], [3, 6], [5]]


def test_small_and_large_domains_have_averages_of_their_own():
    values = dict(a={'ap': 0.5}, b={'ap': 0.1}, c={'ap': 0.9})
    space = {'domains': {'a': ['x', 'y'], 'b': ['z', 'x'], 'c': ['w']}}
    batch = [sample(name, 1) for name in 'abc']

    def averages(**options):
        metrics = {name: Tally(**values[name]) for name in 'abc'}
        evaluator = MultiDomainEvaluator(space, metrics, **options)
        evaluator.process(batch)
        found = evaluator.evaluate(3)
        return [found.get(f'{group}/tally/ap') for group in ('macro', 'small', 'large')]

    # (0.5 + 0.1 + 0.9) / 3 = 0.5; small b and c: (0.1 + 0.9) / 2 = 0.5, large a.
    assert averages() == [pytest.approx(0.5), None, None]
    assert averages(small=['c', 'b']) == [pytest.approx(0.5), pytest.approx(0.5), 0.5]
    sizes = dict(a=100, b=2000, c=300)
    # The smaller half of three is one: a. Less than 301 images: a and c, (0.5 + 0.9) / 2 = 0.7.
    assert averages(train_images=sizes) == [pytest.approx(0.5), 0.5, pytest.approx(0.5)]
    assert averages(train_images=sizes, small=301) == [pytest.approx(0.5), pytest.approx(0.7), 0.1]
    with pytest.raises(ValueError, match='small=301 is a number.*give train_images'):
        averages(small=301)
    with pytest.raises(ValueError, match=r"no number for \['b'\]"):
        averages(train_images=dict(a=1, c=2))


def test_the_guess_is_right_as_often_as_it_names_the_domain():
    evaluator, _ = tally_evaluator()
    guesses = dict(a=['a', 'b', 'a', 'a'], b=['b', 'c'])
    for domain, found in guesses.items():
        for index, name in enumerate(found):
            evaluator.process([sample(domain, index, nearest_domain=name)])
    evaluator.process([sample('c', 1)])  # told, not guessed
    values = evaluator.evaluate(7)
    # 3 of 4, 1 of 2, and their mean: 0.625.
    assert values['a/guess/accuracy'] == 0.75 and values['b/guess/accuracy'] == 0.5
    assert values['macro/guess/accuracy'] == 0.625
    assert 'c/guess/accuracy' not in values


def test_the_unrestricted_reading_has_keys_of_its_own():
    evaluator, metrics = tally_evaluator()
    element = sample('a', 1, (0, 1))
    other = InstanceData(labels=torch.tensor([3, 0, 2]), scores=torch.rand(3))
    element.pred_instances_unrestricted = other
    evaluator.process([element])
    values = evaluator.evaluate(1)
    assert values['a/tally/images'] == values['a/unrestricted/tally/images'] == 1
    assert values['macro/unrestricted/tally/images'] == 1
    # w and z are no classes of a: of the second reading only x is left.
    assert metrics['a'].seen == [(1, [0])]
    assert element.pred_instances.labels.tolist() == [0, 1]


def test_voc_ap50_is_mmdets(val):
    """11 points at IoU 0.5, by the function that mmdet's own test calls."""
    from mmdet.evaluation import eval_map

    metric = dict(type='VOCMetric', iou_thrs=0.5, metric='mAP', eval_mode='11points')
    evaluator = MultiDomainEvaluator(val.label_space, {name: [metric] for name in DOMAINS})
    values = run(evaluator, val, lambda s: noisy(s, s.sample_idx))
    expected, start = {}, 0
    for name, size in val.domain_sizes.items():
        ids = val.label_space.unified_ids(name)
        detections, truths = [], []
        for index in range(start, start + size):
            item = noisy(val[index]['data_samples'], index)
            found, truth = item.pred_instances, item.gt_instances
            rows = torch.cat([found.bboxes, found.scores[:, None]], dim=1).numpy()
            detections.append([rows[(found.labels == k).numpy()] for k in ids])
            labels = np.array([ids.index(k) for k in truth.labels.tolist()])
            truths.append(dict(bboxes=truth.bboxes.numpy(), labels=labels))
        start += size
        expected[name], _ = eval_map(
            detections,
            truths,
            iou_thr=0.5,
            eval_mode='11points',
            use_legacy_coordinate=True,
            logger='silent',
        )
        assert values[f'{name}/pascal_voc/mAP'] == pytest.approx(expected[name], abs=1e-6)
    assert 0 < min(expected.values()) < 1
    assert values['macro/pascal_voc/mAP'] == pytest.approx(sum(expected.values()) / 3, abs=1e-6)
