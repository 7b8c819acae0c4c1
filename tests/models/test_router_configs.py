"""Every router has a config that puts it into DINO, and learns there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from test_gem_configs import data_for

import mmdet_moe  # noqa: F401 - lets configs name mmdet_moe::
from mmdet_moe.moe import ROUTERS
from mmdet_moe.planning import ExpertPlan
from mmdet_moe.registry import MODELS

CONFIGS = sorted((Path(__file__).parents[2] / 'configs/routers').glob('*.py'))
STEPS = 5


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Domains on four experts in turn; a prototype for each, of an embedder without weights."""
    domains = ['bccd', 'deeppcb', 'hituav', 'hdbpmn', 'cheetah']
    backbone = dict(type='EfficientNetLite', out_indices=[1])
    prototypes = dict(
        embedder=dict(type='FrozenEmbedder', backbone=backbone, size=32),
        dimension=24,
        mean={name: torch.eye(24)[i].tolist() for i, name in enumerate(domains)},
        concentration=5.0,
    )
    path = tmp_path / 'plan.json'
    assignment = {domain: f'e{i % 4}' for i, domain in enumerate(domains)}
    ExpertPlan.from_assignment(assignment, experts=4, prototypes=prototypes).save(path)
    monkeypatch.setenv('MINI_UODB_PLAN', str(path))


def router_of(path: Path) -> str:
    (spec,) = Config.fromfile(path).model.moe
    return spec.router.type


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem.partition('-dino')[0])
def test_a_router_trains_in_dino(path, plan):
    MMLogger.get_current_instance().setLevel('WARNING')
    init_default_scope('mmdet_moe')
    cfg = Config.fromfile(path)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.backbone.init_cfg = None  # reading the ImageNet weights is tested elsewhere
    model.init_weights()
    model.train()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    layers = model.moe_layers()
    assert layers and all(layer.num_experts == 4 for layer in layers.values())
    before = {key: value.clone() for key, value in model.named_parameters()}
    for _ in range(STEPS):
        log = model.train_step(data_for(model.label_space), optim_wrapper)
        assert all(torch.isfinite(torch.as_tensor(value)).all() for value in log.values())
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    for name in layers:
        assert any(key.startswith(f'{name}.experts.') for key in moved)
        assert any(key.startswith(f'{name}.router.') for key in moved), 'the gate learns'
    model.eval()
    with torch.no_grad():
        result = model.test_step(data_for(model.label_space))
    assert all(torch.isfinite(sample.pred_instances.scores).all() for sample in result)


def test_every_learned_router_has_a_config(plan):
    shipped = {router_of(path) for path in CONFIGS}
    learned = {name for name, cls in ROUTERS.classes.items() if cls.learned}
    own = {name for name in learned if ROUTERS.classes[name].__module__.startswith('mmdet_moe.')}
    assert own == shipped
