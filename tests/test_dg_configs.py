"""The configs of the DomainBed protocol train a step on miniatures of their data."""

from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip('mmpretrain')

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmpretrain.registry import MODELS

import mmdet_moe.jobs.preload  # noqa: F401
from mmdet_moe.datasets.dg_catalog import CATALOG

CONFIGS = Path(__file__).parents[1] / 'configs/dg'
STYLES = ('noto', 'twemoji', 'fluent_flat', 'fluent_hc', 'openmoji')
EMOJI = ('activities', 'animals_nature', 'food_drink', 'objects', 'smileys', 'travel_places')


def write_images(root: Path, domains, classes, per_class: int, size: int) -> None:
    rng = np.random.default_rng(0)
    for domain in domains:
        for label in classes:
            (root / domain / label).mkdir(parents=True)
            for i in range(per_class):
                image = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
                cv2.imwrite(str(root / domain / label / f'{label}{i}.png'), image)


def trained_step(cfg: Config):
    """One batch through the model and back; the batch."""
    torch.manual_seed(0)
    cfg.model.backbone.pop('init_cfg', None)
    model = MODELS.build({**cfg.model, 'data_preprocessor': cfg.data_preprocessor})
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    batch = model.data_preprocessor(next(iter(loader)), training=True)
    loss = model(**batch, mode='loss')['loss']
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in model.head.parameters())
    return batch


def test_erm_with_resnet50_on_pacs(tmp_path, monkeypatch, mmpretrain_scope):
    info = CATALOG['PACS']
    write_images(tmp_path / 'PACS', info.domains, info.classes, 2, 16)
    for name, value in dict(DG_ROOT=f'{tmp_path}/', DG_TEST='sketch', DG_TRIAL='1').items():
        monkeypatch.setenv(name, value)
    cfg = Config.fromfile(CONFIGS / 'erm_resnet50.py')
    cfg.train_dataloader.batch_size = 1
    cfg.model.backbone.update(base_channels=4, stem_channels=4)  # the same, and narrow
    cfg.model.head.in_channels = 128
    cfg.train_dataloader.dataset.check = False
    batch = trained_step(cfg)
    assert batch['inputs'].shape == (3, 3, 224, 224)
    assert [x.domain for x in batch['data_samples']] == ['art_painting', 'cartoon', 'photo']
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (5001, 300)


def test_domainnet_has_its_own_steps_and_classes(monkeypatch):
    monkeypatch.setenv('DG_DATASET', 'DomainNet')
    cfg = Config.fromfile(CONFIGS / 'erm_resnet50.py')
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (15001, 1000)
    assert cfg.model.head.num_classes == 345
    monkeypatch.setenv('DG_DATASET', 'ColoredMNIST')
    cfg = Config.fromfile(CONFIGS / 'erm_vit_digits.py')
    assert cfg.model.head.num_classes == 2
    assert cfg.val_dataloader.dataset.name == 'ColoredMNIST'


def test_erm_on_emoji_holds_out_both_fluent_styles(tmp_path, monkeypatch, mmpretrain_scope):
    write_images(tmp_path, STYLES, EMOJI, 8, 16)
    monkeypatch.setenv('EMOJI_DG', f'{tmp_path}/')
    monkeypatch.setenv('DG_TEST', 'fluent_hc')
    batch = trained_step(Config.fromfile(CONFIGS / 'erm_vit-tiny_emoji.py'))
    assert batch['inputs'].shape == (24, 3, 64, 64)
    styles = [x.domain for x in batch['data_samples']]
    assert styles == ['noto'] * 8 + ['openmoji'] * 8 + ['twemoji'] * 8


@pytest.mark.parametrize(
    ('name', 'variable'),
    [('erm_resnet50', 'RESNET50'), ('vit-s16_dense', 'DEIT_SMALL')],
)
def test_pretrained_weights_are_the_owners_or_those_that_the_environment_names(
    monkeypatch, name, variable
):
    def checkpoint():
        cfg = Config.fromfile(CONFIGS / f'{name}.py', format_python_code=False)
        return cfg.model.backbone.init_cfg.checkpoint

    default = checkpoint()
    assert default.startswith('https://') and default.endswith('.pth')
    monkeypatch.setenv(variable, '/weights/mine.pth')
    assert checkpoint() == '/weights/mine.pth'


@pytest.mark.parametrize(
    ('name', 'dataset', 'lr', 'weight_decay'),
    [
        ('vit-s16_sf-moe-e6-paper', 'TerraIncognita', 3e-5, 1e-4),
        ('vit-s16_gmoe-e6-published', 'OfficeHome', 1e-5, 0.0),
    ],
)
def test_a_row_of_the_table_has_the_published_recipe(monkeypatch, name, dataset, lr, weight_decay):
    monkeypatch.setenv('DG_DATASET', dataset)
    cfg = Config.fromfile(CONFIGS / f'{name}.py', format_python_code=False)
    wanted = dict(type='Adam', lr=lr, weight_decay=weight_decay)
    assert cfg.optim_wrapper.optimizer == wanted


def test_a_config_takes_its_published_recipe_by_the_data_set(tmp_path, monkeypatch):
    config = tmp_path / 'mine.py'
    config.write_text(
        f"_base_ = '{CONFIGS}/erm_resnet50.py'\n"
        'import importlib\n'
        "catalog = importlib.import_module('mmdet_moe.datasets.dg_catalog')\n"
        "optimizer = catalog.recipe('sf_moe', '{{$DG_DATASET:PACS}}')\n"
        'optim_wrapper = dict(optimizer=optimizer)\n'
    )
    monkeypatch.setenv('DG_DATASET', 'VLCS')
    optimizer = Config.fromfile(config).optim_wrapper.optimizer
    assert optimizer == dict(type='Adam', lr=1e-5, weight_decay=1e-6)
