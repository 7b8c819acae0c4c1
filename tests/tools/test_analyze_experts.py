"""The tool looks into a trained detector and a trained classifier, from config to page."""

import csv
import json
import re
import sys
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from expert_runs import classifier_config, detector_config
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.structures import InstanceData

TOOL = Path(__file__).parents[2] / 'tools' / 'analysis_tools' / 'analyze_experts.py'


@pytest.fixture(scope='module')
def tool():
    spec = util.spec_from_file_location('analyze_experts', TOOL)
    module = sys.modules[spec.name] = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def cheap_runner(monkeypatch):
    """A Runner spends most of its time on reporting compilers and formatting the config."""
    monkeypatch.setattr(Runner, '_log_env', lambda *args: None)
    monkeypatch.setattr(Runner, 'dump_config', lambda *args: None)
    monkeypatch.setattr(Config, 'pretty_text', property(lambda self: repr(self._cfg_dict)))


def trained(folder, config):
    """Config file and checkpoint of a run of four steps."""
    config = {**config, 'custom_hooks': [dict(type='mmdet_moe.ExpertRecordHook', interval=2)]}
    text = ''.join(f'{key} = {value!r}\n' for key, value in config.items())
    (folder / 'config.py').write_text(text)
    Runner.from_cfg(Config(config)).train()
    return [str(folder / 'config.py'), str(folder / 'iter_4.pth')]


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def check_page(out, report):
    """The page has every picture, and asks for nothing from outside."""
    page = (out / 'index.html').read_text()
    assert (
        page.count('<img') == page.count('src="data:image/png;base64,') == len(report['pictures'])
    )
    assert '<script' not in page and not re.search(r'(src|href)="(?!data:|#)', page)
    for name in report['pictures']:
        assert (out / name).read_bytes()[:4] == b'\x89PNG'


def test_a_detector_from_config_to_page(
    tool, tmp_path, tiny_dataset, tiny_domains, tiny_label_space, capsys
):
    config = detector_config(tmp_path, tiny_dataset, tiny_domains, tiny_label_space)
    arguments = trained(tmp_path, config)
    options = ['--images', '2', '--score-thr', '0', '--layers', 'cls_convs']
    assert tool.main([*arguments, *options]) == 0
    out = tmp_path / 'experts'
    assert 'index.html: macro/coco/bbox_mAP' in capsys.readouterr().out
    report = json.loads((out / 'report.json').read_text())
    assert (report['images'], report['metric']) == (9, 'macro/coco/bbox_mAP')
    kinds = {name.partition('-')[2] for name in report['pictures'] if '-' in name}
    assert kinds == {
        f'{kind}.png'
        for kind in (
            'utilisation', 'pairs', 'classes', 'domains', 'sizes', 'mosaic', 'preferred', 'boxes',
            'training',
        )
    }  # fmt: skip
    check_page(out, report)
    # Both layers are in the numbers, whatever is drawn.
    assert set(report['layers']) == {'bbox_head.cls_convs.0', 'bbox_head.reg_convs.0'}
    ablation = report['ablation']
    assert set(ablation['single']) == set('012') and set(ablation['k']) == set('123')
    # The routers' own k is 2.
    metric = report['metric']
    assert ablation['k']['2'][metric] == pytest.approx(report['metrics'][metric], abs=1e-9)
    experts = rows(out / 'experts.csv')
    assert len(experts) == 6
    assert sum(float(row['mean_weight']) for row in experts[:3]) == pytest.approx(1, abs=1e-4)
    assert {row['kind'] for row in rows(out / 'groups.csv')} == {
        'domain', 'class', 'area', 'level', 'level_area'
    }  # fmt: skip
    # 9 images x 2 layers x 3 levels x 3 experts.
    assert len(rows(out / 'images.csv')) == 162
    assert {row['setting'] for row in rows(out / 'ablation.csv')} >= {
        'as routed', 'expert 0 alone', 'equal weights', 'k = 3'
    }  # fmt: skip


def test_a_classifier_from_config_to_page(tool, tmp_path, capsys):
    arguments = trained(tmp_path, classifier_config(tmp_path))
    out = tmp_path / 'out'
    assert tool.main([*arguments, '--out', str(out), '--embedding', 'pca']) == 0
    report = json.loads((out / 'report.json').read_text())
    assert report['metric'] == 'accuracy/top1' and report['objects'] == 12
    assert not any('boxes' in name or 'sizes' in name for name in report['pictures'])
    check_page(out, report)
    assert set(report['ablation']['single']) == set('0123')
    own = report['metrics']['accuracy/top1']
    assert report['ablation']['k']['2']['accuracy/top1'] == own

    # Without the ablation there is one test; a metric that is not there is refused by name.
    assert tool.main([*arguments, '--out', str(out / 'a'), '--skip-ablation']) == 0
    assert json.loads((out / 'a' / 'report.json').read_text())['ablation'] is None
    assert len({row['setting'] for row in rows(out / 'a' / 'ablation.csv')}) == 1
    capsys.readouterr()
    assert tool.main([*arguments, '--out', str(out / 'b'), '--metric', 'AP']) == 2
    assert "--metric: no value 'AP'" in capsys.readouterr().err
    assert tool.main([*arguments, '--cfg-options', 'model.moe=None', '--out', str(out / 'c')]) == 2
    assert 'the model has no MoE layers' in capsys.readouterr().err


def test_what_a_plan_cannot_be_forced_to_is_said(
    tool, tmp_path, tiny_dataset, tiny_domains, tiny_label_space
):
    config = detector_config(tmp_path, tiny_dataset, tiny_domains, tiny_label_space)
    # Two experts serve ink, which comes first; heat has one.
    plan = dict(ink=dict(e0=0.75, e1=0.25), heat='e0', blue='e1')
    spec = dict(targets=r'bbox_head\.cls_convs\.0', router=dict(type='PlanRouter', plan=plan))
    config['model']['moe'] = [spec]
    assert tool.main([*trained(tmp_path, config), '--images', '0', '--layers', 'cls']) == 0
    report = json.loads((tmp_path / 'experts' / 'report.json').read_text())
    (note,) = report['notes']
    assert note.startswith('the 2 best: ') and 'gives no logits' in note
    assert set(report['ablation']['k']) == {'1'}
    # Four images of ink, three of heat, two of blue, on three levels.
    numbers = report['layers']['bbox_head.cls_convs.0']
    assert numbers['importance'] == [(4 * 0.75 + 3) * 3, (4 * 0.25 + 2) * 3]
    assert (
        'combine weights (the router gives no logits)'
        in (tmp_path / 'experts' / 'index.html').read_text()
    )


def detected(levels=None):
    sample = DetDataSample(metainfo=dict(scale_factor=(2.0, 2.0)))
    sample.pred_instances = InstanceData(
        bboxes=torch.tensor([[0.0, 0, 4, 4], [0, 0, 16, 16], [0, 0, 5, 5]]),
        scores=torch.tensor([0.9, 0.8, 0.1]),
    )
    if levels is not None:
        sample.pred_instances.levels = torch.tensor(levels)
    return sample


def test_a_box_is_its_levels_top_experts(tool):
    # In the network's input the boxes are 8 and 32 wide: the first and the second level's anchors.
    anchors = [np.array([[8.0, 8]]), np.array([[32.0, 32]])]
    weights = np.array([[0.1, 0.9], [0.8, 0.2]])
    boxes, experts, source = tool.box_experts(detected(), weights, True, anchors, 0.5)
    assert boxes[:, 2].tolist() == [4, 16] and experts.tolist() == [1, 0]
    assert 'by the boxes' in source
    # What the head says counts more.
    _, experts, source = tool.box_experts(detected([1, 1, 1]), weights, True, anchors, 0.5)
    assert experts.tolist() == [0, 0] and 'as the head reports' in source
    # A layer with one decision per image: mean (.45, .55).
    _, experts, _ = tool.box_experts(detected(), weights, False, [], 0.5)
    assert experts.tolist() == [1, 1]


def test_the_caption_warns_where_weights_do_not_sum_to_one(tool):
    def record(weight):
        layer = SimpleNamespace(weight=np.array(weight), items=np.array([[1], [3]]))
        return SimpleNamespace(layers={'head': layer})

    assert tool.sums_caption(record([[[0.25, 0.75]], [[1.0, 0]]])) == ''
    # Sums .5 and .9, of one and of three items: (.5 + 2.7) / 4 = .8.
    assert 'on average head 0.80' in tool.sums_caption(record([[[0.5, 0]], [[0.4, 0.5]]]))
