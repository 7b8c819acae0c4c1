"""What the record says is what the layers did: sums by hand, and real runs."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from expert_runs import classifier_config, detector_config
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import nn

from mmdet_moe.engine import ExpertRecordHook
from mmdet_moe.engine.expert_record import (
    ExpertRecord,
    LayerRecord,
    Objects,
    area_bins,
    groups,
    object_levels,
    specialisation,
    statistics,
)
from mmdet_moe.engine.hooks import expert_record_hook
from mmdet_moe.engine.hooks.expert_record_hook import (
    _Recorder,
    annotations_are_resized,
    reduce_calls,
)
from mmdet_moe.evaluation import expert_statistics
from mmdet_moe.moe import Routing, RoutingState, moe_layers, replace_modules

# -- one forward -----------------------------------------------------------------------------------


def routing(weights, logits=None):
    return Routing.from_dense(
        torch.tensor(weights), None if logits is None else torch.tensor(logits)
    )


def test_each_call_of_each_image_is_kept():
    fine = routing([[0.75, 0.25, 0], [0, 1.0, 0]], [[2.0, 1, 0], [0, 3, -math.inf]])
    coarse = routing([[0, 0.5, 0.5], [1.0, 0, 0]], [[0.0, 1, 1], [1, 0, 0]])
    features, pairs = reduce_calls([fine, coarse], images=2)
    assert features.shape == (2, 2, 3 + 3 + 1 + 3)
    weight, share, effective, logits = features.split([3, 3, 1, 3], 2)
    assert weight.tolist() == [[[0.75, 0.25, 0], [0, 0.5, 0.5]], [[0, 1, 0], [1, 0, 0]]]
    assert share.tolist() == [[[1, 1, 0], [0, 1, 1]], [[0, 1, 0], [1, 0, 0]]]
    # exp(-(3/4 ln 3/4 + 1/4 ln 1/4)) = 1.7548; two equal experts are 2, one is 1.
    assert effective[:, :, 0].tolist() == pytest.approx(np.array([[1.7548, 2], [1, 1]]), abs=1e-4)
    assert logits[1, 0].tolist() == [0, 3, -1e4]
    # Items {0, 1}, {1}, {1, 2}, {0}.
    assert pairs.tolist() == [[2, 1, 0], [1, 3, 1], [0, 1, 1]]


def test_of_several_items_the_mean_is_kept():
    # Two images of two tokens; the last token was dropped.
    tokens = routing([[1.0, 0], [0.5, 0.5], [0, 1.0], [0, 0]])
    features, pairs = reduce_calls([tokens], images=2)
    # Image 0: weights (1.5, .5) / 2, selections (2, 1) / 2, effective (1 + 2) / 2.
    assert features[0, 0].tolist() == pytest.approx([0.75, 0.25, 1, 0.5, 1.5])
    assert features[1, 0].tolist() == pytest.approx([0, 0.5, 0, 0.5, 0.5])
    assert pairs.tolist() == [[2, 1], [1, 2]]


def test_calls_with_different_numbers_of_items_are_kept_beside_each_other():
    fine, coarse = routing([[1.0, 0], [1, 0], [0, 1], [0, 1]]), routing([[0, 1.0], [1, 0]])
    features, _ = reduce_calls([fine, coarse], images=2)
    assert features[:, :, :2].tolist() == [[[1, 0], [0, 1]], [[0, 1], [1, 0]]]


# -- sums over groups ------------------------------------------------------------------------------


@pytest.fixture
def record():
    """Three images, two levels, three experts, of which e2 has nothing; the last image is empty."""
    weight = np.array(
        [[[1, 0, 0], [0.5, 0.5, 0]], [[0, 1, 0], [0.25, 0.75, 0]], [[1, 0, 0], [1, 0, 0]]]
    )
    objects = Objects(
        image=np.array([0, 0, 0, 1]),
        label=np.array([0, 1, 1, 1]),
        area=np.array([0, 1, 2, 2]),
        level=np.array([0, 0, 1, 1]),
    )
    layer = LayerRecord(
        weight=weight,
        share=(weight > 0).astype(float),
        effective=np.ones((3, 2)),
        items=np.ones((3, 2), dtype=int),
        pairs=np.array([[5.0, 2, 0], [2, 3, 0], [0, 0, 0]]),
        logit_images=np.arange(2),
        logits=np.arange(12.0).reshape(2, 2, 3),
    )
    return ExpertRecord(
        images=['a.png', 'b.png', 'c.png'],
        domains=['ink', 'heat', None],
        classes=['cat', 'dog', 'cow'],
        objects=objects,
        levels=['P3', 'P4'],
        layers={'head': layer},
    )


def test_objects_count_for_the_decision_of_their_image_and_level(record):
    found = groups(record, 'head')
    # cat: image 0 level 0. dogs: image 0 level 0, image 0 level 1, image 1 level 1.
    assert found['class'].names == ['cat', 'dog']
    assert found['class'].number.tolist() == [1, 3]
    assert found['class'].weight.tolist() == [[1, 0, 0], [1.75, 1.25, 0]]
    assert found['class'].count.tolist() == [[1, 0, 0], [3, 2, 0]]
    # One object of each size but two large ones: .5 + .25 and .5 + .75.
    assert found['area'].names == ['small', 'medium', 'large']
    assert found['area'].weight.tolist() == [[1, 0, 0], [1, 0, 0], [0.75, 1.25, 0]]
    assert found['area'].mean[2].tolist() == [0.375, 0.625, 0]
    # All decisions of a level, the empty image's too.
    assert found['level'].weight.tolist() == [[2, 1, 0], [1.75, 1.25, 0]]
    assert found['level'].number.tolist() == [3, 3]
    assert found['level_area'].names == ['P3 small', 'P3 medium', 'P4 large']
    assert found['level_area'].weight.tolist() == [[1, 0, 0], [1, 0, 0], [0.75, 1.25, 0]]
    # An image without a domain is no domain's.
    assert found['domain'].names == ['heat', 'ink']
    assert found['domain'].weight.tolist() == [[0.25, 1.75, 0], [1.5, 0.5, 0]]
    assert found['domain'].number.tolist() == [2, 2]


def test_a_layer_that_decides_once_counts_for_all_objects_of_the_image(record):
    layer = record.layers['head']
    for key in ('weight', 'share', 'effective', 'items', 'logits'):
        setattr(layer, key, getattr(layer, key)[:, :1])
    found = groups(record, 'head')
    assert 'level' not in found and 'level_area' not in found
    # Three objects in image 0, which went to e0, and one in image 1, which went to e1.
    assert found['class'].weight.tolist() == [[1, 0, 0], [2, 1, 0]]
    assert found['area'].weight.tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 0]]


def test_the_numbers_of_a_layer(record):
    numbers = statistics(record, 'head')
    # Six decisions; e0: 1 + .5 + 0 + .25 + 1 + 1 = 3.75, e1: 2.25, e2: 0.
    assert numbers['items'] == 6
    assert numbers['importance'] == [3.75, 2.25, 0]
    assert numbers['count'] == [5, 3, 0]
    assert numbers['utilisation'] == pytest.approx([5 / 6, 0.5, 0], abs=1e-5)
    # Mean 2; deviations 1.75, .25, -2: sqrt((3.0625 + .0625 + 4) / 3) / 2 = .7706.
    assert numbers['cv_importance'] == pytest.approx(math.sqrt(7.125 / 3) / 2, abs=1e-5)
    assert numbers['living'] == 2
    assert numbers['effective_k'] == {'selected': pytest.approx(8 / 6, abs=1e-5), 'entropy': 1}
    assert set(numbers['information']) == {'domain', 'class', 'area', 'level'}


def test_specialisation_is_the_rows_part_of_the_mutual_information():
    # Average (1/2, 1/2); a row of one expert is ln 2 away from it, an even one 0.
    assert specialisation(np.array([[4.0, 0], [0, 2], [1, 3], [0, 0]])) == pytest.approx(
        [math.log(2), math.log(2), 0.25 * math.log(0.5) + 0.75 * math.log(1.5), 0]
    )


def test_a_record_comes_back_from_its_file(record):
    again = ExpertRecord.from_dict(json.loads(json.dumps(record.to_dict())))
    assert again.to_dict() == record.to_dict()
    with pytest.raises(ValueError, match='schema 99 is not 1'):
        ExpertRecord.from_dict({'schema': 99})


def test_records_of_two_processes_are_one(record):
    both = ExpertRecord.merge([record, record])
    assert both.images == record.images * 2
    assert both.objects.image.tolist() == [0, 0, 0, 1, 3, 3, 3, 4]
    assert both.layers['head'].logit_images.tolist() == [0, 1, 3, 4]
    for kind, group in groups(both, 'head').items():
        assert group.weight.tolist() == (2 * groups(record, 'head')[kind].weight).tolist()
    assert statistics(both, 'head')['pairs'] == (2 * record.layers['head'].pairs).tolist()


# -- objects ---------------------------------------------------------------------------------------


def test_the_level_is_that_of_the_anchor_of_best_iou():
    anchors = [np.array([[16.0, 16]]), np.array([[64.0, 64], [128, 32]])]
    # 32 x 32: 16² / 32² = 32² / 64² = 1/4, the finer one of equals; 33 x 33 is nearer to 64.
    # 120 x 30 is the second anchor of the coarse level; 2 x 2 and 999 x 999 lie at the ends.
    sizes = np.array([[16.0, 16], [64, 64], [32, 32], [33, 33], [120, 30], [2, 2], [999, 999]])
    assert object_levels(sizes, anchors).tolist() == [0, 1, 0, 1, 1, 0, 1]


def test_sizes_are_cocos():
    sides = np.array([31.9, 32.1, 95.9, 96.1])
    assert area_bins(sides**2).tolist() == [0, 1, 1, 2]


class LoadAnnotations:
    def __call__(self, results):
        return results


class Resize(LoadAnnotations):
    pass


class TestTimeAug(LoadAnnotations):
    __test__ = False

    def __init__(self, *subroutines):
        self.subroutines = [Compose(list(steps)) for steps in subroutines]


@pytest.mark.parametrize(
    ('steps', 'resized'),
    [
        ([Resize(), LoadAnnotations()], False),
        ([LoadAnnotations(), Resize()], True),
        ([Resize()], False),
        ([LoadAnnotations(), TestTimeAug([Resize()], [Resize()])], True),
        ([TestTimeAug([Resize(), LoadAnnotations()])], False),
    ],
)
def test_the_pipeline_tells_in_which_pixels_the_boxes_are(steps, resized):
    leaf = SimpleNamespace(pipeline=Compose(steps))
    assert annotations_are_resized(leaf) is resized
    assert annotations_are_resized(SimpleNamespace(dataset=leaf)) is resized
    nested = SimpleNamespace(pipeline=Compose([]), datasets={'a': leaf, 'b': leaf})
    assert annotations_are_resized(nested) is resized


def recorder_of(model, dataset_size=100, classes=('cat', 'dog'), **changes):
    dataset = type('Data', (), {'__len__': lambda self: dataset_size})()
    dataset.metainfo = dict(classes=classes)
    dataset.pipeline = Compose([])
    recorder = _Recorder(model, dataset, 10, SimpleNamespace(warning=print))
    vars(recorder).update(changes)
    return recorder


@pytest.fixture
def model():
    """A layer routed by a plan, in a model of nothing else."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    plan = dict(ink='e0', heat=dict(e0=0.5, e1=0.5))
    spec = dict(targets='0', router=dict(type='PlanRouter', plan=plan))
    replace_modules(model, [spec], RoutingState())
    return model.eval()


def boxes_sample(boxes, labels, scale):
    sample = DetDataSample(metainfo=dict(img_path='x.png', scale_factor=(scale, scale)))
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.long),
    )
    return sample


def run_batch(model, recorder, domains, samples):
    (layer,) = moe_layers(model).values()
    layer.state.begin(domains, len(samples))
    model(torch.zeros(len(samples), 3, 2, 2))
    recorder.end_of_batch({'data_samples': samples})


@pytest.mark.parametrize('resized', [False, True])
def test_areas_are_of_the_original_and_levels_of_the_networks_input(model, resized):
    # The image is shrunk by half. Of the original boxes 200, 40 and 20 pixels wide, large, medium
    # and small, the network sees 100, 20 and 10.
    anchors = {'P3': np.array([[10.0, 10]]), 'P4': np.array([[20.0, 20]])}
    recorder = recorder_of(model, anchors=anchors, resized=resized)
    sides = np.array([200, 40, 20]) * (0.5 if resized else 1)
    sample = boxes_sample([[5, 5, 5 + s, 5 + s] for s in sides], [0, 1, 1], 0.5)
    run_batch(model, recorder, ['ink'], [sample])
    objects = recorder.record().objects
    assert objects.area.tolist() == [2, 1, 0]
    assert objects.level.tolist() == [1, 1, 0]


def test_an_image_without_objects_still_counts(model):
    recorder = recorder_of(model)
    samples = [boxes_sample([], [], 1.0), boxes_sample([[0, 0, 9, 9]], [1], 1.0)]
    run_batch(model, recorder, ['ink', 'heat'], samples)
    record = recorder.record()
    numbers = statistics(record, '0')
    assert numbers['items'] == 2 and numbers['importance'] == [1.5, 0.5]
    assert record.objects.image.tolist() == [1]
    assert numbers['class'] == {
        'names': ['dog'], 'weight': [[0.5, 0.5]], 'count': [[1, 1]], 'number': [1]
    }  # fmt: skip
    assert numbers['domain']['names'] == ['heat', 'ink']
    # A plan has no logits.
    assert record.layers['0'].logits.shape == (0, 1, 2)


def test_images_that_fill_up_the_last_batch_do_not_count(model, monkeypatch):
    # Three images on two ranks: rank 1 has image 1, and image 0 once more.
    monkeypatch.setattr(expert_record_hook, 'get_dist_info', lambda: (1, 2))
    recorder = recorder_of(model, dataset_size=3)
    samples = [boxes_sample([[0, 0, 9, 9]], [0], 1.0), boxes_sample([[0, 0, 9, 9]], [1], 1.0)]
    run_batch(model, recorder, ['heat', 'ink'], samples)
    record = recorder.record()
    assert len(record.images) == 1 and record.objects.label.tolist() == [0]
    assert statistics(record, '0')['importance'] == [0.5, 0.5]
    assert statistics(record, '0')['pairs'] == [[1, 1], [1, 1]]
    run_batch(model, recorder, ['ink'], samples[:1])
    assert len(recorder.record().images) == 1


def test_every_view_of_test_time_augmentation_counts(model):
    recorder = recorder_of(model)
    (layer,) = moe_layers(model).values()
    views = [[boxes_sample([[0, 0, 9, 9]], [0], scale)] for scale in (1.0, 2.0)]
    for _ in views:
        layer.state.begin(['ink'])
        model(torch.zeros(1, 3, 2, 2))
    recorder.end_of_batch({'data_samples': views})
    assert statistics(recorder.record(), '0')['items'] == 2


def test_items_that_are_no_images_are_left_out_with_a_warning(model, capsys):
    recorder = recorder_of(model)
    (layer,) = moe_layers(model).values()
    layer.state.begin(['ink'] * 4)  # as a RoI head with two boxes in each of two images
    model(torch.zeros(4, 3, 2, 2))
    recorder.end_of_batch({'data_samples': [boxes_sample([], [], 1.0)] * 2})
    assert recorder.record().layers == {}
    assert "MoE layer '0' did not decide over the images" in capsys.readouterr().out


def test_patches_of_an_image_are_one_decision():
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    spec = dict(
        targets='0', num_experts=3, granularity='patch', grid=2, router=dict(type='TopKRouter', k=1)
    )
    replace_modules(model, [spec], RoutingState())
    (layer,) = moe_layers(model.eval()).values()
    with torch.no_grad():  # the gate takes the patch's brightest channel
        layer.router.gate.copy_(torch.eye(3))
    recorder = recorder_of(model)
    images = torch.zeros(1, 3, 4, 4)
    images[0, 0, :2, :2] = 1  # a red patch, two green ones and a blue one
    images[0, 1, 2:] = 1
    images[0, 2, :2, 2:] = 1
    layer.state.begin(['ink'])
    model(images)
    recorder.end_of_batch({'data_samples': [boxes_sample([[0, 0, 9, 9]], [0], 1.0)]})
    numbers = statistics(recorder.record(), '0')
    assert numbers['items'] == 4 and numbers['count'] == [1, 2, 1]
    # The object takes its image's mean over the patches.
    assert numbers['class']['count'] == [[0.25, 0.5, 0.25]]
    assert numbers['effective_k'] == {'selected': 1, 'entropy': 1}


def test_nothing_is_noted_where_nothing_is_routed(model, tmp_path):
    hook = ExpertRecordHook(interval=1)
    (layer,) = moe_layers(model.train()).values()
    visualizer = SimpleNamespace(add_scalars=lambda *args, **kwargs: None)
    runner = SimpleNamespace(model=model, iter=0, work_dir=str(tmp_path), visualizer=visualizer)
    hook.before_train(runner)
    for runner.iter, layer.state.dense in enumerate([True, False]):  # dense warm-up, then experts
        layer.state.begin(['ink', 'heat', 'ink'], training=True)
        model(torch.zeros(3, 3, 2, 2))
        hook.after_train_iter(runner, 0)
    (entry,) = json.loads((tmp_path / 'expert_record/training.json').read_text())['entries']
    assert entry == {
        'iter': 2,
        'steps': 1,
        'layers': {'0': {'importance': [2.5, 0.5], 'count': [3, 1]}},
    }


def test_a_layer_found_under_an_alias_is_recorded_by_its_name(tmp_path):
    model = nn.Module()
    model.a = nn.Sequential(nn.Conv2d(3, 3, 1))
    model.b = model.a
    spec = dict(targets=r'b\.0', router=dict(type='PlanRouter', plan=dict(ink='e0', heat='e1')))
    replace_modules(model, [spec], RoutingState())
    (layer,) = moe_layers(model.train()).values()
    assert layer.name == 'b.0' and list(moe_layers(model)) == ['a.0']
    hook = ExpertRecordHook(interval=1)
    visualizer = SimpleNamespace(add_scalars=lambda *args, **kwargs: None)
    runner = SimpleNamespace(model=model, iter=0, work_dir=str(tmp_path), visualizer=visualizer)
    hook.before_train(runner)
    layer.state.begin(['ink', 'heat', 'ink'], training=True)
    model.a(torch.zeros(3, 3, 2, 2))
    hook.after_train_iter(runner, 0)
    (entry,) = json.loads((tmp_path / 'expert_record/training.json').read_text())['entries']
    assert entry['layers'] == {'b.0': {'importance': [2, 1], 'count': [2, 1]}}


def test_an_entry_says_how_many_steps_it_covers(model, tmp_path):
    (layer,) = moe_layers(model.train()).values()
    visualizer = SimpleNamespace(add_scalars=lambda *args, **kwargs: None)
    runner = SimpleNamespace(model=model, work_dir=str(tmp_path), visualizer=visualizer)

    def train(first, last, finish):
        hook = ExpertRecordHook(interval=2)
        runner.iter = first
        hook.before_train(runner)
        for runner.iter in range(first, last):
            layer.state.begin(['ink'], training=True)
            model(torch.zeros(1, 3, 2, 2))
            hook.after_train_iter(runner, 0)
        runner.iter = last
        if finish:
            hook.after_train(runner)
        entries = json.loads((tmp_path / 'expert_record/training.json').read_text())['entries']
        return [(e['iter'], e['steps'], e['layers']['0']['count'][0]) for e in entries]

    # Five iterations of one image: 2 + 2 and the last one.
    assert train(0, 5, True) == [(2, 2, 2), (4, 2, 2), (5, 1, 1)]
    # Resumed after the third, which no entry has: the next one covers the fourth only.
    assert train(3, 6, True) == [(2, 2, 2), (4, 1, 1), (6, 2, 2)]


def test_images_without_labels_are_recorded_without_objects(model):
    recorder = recorder_of(model)
    bare, empty = (DetDataSample(metainfo=dict(img_path=f'{i}.png')) for i in range(2))
    empty.gt_instances = InstanceData()
    run_batch(model, recorder, ['ink', 'heat'], [bare, empty])
    record = recorder.record()
    assert record.images == ['0.png', '1.png'] and len(record.objects) == 0
    assert statistics(record, '0')['importance'] == [1.5, 0.5]


@pytest.mark.parametrize(('resized', 'what'), [(True, 'size classes'), (False, 'FPN levels')])
def test_what_needs_the_scale_factor_is_unknown_without_and_said_once(model, capsys, resized, what):
    anchors = {'P3': np.array([[10.0, 10]]), 'P4': np.array([[20.0, 20]])}
    recorder = recorder_of(model, anchors=anchors, resized=resized, resizes=True)
    sample = boxes_sample([[0, 0, 20, 20]], [0], 1.0)
    sample.pop('scale_factor')
    for _ in range(2):
        run_batch(model, recorder, ['ink'], [sample])
    objects = recorder.record().objects
    # In the network's pixels 20 is the second level's; in the image's it is small.
    assert objects.level.tolist() == ([1, 1] if resized else [-1, -1])
    assert objects.area.tolist() == ([-1, -1] if resized else [0, 0])
    out = capsys.readouterr().out
    assert out.count("'scale_factor'") == 1 and what in out


def test_dropped_items_count_as_none_and_do_not_kill_experts():
    # Of four items two were dropped; e0 has 1.97 and e1 .03 of the weight, 1.5 % of it, though
    # its mean weight is .0075.
    weight = np.array([[[1.0, 0]], [[0.97, 0.03]], [[0, 0]], [[0, 0]]])
    effective = math.exp(-0.97 * math.log(0.97) - 0.03 * math.log(0.03))
    layer = LayerRecord(
        weight=weight,
        share=(weight > 0).astype(float),
        effective=np.array([[1], [effective], [0], [0]]),
        items=np.ones((4, 1), dtype=int),
        pairs=np.array([[2.0, 1], [1, 1]]),
        logit_images=np.arange(0),
        logits=np.zeros((0, 1, 2)),
    )
    record = ExpertRecord(list('abcd'), [None] * 4, [], Objects.empty(), layers={'x': layer})
    numbers = statistics(record, 'x')
    assert numbers['living'] == 2
    # (1 + 2 + 0 + 0) / 4 selected.
    expected = {'selected': 0.75, 'entropy': pytest.approx((1 + effective) / 4, abs=1e-5)}
    assert numbers['effective_k'] == expected
    # The function of arrays says the same.
    found = expert_statistics(weight[:, 0])
    assert found['living'] == 2 and found['effective_k'] == pytest.approx((1 + effective) / 4)


@pytest.mark.parametrize('wrong', [dict(interval=0), dict(max_logits=-1)])
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ValueError, match='interval must be >= 1 and max_logits >= 0'):
        ExpertRecordHook(**wrong)


# -- real runs -------------------------------------------------------------------------------------


@pytest.fixture
def cheap_runner(monkeypatch):
    """A Runner spends most of its time on reporting compilers and formatting the config."""
    monkeypatch.setattr(Runner, '_log_env', lambda *args: None)
    monkeypatch.setattr(Runner, 'dump_config', lambda *args: None)
    monkeypatch.setattr(Config, 'pretty_text', property(lambda self: repr(self._cfg_dict)))


HOOK = [dict(type='mmdet_moe.ExpertRecordHook', interval=2)]


def test_a_detector_is_recorded_in_training_validation_and_test(
    cheap_runner, tmp_path, tiny_dataset, tiny_domains, tiny_label_space
):
    config = detector_config(
        tmp_path, tiny_dataset, tiny_domains, tiny_label_space, custom_hooks=HOOK
    )
    runner = Runner.from_cfg(Config(config))
    runner.train()
    folder = tmp_path / 'expert_record'
    entries = json.loads((folder / 'training.json').read_text())['entries']
    assert [entry['iter'] for entry in entries] == [2, 4]
    # Two iterations of two images on three levels, two experts each.
    assert {sum(e['count']) for entry in entries for e in entry['layers'].values()} == {24}

    state = runner.model.routing_state
    assert not state.observers, 'the layers are not watched in training'
    runner.test()
    record = ExpertRecord.from_dict(json.loads((folder / 'test.json').read_text()))
    # 4 + 3 + 2 images; each a decision on three levels.
    assert len(record.images) == 9 and record.levels == ['P3', 'P4', 'P5']
    sums = {}
    runner.model.eval()
    for batch in runner.test_dataloader:
        runner.model.test_step(batch)
        for key, value in state.stats().items():
            sums[key] = sums.get(key, 0) + value
    for name in ('bbox_head.cls_convs.0', 'bbox_head.reg_convs.0'):
        numbers = statistics(record, name)
        assert numbers['items'] == 27
        assert numbers['importance'] == pytest.approx(sums[f'{name}/weight'].tolist(), abs=1e-3)
        assert numbers['count'] == sums[f'{name}/count'].tolist()
        assert numbers['domain']['number'] == [6, 9, 12]  # blue, heat, ink
        assert numbers['effective_k']['selected'] == 2
        assert record.layers[name].logits.shape == (9, 3, 3)
    # The ground truth, class by class, in unified labels.
    labels = [label for i in range(9) for label in runner.test_dataloader.dataset.get_cat_ids(i)]
    assert sorted(record.objects.label.tolist()) == sorted(labels)
    assert record.classes == ['cat', 'dog', 'cow', 'car', 'bolt']
    (scalars,) = tmp_path.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    name = 'moe/bbox_head.cls_convs.0'
    assert any(f'train/{name}/cv_importance' in line for line in lines)
    (last,) = [line for line in lines if f'test/{name}/living' in line]
    assert f'test/{name}/utilisation_2' in last and f'test/{name}/effective_k' in last


def test_a_detector_under_test_time_augmentation_is_seen_through(
    cheap_runner, tmp_path, tiny_dataset, tiny_domains, tiny_label_space
):
    config = detector_config(
        tmp_path, tiny_dataset, tiny_domains, tiny_label_space, custom_hooks=HOOK
    )
    nms = dict(type='nms', iou_threshold=0.5)
    tta_cfg = dict(nms=nms, max_per_img=10)
    config['model'] = dict(type='DetTTAModel', tta_cfg=tta_cfg, module=config['model'])
    keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip')
    keys += ('flip_direction',)
    steps = [
        [dict(type='Resize', scale=(64 * size, 48 * size)) for size in (1, 2)],
        [dict(type='RandomFlip', prob=0.0)],
        [dict(type='LoadAnnotations', with_bbox=True)],
        [dict(type='PackDetInputs', meta_keys=keys)],
    ]
    config['test_dataloader']['dataset']['pipeline'] = [
        dict(type='LoadImageFromFile'),
        dict(type='TestTimeAug', transforms=steps),
    ]
    runner = Runner.from_cfg(Config(config))
    runner.test()
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, ExpertRecordHook))
    record = hook.record
    # 9 images of two sizes each: 18 views, of which the second has objects of twice the size.
    assert len(record.images) == 18 and len(set(record.images)) == 9
    assert statistics(record, 'bbox_head.cls_convs.0')['items'] == 18 * 3
    size = np.array([record.images[:i].count(record.images[i]) for i in range(18)])
    levels = [record.objects.level[size[record.objects.image] == view] for view in (0, 1)]
    assert len(levels[0]) == len(levels[1]) and levels[1].mean() > levels[0].mean()
    assert (record.objects.area == 0).mean() == 1, 'sizes are those of the original images'


def test_a_resumed_training_goes_on_with_its_record(cheap_runner, tmp_path):
    def entries():
        return json.loads((tmp_path / 'expert_record/training.json').read_text())['entries']

    config = classifier_config(tmp_path, custom_hooks=HOOK)
    Runner.from_cfg(Config(config)).train()
    whole = entries()
    config['load_from'], config['resume'] = str(tmp_path / 'iter_2.pth'), True
    config['experiment_name'] += '_resumed'
    Runner.from_cfg(Config(config)).train()
    # What was noted after the checkpoint was forgotten, and noted again.
    assert [entry['iter'] for entry in entries()] == [2, 4]
    assert entries()[0] == whole[0]


def test_a_classifier_is_recorded_by_label(cheap_runner, tmp_path):
    runner = Runner.from_cfg(Config(classifier_config(tmp_path, custom_hooks=HOOK)))
    runner.val_loop.run()
    record = ExpertRecord.from_dict(json.loads((tmp_path / 'expert_record/val.json').read_text()))
    numbers = statistics(record, 'backbone.layer3')
    assert record.classes == ['blue', 'green', 'red']
    assert numbers['class']['number'] == [4, 4, 4]
    # Every image is one item with one label: the classes make up the whole.
    assert np.sum(numbers['class']['weight'], 0) == pytest.approx(numbers['importance'], abs=1e-4)
    assert not {'level', 'area', 'domain'} & set(numbers)


def test_a_dense_model_is_told_about_and_left_alone(cheap_runner, tmp_path, monkeypatch):
    config = classifier_config(tmp_path, custom_hooks=HOOK)
    config['model']['moe'] = None
    runner = Runner.from_cfg(Config(config))
    said = []
    monkeypatch.setattr(runner.logger, 'warning', said.append)
    runner.val_loop.run()
    assert said == ['ExpertRecordHook: the model has no MoE layers']
    assert not (tmp_path / 'expert_record').exists()
