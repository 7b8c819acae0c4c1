"""The main job on real images, small: plan, train, test, metrics per domain."""

import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / 'shared/data/mini_uodb'
DOMAINS = ('bccd', 'deeppcb', 'hituav', 'hdbpmn', 'cheetah')
CONFIG = ROOT / 'configs/gem/gem-retinanet_effnet-lite0_mini-uodb.py'


@pytest.mark.parametrize('name', ['routers', 'retinanet', 'dino'])
def test_every_model_of_a_suite_gets_the_same_budget(monkeypatch, name):
    from argparse import ArgumentParser

    from mmengine.config import Config, DictAction

    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    import mini_uodb

    parser = ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    budget = mini_uodb.Budget(size=224, start_steps=100, steps=40)
    suite = mini_uodb.SUITES[name]
    wanted = {'topk', 'soft', 'remoe', 'moe-pp'} if name == 'routers' else {'single'}
    assert {'dense', 'gem', 'damex'} | wanted <= set(suite)
    found = []
    for config in [config for model, config in suite.items() if model != 'single']:
        cfg = Config.fromfile(str(ROOT / config), format_python_code=False)
        for options in (
            budget.train_options(40, load_from=Path('start.pth')),
            budget.test_options(),
        ):
            cfg.merge_from_dict(parser.parse_args(['--cfg-options', *options]).cfg_options)
        for loader in (cfg.train_dataloader, cfg.test_dataloader):
            (resize,) = (t for t in loader.dataset.pipeline if t.type == 'Resize')
            assert resize.scale == (224, 224)
        assert cfg.val_cfg is None and cfg.load_from == 'start.pth'
        found.append((cfg.train_cfg, cfg.param_scheduler, cfg.optim_wrapper, cfg.train_dataloader))
    warm, cosine = found[0][1]
    assert (warm.end, cosine.begin, cosine.end, cosine.T_max) == (4, 4, 40, 36)
    assert all(one == found[0] for one in found)


def test_models_of_one_domain_have_the_steps_of_one_of_the_others_together(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    import mini_uodb

    trained = []

    def train(steps, what, config, folder, seed, options, env):
        trained.append((env['SINGLE_DOMAIN'], options))
        return folder / 'iter.pth'

    monkeypatch.setattr(mini_uodb.job, 'train', train)
    flags = []
    monkeypatch.setattr(mini_uodb.job, 'test', lambda *_, **more: flags.append(more['flags']))
    budget = mini_uodb.Budget(size=224, start_steps=400, steps=200)
    steps = mini_uodb.job.Steps(tmp_path, '', {})
    tests = mini_uodb.singles(steps, 'single.py', tmp_path, 0, DOMAINS, budget)
    # (400 + 200) / 5 steps each.
    assert [domain for domain, _ in trained] == list(DOMAINS)
    assert all('train_cfg.max_iters=120' in options for _, options in trained)
    assert flags == [['--both-readings']] * 5
    assert tests[0] == f'single={tmp_path}/test-single-bccd/metrics.json'


def test_a_domain_that_is_held_out_is_in_nothing(monkeypatch, tmp_path):
    from mmengine.config import Config

    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    import mini_uodb

    monkeypatch.setenv('MINI_UODB_HELD_OUT', 'bccd')
    cfg = Config.fromfile(str(CONFIG), format_python_code=False)
    rest = [name for name in DOMAINS if name != 'bccd']
    parts = [cfg.label_space.domains, cfg.train_dataloader.dataset.domains]
    parts += [cfg.test_dataloader.dataset.domains, cfg.test_evaluator.metrics]
    assert all(list(part) == rest for part in parts)
    for name in DOMAINS:
        (tmp_path / name).mkdir()
        (tmp_path / name / 'train.json').touch()
    assert mini_uodb.domains_of(tmp_path, 'bccd') == sorted(rest)
    with pytest.raises(mini_uodb.job.StepError, match="no domain 'coco'"):
        mini_uodb.domains_of(tmp_path, 'coco')


@pytest.mark.skipif(not DATA.is_dir(), reason=f'{DATA} is not there')
def test_real_images_are_planned_trained_on_and_scored_per_domain(tmp_path, monkeypatch):
    from mmengine.config import Config
    from mmengine.runner import Runner

    from mmdet_moe.planning import ExpertPlan

    sys.path.insert(0, str(ROOT / 'tools'))
    import plan_experts

    plan_file = tmp_path / 'plan.json'
    monkeypatch.setenv('MINI_UODB', f'{DATA}/')
    monkeypatch.setenv('MINI_UODB_PLAN', str(plan_file))

    # Plan: every domain has an expert, no expert more images than it can hold.
    arguments = [str(CONFIG), '--out', str(plan_file), '--max-images', '8', '--quiet']
    assert plan_experts.main(arguments) == 0
    plan = ExpertPlan.load(plan_file)
    assert sorted(plan.datasets) == sorted(DOMAINS)
    assert all(sum(plan.experts_of(name).values()) == 1 for name in DOMAINS)
    loads = plan.certificate['loads']
    assert all(load <= capacity for load, capacity in zip(loads, plan.capacity, strict=True))

    # Train 20 steps, 10 of them dense, then test on 6 images of each domain; at 192 px, for
    # the time it takes.
    cfg = Config.fromfile(str(CONFIG), format_python_code=False)
    cfg.work_dir = str(tmp_path / 'run')
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=20, val_interval=100)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None  # the test is enough
    del cfg.default_hooks.checkpoint['save_best']
    cfg.randomness = dict(seed=0)
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        next(step for step in loader.dataset.pipeline if step.type == 'Resize').scale = (192, 192)
    for name in DOMAINS:
        cfg.test_dataloader.dataset.domains[name].indices = 6
    runner = Runner.from_cfg(cfg)
    before = {key: value.clone() for key, value in runner.model.state_dict().items()}
    runner.train()
    moved = {
        key.split('.experts.')[1].split('.')[0]
        for key, value in runner.model.state_dict().items()
        if '.experts.' in key and not value.equal(before[key])
    }
    used = {plan.experts.index(expert) for name in DOMAINS for expert in plan.experts_of(name)}
    assert moved == {str(expert) for expert in used}

    metrics = runner.test()
    for name in (*DOMAINS, 'macro'):
        value = metrics[f'{name}/coco/bbox_mAP_50']
        # -1 is COCO's word for a domain without a box; it never is on these images.
        assert math.isfinite(value) and 0 <= value <= 1, (name, value)
    mean = sum(metrics[f'{name}/coco/bbox_mAP'] for name in DOMAINS) / len(DOMAINS)
    assert metrics['macro/coco/bbox_mAP'] == pytest.approx(mean)
