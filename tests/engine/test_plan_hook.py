"""A checkpoint knows the plan it was trained with."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmdet_moe.engine import PlanHook
from mmdet_moe.engine.hooks.plan_hook import moved_datasets, plan_assignment
from mmdet_moe.moe import RoutingState, replace_modules


def planned_model(plan: dict, **router) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    spec = dict(targets='[02]', router={'type': 'PlanRouter', 'plan': plan, **router})
    replace_modules(model, [spec], RoutingState())
    return model


def runner_of(model: nn.Module) -> SimpleNamespace:
    return SimpleNamespace(model=model, logger=logging.getLogger('test_plan_hook'))


PLAN = dict(bccd='e0', cheetah=dict(e0=0.5, e1=0.5), hituav='e1')


def test_the_assignment_is_the_plans_by_name():
    half = {'e0': 0.5, 'e1': 0.5}
    expected = {'bccd': {'e0': 1.0}, 'cheetah': half, 'hituav': {'e1': 1.0}}
    assert plan_assignment(planned_model(PLAN)) == {'0': expected, '2': expected}


def test_a_checkpoint_under_its_own_plan_loads_without_a_word(caplog):
    runner, checkpoint = runner_of(planned_model(PLAN)), {}
    PlanHook().before_save_checkpoint(runner, checkpoint)
    with caplog.at_level(logging.WARNING):
        PlanHook().after_load_checkpoint(runner, checkpoint)
    assert not caplog.records


def test_another_plan_is_a_warning_that_names_the_moved_datasets(caplog, tmp_path):
    checkpoint = {}
    PlanHook().before_save_checkpoint(runner_of(planned_model(PLAN)), checkpoint)
    # Plain data: what weights_only lets through.
    torch.save(checkpoint, tmp_path / 'checkpoint.pth')
    checkpoint = torch.load(tmp_path / 'checkpoint.pth', weights_only=True)
    other = planned_model({**PLAN, 'bccd': 'e1', 'newcomer': 'e0'})
    with caplog.at_level(logging.WARNING):
        PlanHook().after_load_checkpoint(runner_of(other), checkpoint)
    (record,) = caplog.records
    # cheetah and hituav stay where they were; the newcomer was not trained, so it did not move.
    assert record.getMessage().endswith('trained with: bccd: e0 -> e1')


@pytest.mark.parametrize('checkpoint', [{}, {'meta': None}, {'meta': {}}])
def test_a_checkpoint_without_a_plan_says_nothing(checkpoint, caplog):
    with caplog.at_level(logging.WARNING):
        PlanHook().after_load_checkpoint(runner_of(planned_model(PLAN)), checkpoint)
    assert not caplog.records


def test_a_dense_model_writes_nothing():
    checkpoint = {}
    PlanHook().before_save_checkpoint(runner_of(nn.Linear(2, 2)), checkpoint)
    assert checkpoint == {}


def test_each_moved_dataset_is_listed_once_whatever_the_number_of_layers():
    before = {'a': {'x': {'e0': 1.0}}, 'b': {'x': {'e0': 1.0}}}
    after = {'a': {'x': {'e1': 1.0}}, 'b': {'x': {'e1': 1.0}}}
    assert moved_datasets(before, after) == ['x: e0 -> e1']


def training_on(domains: list, model: nn.Module) -> SimpleNamespace:
    dataset = SimpleNamespace(metainfo=dict(domains=tuple(domains)))
    loop = SimpleNamespace(dataloader=SimpleNamespace(dataset=dataset))
    return SimpleNamespace(model=model, train_loop=loop)


def test_training_starts_on_the_plans_datasets_and_no_others():
    PlanHook().before_train(training_on(['hituav', 'bccd', 'cheetah'], planned_model(PLAN)))
    with pytest.raises(ValueError, match=r"only in the data: \['voc'\]; only in the plan") as error:
        PlanHook().before_train(training_on(['bccd', 'cheetah', 'voc'], planned_model(PLAN)))
    assert 'hituav' in str(error.value)


@pytest.mark.parametrize('router', [{}, dict(type='DAMEXRouter', router=dict(type='TopKRouter'))])
def test_training_on_a_part_of_the_plan_must_be_asked_for(router):
    some = training_on(['bccd', 'cheetah'], planned_model(PLAN, **router))
    with pytest.raises(ValueError, match=r"only in the plan: \['hituav'\]"):
        PlanHook().before_train(some)
    PlanHook(subset=True).before_train(some)
    with pytest.raises(ValueError, match=r"only in the data: \['voc'\]"):
        PlanHook(subset=True).before_train(
            training_on(['bccd', 'voc'], planned_model(PLAN, **router))
        )
