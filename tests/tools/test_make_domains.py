"""The generated domains: what the demo and its users rely on."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def _load_tool():
    import sys

    spec = importlib.util.spec_from_file_location('make_domains', ROOT / 'tools/make_domains.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules['make_domains'] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


tool = _load_tool()
SMALL = {'images': 16, 'val_images': 2, 'size': 96}


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('made') / 'domains'
    assert tool.make_domains(out, **SMALL)
    return out


def _digest(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob('*'))
        if path.is_file()
    }


def _coco(root: Path, name: str, split: str) -> dict:
    return json.loads((root / name / f'{split}.json').read_text())


def test_label_spaces_do_not_overlap_and_sizes_differ_eightfold() -> None:
    names = [name for domain in tool.DOMAINS.values() for name in domain.classes]
    assert len(tool.DOMAINS) >= 5
    assert len(set(names)) == len(names)
    sizes = [d['train'] for d in tool.describe(240, 40, 160, 0)['domains'].values()]
    assert max(sizes) >= 8 * min(sizes)


def test_the_same_digit_means_different_classes_and_is_background_somewhere() -> None:
    # The eight is ink_eight, thermal_even, neon_nonprime...; the one is nothing in film.
    assert len({domain.class_of(8) for domain in tool.DOMAINS.values()}) == len(tool.DOMAINS)
    assert tool.DOMAINS['film'].class_of(1) is None


def test_domains_look_different(root: Path) -> None:
    # The mean colours of any two domains are farther apart than the images within each of them.
    means = {
        name: np.array(
            [np.asarray(Image.open(p)).mean((0, 1)) for p in (root / name).rglob('*.png')]
        )
        for name in tool.DOMAINS
    }
    for a in means:
        for b in means:
            if a < b:
                apart = np.linalg.norm(means[a].mean(0) - means[b].mean(0))
                within = max(means[a].std(0).max(), means[b].std(0).max())
                assert apart > 2 * within, (a, b)


@pytest.mark.parametrize('name', tool.DOMAINS)
def test_annotations_are_valid_coco_and_every_image_has_an_object(root: Path, name: str) -> None:
    for split in ('train', 'val'):
        coco = _coco(root, name, split)
        ids = {image['id'] for image in coco['images']}
        assert {a['image_id'] for a in coco['annotations']} == ids
        assert [c['name'] for c in coco['categories']] == list(tool.DOMAINS[name].classes)
        assert {a['category_id'] for a in coco['annotations']} <= {
            c['id'] for c in coco['categories']
        }
        assert len({a['id'] for a in coco['annotations']}) == len(coco['annotations'])
        for image in coco['images']:
            with Image.open(root / name / split / image['file_name']) as picture:
                assert picture.size == (image['width'], image['height']) == (96, 96)
        for annotation in coco['annotations']:
            x, y, width, height = annotation['bbox']
            assert x >= 0 and y >= 0 and width > 3 and height > 3
            assert x + width <= 96 and y + height <= 96
            assert annotation['area'] == width * height


def test_boxes_are_tight_around_the_strokes() -> None:
    pools = tool.load_glyphs('train')
    for glyph in tool.place_glyphs(pools, (0, 3, 8), 128, np.random.default_rng(0)):
        rows, columns = np.nonzero(glyph.mask > 0.5)
        # x, y of the first stroke pixel; width and height count the last one in.
        expected = (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)
        assert glyph.box == tuple(expected)


def test_validation_digits_are_never_training_digits() -> None:
    train, val = tool.load_glyphs('train'), tool.load_glyphs('val')
    for digit in range(10):
        seen = {scan.tobytes() for scan in train[digit]}
        assert not any(scan.tobytes() in seen for scan in val[digit])


def test_same_seed_same_bytes_and_another_seed_other_bytes(root: Path, tmp_path: Path) -> None:
    tool.make_domains(tmp_path / 'again', **SMALL)
    assert _digest(tmp_path / 'again') == _digest(root)
    tool.make_domains(tmp_path / 'other', seed=1, **SMALL)
    other = _digest(tmp_path / 'other')
    assert all(other[path] != digest for path, digest in _digest(root).items())


def test_an_image_does_not_depend_on_how_many_are_made(root: Path, tmp_path: Path) -> None:
    tool.make_domains(tmp_path / 'more', **{**SMALL, 'images': 24})
    few, more = _digest(root), _digest(tmp_path / 'more')
    pictures = [path for path in few if path.endswith('.png')]
    assert pictures and all(few[path] == more[path] for path in pictures)


def test_complete_domains_are_left_alone(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob('*')}
    assert not tool.make_domains(root, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in root.rglob('*')} == before


def test_other_domains_are_replaced_only_on_demand(tmp_path: Path) -> None:
    out = tmp_path / 'domains'
    tool.make_domains(out, **SMALL)
    next((out / 'ink' / 'train').glob('*.png')).unlink()
    with pytest.raises(FileExistsError, match='--overwrite'):
        tool.make_domains(out, **SMALL)
    assert tool.make_domains(out, overwrite=True, **SMALL)
    assert not tool.make_domains(out, **SMALL)


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / 'precious.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='not made by this tool'):
        tool.make_domains(tmp_path, overwrite=True, **SMALL)
    assert (tmp_path / 'precious.txt').read_text() == 'mine'


def test_an_interrupted_run_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, 'place_glyphs', interrupted)
    with pytest.raises(KeyboardInterrupt):
        tool.make_domains(tmp_path / 'domains', **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('flag', 'value', 'says'),
    [('--images', '1', 'images must be at least 8'), ('--size', '8', 'size must be at least 64')],
)
def test_bad_arguments_exit_2_with_one_line(
    flag: str, value: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert tool.main(['--out', str(tmp_path / 'x'), flag, value]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count('\n') == 1
