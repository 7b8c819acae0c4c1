"""The shipped RetinaNet-MoE configs: each builds, trains its experts and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from test_gem_configs import data_for
from tiny_models import images, sample

import mmdet_moe  # noqa: F401 - lets configs name mmdet_moe::
from mmdet_moe.models.checkpoint import fit_checkpoint
from mmdet_moe.registry import MODELS

CONFIGS = Path(__file__).parents[2] / 'configs/cnn_moe'
COCO = sorted(path.stem for path in CONFIGS.glob('retinanet_r50_*.py'))
SMALL = sorted(path.stem for path in CONFIGS.glob('retinanet_effnet-*.py'))
SUBNETS = ['bbox_head.cls_subnet', 'bbox_head.reg_subnet']
#: The MoE layers of the variants; the others have both subnets.
LAYERS = {
    'retinanet_r50_fpn_moe-kl-cls-only_coco': SUBNETS[:1],
    'retinanet_r50_fpn_moe-kl-reg-only_coco': SUBNETS[1:],
    'retinanet_r50_fpn_moe-kl-last-conv_coco': [f'{name}.convs.3' for name in SUBNETS],
    'retinanet_r50_fpn_moe-kl-layer4_coco': ['backbone.layer4'],
}


@pytest.fixture(autouse=True)
def quiet():
    MMLogger.get_current_instance().setLevel('WARNING')
    init_default_scope('mmdet_moe')


def read(name):
    return Config.fromfile(CONFIGS / f'{name}.py')


def shrunk(cfg):
    """An eighth of the width and few classes: everything else is the config's."""
    model = cfg.model
    model.backbone.update(dict(base_channels=8, init_cfg=None))
    model.neck.update(dict(in_channels=[32, 64, 128, 256], out_channels=32))
    model.bbox_head.update(dict(in_channels=32, feat_channels=32, num_classes=3))
    for spec in model.get('moe', []):
        spec.router.projection = 8
    torch.manual_seed(0)
    built = MODELS.build(model)
    torch.manual_seed(0)
    built.init_weights()
    return built


def changed(model, before):
    after = model.state_dict()
    return {key for key in after if not torch.equal(after[key], before[key])}


def assert_only_moe_layers_moved(model, moved):
    assert all(key.startswith(tuple(f'{name}.' for name in model.moe_names)) for key in moved)
    for name in model.moe_names:
        experts = {key.split('.experts.')[1][0] for key in moved if f'{name}.experts.' in key}
        assert len(experts) >= 2


@pytest.mark.parametrize('name', COCO)
def test_full_size_config_trains_a_step_at_an_eighth_of_its_width(name):
    cfg = read(name)
    model = shrunk(cfg)
    assert model.moe_names == LAYERS.get(name, SUBNETS)
    for layer in model.moe_layers().values():
        assert layer.num_experts == 4 and layer.router.k == 2
    # It starts from mmdet's own RetinaNet.
    trained = shrunk(get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')).state_dict()
    fitted, report = fit_checkpoint(model, trained)
    assert report.upcycled == model.moe_names
    model.load_state_dict(fitted, strict=True)

    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    item = sample(None, [[4, 4, 60, 56], [30, 20, 62, 60]], ['car', 'dog'])
    log = model.train_step(
        dict(inputs=list((images(2) * 50 + 128).byte()), data_samples=[item, item.clone()]),
        optim_wrapper,
    )
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in log.values())
    assert ('loss_moe_kl' in log) is ('relative' not in name)
    assert_only_moe_layers_moved(model, changed(model, before))


def test_full_size_heads_have_the_papers_parameters():
    def size(module):
        return sum(p.numel() for p in module.parameters())

    model = MODELS.build(read('retinanet_r50_fpn_moe-kl_coco').model)
    subnets = [model.bbox_head.cls_subnet, model.bbox_head.reg_subnet]
    # 6.46 M in the dense head, 25.85 M in four of them.
    assert round(sum(size(layer.experts[0]) for layer in subnets) / 1e6, 2) == 6.46
    assert round(sum(size(layer.experts) for layer in subnets) / 1e6, 2) == 25.85
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    assert trained == {k for k, _ in model.named_parameters() if k.startswith(tuple(SUBNETS))}


def test_full_size_runs_have_the_papers_recipe_and_differ_in_their_experts_only():
    base = read('retinanet_r50_fpn_moe-kl_coco').to_dict()
    assert base['train_dataloader']['batch_size'] == 4 and base['train_cfg']['max_epochs'] == 20
    assert base['optim_wrapper']['optimizer'] == dict(type='Adam', lr=1e-5)
    assert base['optim_wrapper']['clip_grad'] == dict(max_norm=0.1, norm_type=2)
    assert len(COCO) == 9
    for name in COCO:
        cfg = read(name).to_dict()
        cfg['model']['moe'] = base['model']['moe']
        assert cfg['model']['bbox_head'].pop('mix', None) == ('logit' if 'logit' in name else None)
        assert cfg == base, name


@pytest.mark.parametrize('name', SMALL)
def test_small_config_trains_the_experts_of_the_dense_twin(name):
    cfg = read(name)
    dense = read('../gem/dense-retinanet_effnet-lite0_mini-uodb')
    for key in ('label_space', 'train_dataloader', 'val_dataloader', 'val_evaluator'):
        assert cfg[key] == dense[key]
    models = []
    for config in (cfg, dense):
        torch.manual_seed(0)
        model = MODELS.build(config.model)
        model.backbone.init_cfg = None  # reading the ImageNet weights is tested elsewhere
        model.init_weights()
        models.append(model.train())
    model, trained = models
    fitted, report = fit_checkpoint(model, trained.state_dict(), model.label_space.classes)
    assert report.upcycled == model.moe_names == SUBNETS and not report.reinitialised
    model.load_state_dict(fitted, strict=True)
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    log = model.train_step(data_for(model.label_space), optim_wrapper)
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in log.values())
    moved = changed(model, before)
    assert_only_moe_layers_moved(model, moved)
    constraints = {f'{subnet}.balance.0.relative' for subnet in SUBNETS}
    assert constraints & moved == (constraints if 'relative' in name else set())


def test_small_configs_differ_in_their_balance_only():
    one, other = (read(name).to_dict() for name in SMALL)
    assert one['model']['moe'][0].pop('balance') != other['model']['moe'][0].pop('balance')
    assert one == other
