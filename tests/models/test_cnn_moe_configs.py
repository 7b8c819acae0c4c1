"""The classification configs: each builds, takes a training step, and says only what differs."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip('mmpretrain')

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

import mmdet_moe  # noqa: F401 - lets configs name mmdet_moe::

CONFIGS = Path(__file__).parents[2] / 'configs/cnn_moe'
NAMES = sorted(path.stem for path in CONFIGS.glob('resnet*_*.py'))
MOE = [name for name in NAMES if '_moe-' in name]
BALANCES = {
    'importance': 'ImportanceLoss',
    'kl': 'KLLoss',
    'relative': 'RelativeImportanceConstraint',
    'mean': 'MeanImportanceConstraint',
}
WIDTH = 8  # of the first stage; 64 is the networks' own, 16 that of the small ones


pytestmark = pytest.mark.usefixtures('mmpretrain_scope')


@functools.cache
def _read(name: str) -> Config:
    return Config.fromfile(CONFIGS / f'{name}.py', format_python_code=False)


def read(name: str) -> Config:
    return copy.deepcopy(_read(name))


def build(cfg: Config, width: int | None = WIDTH):
    """The config's model as a Runner builds it, narrower."""
    model = cfg.model
    model.data_preprocessor = cfg.data_preprocessor
    if width is not None:
        wide = model.backbone.get('base_channels', 64)
        model.backbone.update(base_channels=width, stem_channels=width)
        model.head.in_channels = model.head.in_channels * width // wide
    return MODELS.build(model)


def batch_for(cfg: Config, size=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (size, 3, 32, 32), generator=generator).byte()
    samples = []
    for i in range(size):
        sample = DataSample().set_gt_label(i % cfg.model.head.num_classes)
        sample.set_metainfo(dict(domain=f'style{i % 2}', img_shape=(32, 32)))
        samples.append(sample)
    return dict(inputs=list(images), data_samples=samples)


@pytest.mark.parametrize('name', NAMES)
def test_a_config_trains(name):
    cfg = read(name)
    torch.manual_seed(0)
    model = build(cfg)
    model.init_weights()
    model.train()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {key: value.clone() for key, value in model.named_parameters()}
    for _ in range(2):  # the first does not reach conv2: the norm behind it starts as zero
        log = model.train_step(batch_for(cfg), optim_wrapper)
        assert all(torch.isfinite(torch.as_tensor(value)).all() for value in log.values())
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert all(torch.isfinite(value).all() for value in model.parameters())

    layers = model.moe_layers()
    assert bool(layers) is (name in MOE)
    for layer_name, layer in layers.items():
        assert any(key.startswith(f'{layer_name}.experts.') for key in moved)
        # Experts of a training from scratch differ from the first step on.
        first, second = (next(layer.experts[e].parameters()) for e in (0, 1))
        assert not torch.equal(first, second)
    for loss in ('importance', 'kl'):
        assert (f'loss_moe_{loss}' in log) is (f'-{loss}' in name)
    model.eval()
    with torch.no_grad():
        (*_, sample) = model.test_step(batch_for(cfg))
    assert sample.pred_score.shape == (cfg.model.head.num_classes,)


def test_the_papers_grid_is_complete_and_says_what_its_names_say():
    grid = [
        (experts, position, balance)
        for experts in (4, 10)
        for position in (1, 2, 3, 4)
        for balance in BALANCES
    ]
    for experts, position, balance in grid:
        name = f'resnet18_moe-e{experts}-pos{position}-{balance}_cifar100'
        (spec,) = read(name).model.moe
        assert spec.num_experts == experts and spec.router.k == 2
        assert re.fullmatch(spec.targets, f'backbone.layer{position}')
        (loss,) = spec.balance
        assert loss.type == BALANCES[balance]
        # The paper's weight of the losses, and the thresholds of the constraints.
        expected = dict(importance=0.5, kl=0.5, relative=0.5, mean=0.3)[balance]
        assert loss.get('weight', loss.get('threshold')) == expected


@pytest.mark.parametrize('data', ['cifar100', 'emoji'])
def test_a_moe_config_differs_from_the_dense_one_in_its_experts_only(data):
    for name in MOE:
        if name.endswith(data):
            network = name.partition('_')[0]
            cfg = read(name).to_dict()
            dense = read(f'{network}_dense_{data}').to_dict()
            cfg['model'].pop('moe')
            for key in ('moe_layer', 'balances'):
                cfg.pop(key)
            assert cfg == dense, name


def test_the_recipe_is_the_papers():
    cfg = read('resnet18_dense_cifar100')
    assert cfg.optim_wrapper.optimizer == dict(type='Adam', lr=1e-3)
    assert cfg.train_cfg.max_epochs == 150 and cfg.param_scheduler.milestones == [80, 120]
    assert cfg.param_scheduler.gamma == 0.1
    loaders = (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader)
    assert {loader.batch_size for loader in loaders} == {128}
    assert [step.type for step in cfg.train_pipeline] == [
        'RandomCrop',
        'RandomFlip',
        'ColorJitter',
        'PackInputs',
    ]
    assert cfg.train_dataloader.dataset.pipeline == cfg.train_pipeline
    assert cfg.model.head.num_classes == 100


def test_four_experts_of_the_full_network_are_four_stages():
    dense = build(read('resnet18_dense_cifar100'), width=None)
    cfg = read('resnet18_moe-e4-pos1-kl_cifar100')
    moe = build(cfg, width=None)
    stage = sum(p.numel() for p in dense.backbone.layer1.parameters())
    # Two blocks of two 3x3 convolutions 64 -> 64 with a norm (2 · 64) each.
    assert stage == 4 * (9 * 64 * 64 + 2 * 64)
    experts = sum(p.numel() for p in moe.backbone.layer1.experts.parameters())
    assert experts == 4 * stage
