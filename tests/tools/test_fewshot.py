"""The few-shot job: what it reads of the tests of others, and the table that it makes of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / 'tools'))

import fewshot

from mmdet_moe.visualization.shot_figure import Adapted


def test_averages_are_no_domains():
    metrics = {
        'bccd/coco/bbox_mAP': 0.5,
        'cheetah/coco/bbox_mAP': None,  # nan in the test
        'hituav/coco/bbox_mAP': -1.0,
        'bccd/unrestricted/coco/bbox_mAP': 0.4,
        'bccd/coco/bbox_mAP_50': 0.7,
        **{f'{name}/coco/bbox_mAP': 0.9 for name in ('macro', 'small', 'large')},
    }
    assert fewshot.domain_aps(metrics) == {'bccd': 0.5, 'cheetah': 0.0, 'hituav': 0.0}


def test_table_has_the_newcomer_and_what_became_of_the_others(tmp_path, capsys):
    before = {'gem': {'cheetah': 0.4, 'hituav': 0.2}}
    runs = {
        'gem': {
            '1': Adapted(0.1, {}),  # the others are tested after the last number of shots
            '5': Adapted(0.25, {'cheetah': 0.4, 'hituav': 0.1}),
        }
    }
    fewshot.report(tmp_path, runs, before)
    lines = (tmp_path / 'results.md').read_text().splitlines()
    # The mean of 40 and 20 is 30, of 40 and 10 it is 25; hituav lost 10.
    assert lines[2:] == [
        '| gem | 1 | 10.0 | 30.0 |  |  |  |',
        '| gem | 5 | 25.0 | 30.0 | 25.0 | -5.0 | hituav -10.0 |',
    ]
    content = json.loads((tmp_path / 'results.json').read_text())
    assert content['newcomer'] == 'bccd' and content['runs'][1]['old']['hituav'] == 0.1
    assert (tmp_path / 'shots.png').stat().st_size > 0
    assert 'hituav -10.0' in capsys.readouterr().out
