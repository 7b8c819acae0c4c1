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
    assert cfg.find_unused_parameters and cfg.train_cfg.max_epochs == 12
