"""The picture of a plan: it is drawn for every size, and says what the plan says."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip('matplotlib')

from mmdet_moe.planning import ExpertPlan
from mmdet_moe.visualization import draw_plan
from mmdet_moe.visualization.plan_figure import _order, _runs, _short


def _plan(m: int, n: int, seed: int = 0) -> ExpertPlan:
    rng = np.random.default_rng(seed)
    return ExpertPlan.from_assignment(
        {f'dataset_{i}': f'e{rng.integers(n)}' for i in range(m)}, experts=n
    )


def test_rows_are_sorted_by_expert_then_name():
    plan = ExpertPlan.from_assignment({'d': 'e1', 'a': 'e1', 'c': 'e0', 'b': ['e0', 'e1']})
    # served by: d {1}, a {1}, c {0}, b {0, 1}
    assert [plan.datasets[i] for i in _order(plan)] == ['c', 'b', 'a', 'd']


def test_neighbouring_cells_of_an_expert_merge_into_one_outline():
    chosen = np.array([[1, 0], [1, 0], [0, 1], [1, 1]], dtype=bool)
    assert _runs(chosen, merge=True) == [(0, 0, 1), (0, 3, 3), (1, 2, 3)]
    assert _runs(chosen, merge=False) == [(0, 0, 0), (0, 1, 1), (0, 3, 3), (1, 2, 2), (1, 3, 3)]


@pytest.mark.parametrize(
    ('value', 'text'), [(0.831, '.83'), (-0.2, '-.20'), (0, '0'), (12.3, '12.30'), (1e5, '1e+05')]
)
def test_numbers_in_cells_are_short(value, text):
    assert _short(value) == text


@pytest.mark.parametrize(('m', 'n'), [(1, 1), (5, 4), (170, 50)])
def test_plans_of_every_size_are_drawn(tmp_path, m, n):
    path = tmp_path / 'deep' / 'plan.png'
    draw_plan(_plan(m, n), path, unit='images')
    assert path.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    assert [p.name for p in path.parent.iterdir()] == ['plan.png'], 'no temporary file is left'


def test_the_picture_names_datasets_experts_and_unit(tmp_path):
    path = tmp_path / 'plan.svg'
    plan = ExpertPlan.from_assignment({'bccd': 'e0', 'cheetah': 'e1', 'hituav': 'e1'})
    import matplotlib

    with matplotlib.rc_context({'svg.fonttype': 'none'}):
        draw_plan(plan, path, title='a title', unit='images')
    text = path.read_text()
    for word in ('bccd', 'cheetah', 'hituav', 'e0', 'e1', 'images', 'a title'):
        assert word in text


def test_a_picture_without_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match='needs a suffix'):
        draw_plan(_plan(2, 2), tmp_path / 'plan')


def test_an_unknown_suffix_leaves_no_file_behind(tmp_path):
    with pytest.raises(ValueError):
        draw_plan(_plan(2, 2), tmp_path / 'plan.xyz')
    assert not list(tmp_path.iterdir())


def test_drawing_needs_no_torch_and_no_display():
    code = (
        'import sys\n'
        'from mmdet_moe.visualization import draw_plan\n'
        'from mmdet_moe.planning import ExpertPlan\n'
        'assert "matplotlib" not in sys.modules\n'
        'import tempfile, os\n'
        'with tempfile.TemporaryDirectory() as d:\n'
        "    draw_plan(ExpertPlan.from_assignment({'a': 'e0'}), os.path.join(d, 'p.png'))\n"
        'assert "torch" not in sys.modules and "matplotlib.pyplot" not in sys.modules\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
