"""The few-shot configs: each builds, loads what was trained without the newcomer, takes a step."""

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
from mmdet_moe.models.checkpoint import fit_checkpoint
from mmdet_moe.planning import ExpertPlan
from mmdet_moe.registry import MODELS

CONFIGS = Path(__file__).parents[2] / 'configs'
NAMES = sorted(path.stem for path in (CONFIGS / 'fewshot').glob('*.py'))
OLD = {'deeppcb': 'e0', 'hituav': 'e1', 'hdbpmn': 'e2', 'cheetah': 'e3'}


@pytest.fixture
def plans(tmp_path, monkeypatch):
    MMLogger.get_current_instance().setLevel('WARNING')
    init_default_scope('mmdet_moe')
    ExpertPlan.from_assignment(OLD, experts=4).save(tmp_path / 'old.json')
    ExpertPlan.from_assignment({**OLD, 'bccd': 'e4'}, experts=5).save(tmp_path / 'new.json')
    monkeypatch.setenv('BASE_PLAN', str(tmp_path / 'old.json'))
    return tmp_path, monkeypatch


def built(cfg):
    model = MODELS.build(cfg.model)
    model.backbone.init_cfg = None  # reading the ImageNet weights is tested elsewhere
    model.init_weights()
    return model.train()


def bccd_batch(model, size=96):
    generator = torch.Generator().manual_seed(0)
    data_sample = DetDataSample()
    shape = dict(img_shape=(size, size), ori_shape=(size, size), scale_factor=(1.0, 1.0))
    data_sample.set_metainfo(dict(domain='bccd', **shape))
    data_sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[8.0, 8, 40, 48]]),
        labels=torch.tensor([model.label_space.unified_ids('bccd')[0]]),
    )
    inputs = [torch.randint(0, 255, (3, size, size), generator=generator).byte()]
    return dict(inputs=inputs, data_samples=[data_sample])


@pytest.mark.parametrize('name', NAMES)
def test_config_adapts_what_was_trained_without_the_newcomer(plans, name):
    folder, monkeypatch = plans
    kind, _, rest = name.partition('-')
    base = f'{kind}-{rest.removesuffix("-bccd")}.py'
    where = 'routers' if kind == 'damex' else 'gem'
    monkeypatch.setenv('MINI_UODB_PLAN', str(folder / 'old.json'))
    monkeypatch.setenv('MINI_UODB_HELD_OUT', 'bccd')
    torch.manual_seed(0)
    old = built(Config.fromfile(CONFIGS / where / base))
    monkeypatch.setenv('MINI_UODB_PLAN', str(folder / 'new.json'))
    monkeypatch.setenv('MINI_UODB_HELD_OUT', 'none')
    cfg = Config.fromfile(CONFIGS / 'fewshot' / f'{name}.py')
    assert list(cfg.train_dataloader.dataset.domains) == ['bccd']
    assert len(cfg.test_dataloader.dataset.domains) == 5
    model = built(cfg)
    fitted, report = fit_checkpoint(model, old.state_dict(), old.label_space.classes)
    loaded = model.load_state_dict(fitted, strict=False)
    assert all('newcomers.bccd' in key for key in loaded.missing_keys)
    assert report.reinitialised == ['RBC', 'WBC', 'Platelets'] and not loaded.unexpected_keys
    assert list(report.grown) == ([] if kind == 'dense' else ['e4'])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train_step(bccd_batch(model), build_optim_wrapper(model, cfg.optim_wrapper))
    moved = {key for key, v in model.state_dict().items() if not torch.equal(v, before[key])}
    assert any('newcomers.bccd' in key for key in moved)
    if kind == 'gem':
        assert all('.experts.4.' in key or 'newcomers.bccd' in key for key in moved)
        assert any('.experts.4.' in key for key in moved)
    elif kind == 'damex':
        parts = ('.experts.', '.router.', 'newcomers.bccd')
        assert all(any(part in key for part in parts) for key in moved)
    else:
        assert any(key.startswith('neck.') for key in moved)
