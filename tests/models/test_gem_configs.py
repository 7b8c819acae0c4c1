"""The shipped configs: each builds, takes a training step, and says only what differs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

import mmdet_moe  # noqa: F401 - lets configs name mmdet_moe::
from mmdet_moe.models.extract import extract_domain
from mmdet_moe.planning import ExpertPlan
from mmdet_moe.registry import DATASETS, MODELS
from mmdet_moe.structures import LabelSpace

CONFIGS = Path(__file__).parents[2] / 'configs/gem'
SMALL = sorted(
    path.stem for path in CONFIGS.glob('*_effnet-lite0_*.py') if not path.stem.startswith('single')
)
SINGLE = sorted(path.stem for path in CONFIGS.glob('single-*.py'))


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Read a shipped config, with a plan that puts the domains on the planner's experts in turn."""

    def config(name, **environment):
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        dense = Config.fromfile(CONFIGS / f'{name.replace("gem-", "dense-")}.py')
        if not name.startswith('gem-'):
            return dense
        variable = {'mini-uodb': 'MINI_UODB_PLAN', 'demo': 'DEMO_PLAN', '12e_uodb': 'UODB_PLAN'}
        (variable,) = [v for end, v in variable.items() if name.endswith(end)]
        experts = Config.fromfile(CONFIGS / f'{name}.py').planner.num_experts
        domains = dense.label_space.domains
        path = tmp_path / 'plan.json'
        ExpertPlan.from_assignment(
            {domain: f'e{i % experts}' for i, domain in enumerate(domains)}, experts=experts
        ).save(path)
        monkeypatch.setenv(variable, str(path))
        return Config.fromfile(CONFIGS / f'{name}.py')

    MMLogger.get_current_instance().setLevel('WARNING')
    init_default_scope('mmdet_moe')
    return config


def data_for(space: LabelSpace, size=96):
    """An image with two boxes of each of the first two domains, before preprocessing."""
    generator = torch.Generator().manual_seed(0)
    inputs, samples = [], []
    for domain in space.domains[:2]:
        inputs.append(torch.randint(0, 255, (3, size, size), generator=generator).byte())
        sample = DetDataSample()
        sample.set_metainfo(
            dict(
                domain=domain,
                img_shape=(size, size),
                ori_shape=(size, size),
                scale_factor=(1.0, 1.0),
            )
        )
        ids = space.unified_ids(domain)
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([[8.0, 8, 40, 48], [40, 20, 90, 80]]),
            labels=torch.tensor([ids[0], ids[-1]]),
        )
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


@pytest.mark.parametrize('name', SMALL)
def test_small_config_takes_a_training_step(read, name):
    cfg = read(name)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.backbone.init_cfg = None  # reading the ImageNet weights is tested elsewhere
    model.init_weights()
    model.train()
    assert bool(model.moe_names) is name.startswith('gem-')
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {key: value.clone() for key, value in model.named_parameters()}
    log = model.train_step(data_for(model.label_space), optim_wrapper)
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in log.values())
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    head = {key for key in before if key.startswith('bbox_head.')}
    assert moved & head and all(torch.isfinite(p).all() for p in model.parameters())
    # The two domains are on experts 0 and 1; no other moves.
    for layer in model.moe_names:
        experts = {key.split('.experts.')[1][0] for key in moved if key.startswith(f'{layer}.')}
        assert experts <= {'0', '1'}
    assert cfg.find_unused_parameters


@pytest.mark.parametrize('name', SINGLE)
def test_single_twin_is_the_dense_twin_on_one_domain(read, name):
    dense = read(name.replace('single-', 'dense-'))
    domain = list(dense.label_space.domains)[2]
    cfg = read(name, SINGLE_DOMAIN=domain)
    assert cfg.model == dense.model
    assert list(cfg.train_dataloader.dataset.domains) == [domain]
    assert list(cfg.test_dataloader.dataset.domains) == [domain]
    assert list(cfg.test_evaluator.metrics) == [domain]
    count = len(dense.label_space.domains)
    assert cfg.train_cfg.max_iters == dense.train_cfg.max_iters // count
    assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_iters
    with pytest.raises(KeyError):
        read(name, SINGLE_DOMAIN='moon')


def test_gem_and_dense_differ_in_plan_and_experts_only(read):
    for name in SMALL:
        if not name.startswith('gem-'):
            continue
        gem, dense = read(name).to_dict(), read(name.replace('gem-', 'dense-')).to_dict()
        for key in ('plan', 'planner'):
            gem.pop(key)
        for key in ('plan', 'moe'):
            gem['model'].pop(key)
        hooks = [hook for hook in gem['custom_hooks'] if hook['type'] != 'DenseWarmupHook']
        assert {**gem, 'custom_hooks': hooks} == dense, name


def test_full_size_gem_dino_is_mmdets_dino_with_experts_in_layers_1_3_5(read):
    cfg = read('gem-dino-4scale_r50_8xb2-12e_uodb')
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    assert model.moe_names == [f'decoder.layers.{i}.ffn' for i in (1, 3, 5)]
    assert all(len(layer.experts) == 8 for layer in model.moe_layers().values())
    space = model.label_space
    assert len(space.domains) == 11 and model.bbox_head.num_classes == space.num_classes
    # VOC's and COCO's names of one thing are one class.
    assert space.unified_name('voc', 'tvmonitor') == space.unified_name('coco', 'tv') == 'tv'
    assert model.num_queries == 900 and len(model.decoder.layers) == 6
    dataset = DATASETS.build({**cfg.train_dataloader.dataset, 'lazy_init': True})
    assert dataset.metainfo['classes'] == space.classes
    assert cfg.find_unused_parameters and cfg.train_cfg.max_iters == 90000


FULL = sorted(path.stem for path in CONFIGS.glob('*_uodb*.py') if 'effnet' not in path.stem)


@pytest.fixture
def reduced(tmp_path, monkeypatch):
    """Read a full-size config and make it tiny: 1 encoder layer, narrow FFNs, a narrow backbone."""
    path = tmp_path / 'plan.json'
    space = Config.fromfile(CONFIGS / 'dense-dino-4scale_r50_8xb2-12e_uodb.py').label_space
    ExpertPlan.from_assignment(
        {domain: f'e{i % 8}' for i, domain in enumerate(space.domains)}, experts=8
    ).save(path)
    monkeypatch.setenv('UODB_PLAN', str(path))

    def config(name):
        cfg = Config.fromfile(CONFIGS / f'{name}.py')
        model = cfg.model
        model.backbone.init_cfg = None
        if model.backbone.type == 'ResNet':
            model.backbone.update(depth=18, base_channels=4, frozen_stages=-1)
            model.neck.in_channels = [8, 16, 32]
        else:
            model.backbone.update(
                embed_dims=4, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], convert_weights=False
            )
            model.neck.in_channels = [8, 16, 32]
        model.num_queries = 20
        model.encoder.num_layers = 1
        for part in (model.encoder, model.decoder):
            part.layer_cfg.ffn_cfg.feedforward_channels = 8
        return cfg

    MMLogger.get_current_instance().setLevel('WARNING')
    init_default_scope('mmdet_moe')
    return config


@pytest.mark.parametrize('name', FULL)
def test_full_size_config_takes_a_training_step_when_reduced(reduced, name):
    cfg = reduced(name)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    kind = name.partition('-')[0]
    layers = model.moe_layers()
    assert list(layers) == (
        [] if kind == 'dense' else [f'decoder.layers.{i}.ffn' for i in (1, 3, 5)]
    )
    router = {'gem': 'PlanRouter', 'damex': 'DAMEXRouter'}.get(kind)
    assert all(type(layer.router).__name__ == router for layer in layers.values())
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {key: value.clone() for key, value in model.named_parameters()}
    log = model.train_step(data_for(model.label_space, size=64), optim_wrapper)
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in log.values())
    assert ('loss_moe_damex' in log) is (kind == 'damex')
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert any(key.startswith('bbox_head.') for key in moved)
    for layer in layers:
        assert any(key.startswith(f'{layer}.experts.') for key in moved)


def test_damex_has_the_papers_router_and_takes_either_plan(reduced):
    planned = reduced('damex-dino-4scale_r50_8xb2-12e_uodb')
    published = reduced('damex-dino-4scale_r50_8xb2-12e_uodb_published-plan')
    (router,) = [spec.router for spec in planned.model.moe]
    assert (router.weight, router.router.k, router.router.capacity_factor) == (0.1, 1, 1.25)
    assert published.model.moe == planned.model.moe
    plan = ExpertPlan.load(published.model.plan)
    assert len(plan.experts) == 8 and set(plan.datasets) == set(planned.label_space.domains)
    experts = {name: list(plan.experts_of(name))[0] for name in plan.datasets}
    assert experts['kitti'] == experts['lisa']
    assert experts['voc'] == experts['comic'] == experts['coco']
    alone = set(plan.datasets) - {'kitti', 'lisa', 'voc', 'comic', 'coco'}
    assert len({experts[name] for name in alone}) == len(alone) == 6


def test_every_domain_of_uodb_has_its_size_and_both_metrics(reduced):
    cfg = reduced('gem-dino-4scale_r50_8xb2-12e_uodb')
    domains = list(cfg.label_space.domains)
    test = cfg.test_dataloader.dataset.domain_pipelines
    train = cfg.train_dataloader.dataset.domain_pipelines
    assert list(test) == list(train) == domains == list(cfg.test_evaluator.metrics)
    sides = {name: next(t for t in test[name] if t.type == 'Resize').scale for name in domains}
    assert sides['kitti'] == (2000, 576) and sides['deeplesion'] == (1333, 512)
    scales = train['voc'][3].transforms[0][0].scales
    assert scales[0] == (360, 1333) and scales[-1] == (600, 1333)  # 60 to 100 % of 600
    for metrics in cfg.test_evaluator.metrics.values():
        assert [metric.type for metric in metrics] == ['CocoMetric', 'VOCMetric']
    assert cfg.test_evaluator.small == ['comic', 'clipart', 'watercolor']
    assert cfg.train_dataloader.sampler == dict(type='MultiDomainSampler', weights='sqrt')
    dataset = DATASETS.build({**cfg.test_dataloader.dataset, 'lazy_init': True})
    scale = [d.pipeline.transforms[1].scale for d in dataset.datasets.values()]
    assert scale == [sides[name] for name in domains]


def test_a_domains_plain_detector_comes_out_of_the_full_size_gem_config(reduced):
    """Its base is mmdet's, features guess its domains, and each domain has its own pipeline."""
    cfg = reduced('gem-dino-4scale_r50_8xb2-12e_uodb')
    model = MODELS.build(cfg.model)
    plain, state, classes = extract_domain(cfg, model.state_dict(), 'kitti')
    assert classes == ('car', 'pedestrian', 'cyclist') and 'mmdet_moe' not in plain.pretty_text
    dataset = plain.test_dataloader.dataset
    assert (dataset.type, dataset.pipeline[1].scale) == ('CocoDataset', (2000, 576))
    assert [metric.type for metric in plain.test_evaluator] == ['CocoMetric', 'VOCMetric']
    init_default_scope('mmdet')
    stock = MODELS.build(plain.model)
    stock.load_state_dict(state, strict=True)
    assert type(stock).__module__.startswith('mmdet.') and stock.bbox_head.num_classes == 3
