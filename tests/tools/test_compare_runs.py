"""The table of several runs says what their results say."""

import json
import os
import re
import sys
from importlib import util
from pathlib import Path

import pytest

from mmdet_moe.planning import PlanningProblem, plan_experts

TOOL = Path(__file__).parents[2] / 'tools' / 'analysis_tools' / 'compare_runs.py'


@pytest.fixture(scope='module')
def tool():
    spec = util.spec_from_file_location('compare_runs', TOOL)
    module = sys.modules[spec.name] = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(folder, name, values, **more):
    """A result file of ``tools/test.py --out-json``; ``values``: domain -> AP."""
    metrics = {f'{domain}/coco/bbox_mAP': ap for domain, ap in values.items()}
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({'metrics': metrics, **more}))
    return path


def run(tool, capsys, *arguments):
    code = tool.main([*map(str, arguments), '--metrics', 'coco/bbox_mAP', '--no-complexity'])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def cells(text):
    """The rows of the first table, stripped."""
    table = text.split('\n\n')[0].splitlines()
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in table]


def test_seeds_give_mean_and_spread(tool, tmp_path, capsys):
    for seed, (ink, heat) in enumerate([(0.50, 0.20), (0.52, 0.30), (0.54, 0.40)]):
        result(tmp_path, f'gem/seed{seed}.json', {'ink': ink, 'heat': heat, 'macro': 9})
    result(tmp_path, 'dense.json', {'ink': 0.50, 'heat': 0.10, 'macro': 9})
    out = tmp_path / 'table.json'
    code, text, _ = run(
        tool,
        capsys,
        f'gem={tmp_path}/gem/*.json',
        f'dense={tmp_path}/dense.json',
        '--baseline',
        'dense',
        '--out-json',
        out,
        '--out-md',
        tmp_path / 'table.md',
    )
    assert code == 0
    # ink: .50 .52 .54, deviations -.02 0 .02: sqrt(.0008 / 2) = .02. heat: .1 likewise.
    # Means of the seeds: .35 .41 .47: mean .41, sqrt(.0072 / 2) = .06.
    assert cells(text)[0] == ['coco/bbox_mAP', 'gem', 'dense']
    assert cells(text)[2:] == [
        ['ink', '0.520 ± 0.020 (+0.020)', '0.500'],
        ['heat', '0.300 ± 0.100 (+0.200)', '0.100'],
        ['**mean**', '**0.410 ± 0.060 (+0.110)**', '**0.300**'],
    ]
    assert (tmp_path / 'table.md').read_text() == text
    data = json.loads(out.read_text())['metrics']['coco/bbox_mAP']
    assert data['gem']['ink']['values'] == [0.50, 0.52, 0.54]
    assert data['gem']['macro']['std'] == pytest.approx(0.06)
    assert data['dense']['macro'] == {'mean': 0.3, 'std': None, 'values': [0.3]}


def test_one_model_per_domain_is_one_answer(tool, tmp_path, capsys):
    result(tmp_path, 'ink.json', {'ink': 0.6, 'macro': 0.6})
    result(tmp_path, 'heat.json', {'heat': 0.2, 'macro': 0.2})
    code, text, _ = run(tool, capsys, f'single={tmp_path}/*.json')
    assert code == 0
    # In the order of the paths: heat.json, ink.json.
    assert cells(text)[2:] == [['heat', '0.200'], ['ink', '0.600'], ['**mean**', '**0.400**']]


def test_domains_without_ground_truth_stay_out(tool, tmp_path, capsys):
    file = result(tmp_path, 'a.json', {'ink': 0.6, 'heat': -1.0, 'blue': None, 'macro': 0.6})
    code, text, _ = run(tool, capsys, f'a={file}')
    assert cells(text)[2:] == [['ink', '0.600'], ['**mean**', '**0.600**']]


def test_work_dirs_are_read(tool, tmp_path, capsys):
    """mmengine leaves the result of a test and of validations in dated folders."""
    tested, trained = tmp_path / 'tested', tmp_path / 'trained'
    for age, (day, ap) in enumerate([('20260101', 0.1), ('20260102', 0.2)]):
        file = tested / day / f'{day}.json'
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({'ink/coco/bbox_mAP': ap, 'time': 3.0}))
        os.utime(file, (age, age))
    scalars = trained / '20260101' / 'vis_data' / 'scalars.json'
    scalars.parent.mkdir(parents=True)
    lines = [
        {'ink/coco/bbox_mAP': 0.3, 'macro/coco/bbox_mAP': 0.3, 'step': 10},
        {'ink/coco/bbox_mAP': 0.4, 'macro/coco/bbox_mAP': 0.4, 'step': 20},
        {'loss': 1.0, 'moe/layer/share': 0.5, 'step': 25},
    ]
    scalars.write_text('\n'.join(map(json.dumps, lines)))
    code, text, _ = run(tool, capsys, f'tested={tested}', f'trained={trained}')
    assert cells(text)[2] == ['ink', '0.200', '0.400']


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['gem'], "'gem': want NAME=PATH"),
        (['gem={}/none*'], 'gem: .*none.* is not there'),
        (['gem={}/empty'], 'empty: neither a test result nor a validation in it'),
        (['gem={}/text.json'], 'text.json: cannot be read as metrics'),
        (['gem={}/other.json'], 'other.json: no metrics "<domain>/<metric>" in it'),
        (['gem={}/good.json', '--baseline', 'dense'], r"no run is called 'dense'.*\['gem'\]"),
    ],
)
def test_what_cannot_be_compared_is_named(tool, tmp_path, capsys, arguments, message):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'text.json').write_text('not json')
    (tmp_path / 'other.json').write_text('{"a": 1}')
    result(tmp_path, 'good.json', {'ink': 0.5})
    code, out, error = run(tool, capsys, *(item.format(tmp_path) for item in arguments))
    assert code == 2 and out == ''
    assert len(error.splitlines()) == 1
    assert re.search(message, error)


def test_an_unknown_metric_lists_those_there_are(tool, tmp_path, capsys):
    file = result(tmp_path, 'a.json', {'ink': 0.6})
    assert tool.main([f'a={file}', '--metrics', 'coco/mAP', '--no-complexity']) == 2
    assert "the metric 'coco/mAP'; they have ['coco/bbox_mAP']" in capsys.readouterr().err


MODEL = """
default_scope = 'mmdet_moe'
custom_imports = dict(imports=['mmdet_moe.models'], allow_failed_imports=False)
model = dict(
    type='MoERetinaNet',
    label_space=dict(domains=dict(ink=['cat'], heat=['car', 'dog'])),
    backbone=dict(type='ResNet', depth=18, base_channels=8),
    neck=dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=8, start_level=1, num_outs=3),
    bbox_head=dict(
        type='MultiDomainRetinaHead', in_channels=8, feat_channels=8, stacked_convs=1,
        anchor_generator=dict(
            type='AnchorGenerator', octave_base_scale=4, scales_per_octave=3, ratios=[1.0],
            strides=[8, 16, 32]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
    ),
    {extra}
)
test_dataloader = dict(dataset=dict(pipeline=[dict(type='Resize', scale=(64, 48))]))
"""


def test_size_and_cost_count_one_expert_per_item(tool, tmp_path, capsys):
    problem = {'datasets': ['ink', 'heat'], 'experts': 3, 'affinity': [[1, 0, 0], [0, 1, 0]]}
    plan_experts(PlanningProblem.from_dict(problem)).save(tmp_path / 'plan.json')
    router = f"dict(type='PlanRouter', plan='{tmp_path}/plan.json', unknown='error')"
    spec = f"moe=[dict(targets=r'bbox_head\\.(cls|reg)_convs\\.0', router={router})],"
    for name, extra in (('dense', ''), ('gem', spec)):
        (tmp_path / f'{name}.py').write_text(MODEL.replace('{extra}', extra))
        result(tmp_path, f'{name}.json', {'ink': 0.5, 'heat': 0.5}, config=f'{tmp_path}/{name}.py')
    out = tmp_path / 'out.json'
    arguments = [f'{name}={tmp_path}/{name}.json' for name in ('dense', 'gem')]
    assert tool.main([*arguments, '--metrics', 'coco/bbox_mAP', '--out-json', str(out)]) == 0
    text = capsys.readouterr().out
    assert 'no config' not in text
    assert 'multiply-adds at 64x64' in text  # 48 x 64 filled up to multiples of 32
    dense, gem = (json.loads(out.read_text())['runs'][n]['complexity'] for n in ('dense', 'gem'))
    # Two convolutions 8 -> 8 of 3 x 3 with bias, each with two experts more than the dense model.
    conv = 8 * 8 * 9 + 8
    assert gem['parameters'] == dense['parameters'] + 2 * 2 * conv
    assert gem['active_parameters'] == dense['active_parameters'] == dense['parameters']
    assert gem['flops'] == dense['flops'] > 0


def test_a_run_without_a_config_gets_a_note(tool, tmp_path, capsys):
    file = result(tmp_path, 'a.json', {'ink': 0.6})
    assert tool.main([f'a={file}', '--metrics', 'coco/bbox_mAP']) == 0
    assert f'- a: no config for {file}: give --config a=FILE' in capsys.readouterr().out


def test_a_seed_without_a_value_keeps_the_other_values_with_their_own_seed(tool, tmp_path, capsys):
    result(tmp_path, 'a0.json', {'ink': -1.0, 'heat': 0.1})
    result(tmp_path, 'a1.json', {'ink': 0.5, 'heat': 0.3})
    code, text, _ = run(tool, capsys, f'a={tmp_path}/*.json')
    # Means by seed: .1, and (.5 + .3) / 2 = .4; of both .25, deviations .15: sqrt(.045) = .212.
    assert cells(text)[-1] == ['**mean**', '**0.250 ± 0.212**']


def test_the_papers_layout_has_a_row_for_each_model_in_their_order(tool, tmp_path, capsys):
    values = {'moon': 0.1, 'coco': 0.4, 'kitti': 0.6, 'clipart': 0.3}
    metrics = {f'{domain}/pascal_voc/mAP': ap for domain, ap in values.items()}
    # The evaluator's own averages are no domains.
    metrics |= {f'{group}/pascal_voc/mAP': 9.0 for group in ('macro', 'small', 'large')}
    path = tmp_path / 'gem.json'
    path.write_text(json.dumps({'metrics': metrics, 'small': ['clipart', 'moon']}))
    other = tmp_path / 'dense.json'
    other.write_text(json.dumps({'metrics': {'kitti/pascal_voc/mAP': 0.5}}))
    arguments = [f'gem={path}', f'dense={other}', '--metrics', 'pascal_voc/mAP']
    arguments += ['--layout', 'papers', '--out-json', str(tmp_path / 'table.json')]
    assert tool.main(arguments) == 0
    # Average (60 + 40 + 30 + 10) / 4 = 35, small (30 + 10) / 2 = 20, large (60 + 40) / 2 = 50.
    head = ['pascal_voc/mAP', 'KITTI', 'COCO', 'Clipart', 'moon', 'Avg', 'Small', 'Large']
    text = capsys.readouterr().out
    assert cells(text)[0] == head
    assert cells(text)[2] == ['gem', '60.0', '40.0', '30.0', '10.0', '35.0', '20.0', '50.0']
    assert cells(text)[3] == ['dense', '50.0', '', '', '', '50.0', '', '50.0']
    table = json.loads((tmp_path / 'table.json').read_text())['papers']['pascal_voc/mAP']
    assert table['dense'] == dict.fromkeys(head[1:]) | {'KITTI': 50.0, 'Avg': 50.0, 'Large': 50.0}
    assert tool.main([*arguments, '--published', '--small', 'moon']) == 0
    rows = cells(capsys.readouterr().out)
    assert rows[3][0].startswith('universal detector, 6 adapters (Wang et al. 2019')
    # Its averages are over other domains.
    assert rows[3][1:] == ['67.6', '46.8', '54.6', '', '', '', '']
    assert rows[5][-2:] == ['10.0', '43.3']
    assert tool.main([f'gem={path}', '--metrics', 'pascal_voc/mAP', '--published']) == 2
    assert '--published goes with --layout papers' in capsys.readouterr().err
    assert tool.main([*arguments, '--small', 'mars']) == 2
    assert "no run has a domain 'mars'" in capsys.readouterr().err


def test_the_published_average_is_that_of_its_row(tool):
    """But for the first, whose eleven figures have the mean 63.92 where 63.8 was published."""
    rows = [row['ap50'] for row in json.loads(tool.PUBLISHED.read_text())['rows']]
    assert [row.pop('macro') for row in rows] == [63.8, 63.9, 64.2]
    assert all(list(row) == list(tool.PAPERS) for row in rows)
    assert [round(sum(row.values()) / 11, 2) for row in rows] == [63.92, 63.88, 64.16]
    # Of eight adapters the small ones: (53.4 + 55.8 + 60.6) / 3 = 56.6.
    found = list(tool.published_rows(['comic', 'clipart', 'watercolor']).values())[2]
    assert round(found['small'], 1) == 56.6 and round(found['large'], 1) == 67.0
