"""Pictures of experts: what stands where, at every size."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip('matplotlib')

from mmdet_moe.visualization import expert_figures as figures


def test_rows_stand_with_the_expert_they_take_more_than_others():
    # The average is (.6, .4): rows 0 and 2 exceed it at e0, rows 1 and 3 at e1.
    mean = np.array([[0.8, 0.2], [0.5, 0.5], [1.0, 0.0], [0.1, 0.9]])
    order = figures.specialised_order(mean, [1, 1, 1, 1], [0.1, 0.05, 0.5, 0.9])
    assert order == [2, 0, 3, 1]


def test_points_keep_their_places_on_the_grid():
    # Four corners; y grows upwards, rows downwards.
    cells, side = figures.on_grid(np.array([[0.0, 0], [0, 9], [9, 0], [9, 9]]))
    assert side == 3
    assert cells.tolist() == [[2, 0], [0, 0], [2, 2], [0, 2]]


def test_no_two_points_share_a_cell():
    cells, side = figures.on_grid(np.zeros((50, 2)))
    assert len({tuple(cell) for cell in cells.tolist()}) == 50
    assert cells.max() < side


def test_a_thumbnail_is_the_middle_square():
    image = np.zeros((10, 30, 3), dtype=np.uint8)
    image[:, 10:20] = 255
    thumb = figures.thumbnail(image, 8)
    assert thumb.shape == (8, 8, 3) and (thumb == 255).all()


def test_sixteen_experts_have_sixteen_colours():
    assert len({figures.expert_color(e) for e in range(16)}) == 16


@pytest.mark.parametrize(('experts', 'classes'), [(1, 1), (4, 2), (16, 100)])
def test_every_size_is_drawn(tmp_path, experts, classes):
    rng = np.random.default_rng(0)
    mean = rng.dirichlet(np.ones(experts), size=classes)
    names = [f'class {i}' for i in range(classes)]
    figures.draw_utilisation(tmp_path / 'a.png', mean.mean(0), mean.mean(0), 'title')
    figures.draw_pairs(tmp_path / 'b.png', np.full((experts, experts), 3), 'title')
    figures.draw_groups(tmp_path / 'c.png', names, mean, [1] * classes, [0.0] * classes, 'title')
    levels = (['P3'], mean[:1])
    panels = {'level': levels, 'area': levels, 'both': levels}
    figures.draw_sizes(tmp_path / 'd.png', panels, 'title')
    figures.draw_training(tmp_path / 'e.png', [1], mean[:1], 'title')
    single = {f'e{e}': 0.1 for e in range(experts)}
    figures.draw_ablation(tmp_path / 'f.png', 'AP', 0.0, single, 0.2, {1: 0.1})
    thumbs = [np.zeros((figures.THUMB, figures.THUMB, 3), dtype=np.uint8)] * 3
    figures.draw_mosaic(tmp_path / 'g.png', thumbs, np.eye(3)[:, :2], [0, 0, experts - 1], 'title')
    rows = {e: [(thumbs[0], 0.5)] if e else [] for e in range(experts)}
    figures.draw_preferred(tmp_path / 'h.png', rows, 'title')
    boxed = figures.BoxedImage(thumbs[0], np.array([[1.0, 1, 20, 20]]), [experts - 1])
    empty = figures.BoxedImage(thumbs[0], np.zeros((0, 4)), [])
    figures.draw_boxes(tmp_path / 'i.png', [boxed, empty], 'title')
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f'{letter}.png' for letter in 'abcdefghi']
    assert all(file.read_bytes()[:4] == b'\x89PNG' for file in files)
