"""The shipped few-shot configs: a newcomer joins a model of four domains and trains a step."""

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
DETECTORS = ('retinanet', 'dino')
BASES = {'gem': 'gem/gem', 'damex': 'routers/damex', 'dense': 'gem/dense'}
OLD = {'deeppcb': 'e0', 'hituav': 'e1', 'hdbpmn': 'e2', 'cheetah': 'e3'}


def image(domain, classes=()):
    """What a loader gives: an image of noise, a box for each class."""
    sample = DetDataSample()
    shape = (64, 64)
    sample.set_metainfo(dict(domain=domain, img_shape=shape, ori_shape=shape, scale_factor=(1, 1)))
    sample.set_metainfo(dict(batch_input_shape=shape, pad_shape=shape))
    boxes = torch.tensor([[8.0, 8, 40, 48], [30, 20, 60, 60], [4, 4, 30, 30]])[: len(classes)]
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor(classes))
    noise = torch.randint(0, 255, (3, *shape), generator=torch.Generator().manual_seed(0))
    return dict(inputs=[noise.byte()], data_samples=[sample])


def detections(model):
    """Boxes, scores and class names of one image of each of two old domains."""
    found = []
    for domain in list(OLD)[:2]:
        with torch.no_grad():
            (sample,) = model.eval().test_step(image(domain))
        p = sample.pred_instances
        names = [model.label_space.classes[i] for i in p.labels]
        found.append((p.bboxes, p.scores, names))
    return found


@pytest.mark.parametrize('detector', DETECTORS)
@pytest.mark.parametrize('kind', BASES)
def test_the_newcomer_of_a_shipped_config_takes_a_training_step(
    kind, detector, tmp_path, monkeypatch
):
    MMLogger.get_current_instance().setLevel('WARNING')
    init_default_scope('mmdet_moe')
    before, after = tmp_path / 'before.json', tmp_path / 'after.json'
    ExpertPlan.from_assignment(OLD, experts=4).save(before)
    ExpertPlan.from_assignment({**OLD, 'bccd': 'e4'}, experts=5).save(after)
    name = f'{detector}_effnet-lite0_mini-uodb'
    monkeypatch.setenv('MINI_UODB_PLAN', str(before))
    monkeypatch.setenv('MINI_UODB_HELD_OUT', 'bccd')
    cfg = Config.fromfile(CONFIGS / f'{BASES[kind]}-{name}.py', format_python_code=False)
    torch.manual_seed(0)
    old = MODELS.build(cfg.model)
    with torch.no_grad():  # weights at which every domain finds something
        for key, value in old.named_parameters():
            if 'cls' in key and key.endswith('bias'):
                value.fill_(0.0)
    monkeypatch.delenv('MINI_UODB_HELD_OUT')
    for key, value in dict(MINI_UODB_PLAN=after, BASE_PLAN=before).items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setenv('BASE_CHECKPOINT', 'before.pth')
    cfg = Config.fromfile(CONFIGS / f'fewshot/{kind}-{name}-bccd.py', format_python_code=False)
    assert cfg.load_from == 'before.pth'
    assert list(cfg.train_dataloader.dataset.domains) == ['bccd']
    model = MODELS.build(cfg.model)
    state, _ = fit_checkpoint(model, old.state_dict(), old.label_space.classes)
    model.load_state_dict(state, strict=False)
    start = {key: value.clone() for key, value in model.named_parameters()}
    model.train()
    log = model.train_step(
        image('bccd', model.label_space.unified_ids('bccd')),
        build_optim_wrapper(model, cfg.optim_wrapper),
    )
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in log.values())
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, start[key])}
    assert any('.newcomers.bccd.' in key for key in moved)
    if kind == 'dense':
        assert any(key.startswith('neck.') for key in moved)
        return
    parts = ('.experts.4.', '.newcomers.bccd.')
    if kind == 'damex':
        parts = ('.experts.', '.router.', '.newcomers.bccd.')
        assert any('.router.' in key for key in moved)
    assert all(any(part in key for part in parts) for key in moved), moved
    if kind == 'gem':
        assert any('.experts.4.' in key for key in moved)
        for one, other in zip(detections(old), detections(model), strict=True):
            assert len(one[0])
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
            assert one[2] == other[2]
