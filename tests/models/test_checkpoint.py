"""Ordinary checkpoints fit: dense to experts, class rows by name, anything else is an error."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import CONFIGS, SPACE, build, moe_specs

from mmdet_moe.models.checkpoint import (
    CheckpointError,
    checkpoint_classes,
    copy_class_rows,
    fit_checkpoint,
)
from mmdet_moe.structures import LabelSpace

KINDS = list(CONFIGS)
CLASS_KEYS = dict(
    retinanet='bbox_head.retina_cls.weight', dino='dn_query_generator.label_embedding.weight'
)
#: Shares crack and dog with SPACE, in another order, and has a class of its own.
OTHER = LabelSpace(dict(wall=['crack', 'brick', 'dog']))


@pytest.mark.parametrize('kind', KINDS)
def test_state_dict_of_a_moe_model_goes_round(kind):
    model = build(kind, moe=moe_specs(kind, noise=0.1))
    other = build(kind, seed=1, moe=moe_specs(kind))
    assert other.load_state_dict(model.state_dict(), strict=True)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


@pytest.mark.parametrize('kind', KINDS)
def test_dense_checkpoint_of_the_same_classes_fills_every_expert(kind):
    dense = build(kind, seed=1).state_dict()
    model = build(kind, moe=moe_specs(kind))
    fitted, report = fit_checkpoint(model, dense, SPACE.classes)
    assert report.upcycled == model.moe_names and not report.rows
    model.load_state_dict(fitted, strict=True)
    for name, layer in model.moe_layers().items():
        for expert in layer.experts:
            for key, value in expert.named_parameters():
                assert torch.equal(value, dense[f'{name}.{key}'])


@pytest.mark.parametrize('kind', KINDS)
def test_class_rows_are_copied_by_name_and_the_others_listed(kind):
    theirs = build(kind, seed=1, label_space=OTHER).state_dict()
    model = build(kind, moe=moe_specs(kind))
    before = copy.deepcopy(model.state_dict())
    fitted, report = fit_checkpoint(model, theirs, OTHER.classes)
    assert report.copied == ['dog', 'crack']
    assert report.reinitialised == ['car', 'cell', 'dot']
    model.load_state_dict(fitted, strict=True)
    key = CLASS_KEYS[kind]
    rows = model.state_dict()[key].unflatten(0, (-1, 5))
    old = theirs[key].unflatten(0, (-1, 3))  # crack, brick, dog
    own = before[key].unflatten(0, (-1, 5))  # car, dog, cell, dot, crack
    assert torch.equal(rows[:, 1], old[:, 2]) and torch.equal(rows[:, 4], old[:, 0])
    for i in (0, 2, 3):
        assert torch.equal(rows[:, i], own[:, i])


def test_same_number_of_classes_in_another_order_is_not_taken_as_the_same():
    shuffled = LabelSpace(dict(a=['crack', 'dot', 'cell', 'dog', 'car']))
    theirs = build('dino', seed=1, label_space=shuffled).state_dict()
    fitted, report = fit_checkpoint(build('dino'), theirs, shuffled.classes)
    key = CLASS_KEYS['dino']
    assert report.copied == list(SPACE.classes) and not report.reinitialised
    assert torch.equal(fitted[key], theirs[key].flip(0))


def test_checkpoint_that_names_no_classes_leaves_all_rows_at_their_initialisation():
    theirs = build('retinanet', seed=1, label_space=OTHER).state_dict()
    model = build('retinanet')
    fitted, report = fit_checkpoint(model, theirs)
    assert report.reinitialised == list(SPACE.classes) and not report.copied
    key = CLASS_KEYS['retinanet']
    assert torch.equal(fitted[key], model.state_dict()[key])


def test_class_rows_inside_experts_are_fitted_too():
    theirs = build('retinanet', seed=1, label_space=OTHER).state_dict()
    spec = dict(moe_specs('retinanet')[0], targets=r'bbox_head\.retina_cls')
    model = build('retinanet', moe=[spec])
    fitted, report = fit_checkpoint(model, theirs, OTHER.classes)
    assert report.copied == ['dog', 'crack']
    model.load_state_dict(fitted, strict=True)
    old = theirs['bbox_head.retina_cls.bias'].unflatten(0, (-1, 3))
    for expert in model.bbox_head.retina_cls.experts:
        assert torch.equal(expert.bias.unflatten(0, (-1, 5))[:, 1], old[:, 2])


def test_aliases_and_concatenated_heads_find_their_classes():
    space = LabelSpace(dict(voc=['aeroplane']), synonyms={'aeroplane': 'airplane'})
    model = build('dino', label_space=space)
    theirs = build(
        'dino', seed=1, label_space=LabelSpace(dict(x=['aeroplane', 'cat']))
    ).state_dict()
    assert fit_checkpoint(model, theirs, ['aeroplane', 'cat'])[1].copied == ['airplane']
    concatenated = LabelSpace(dict(wall=['crack', 'brick', 'dog']), merge=False)
    model = build('dino', label_space=concatenated)
    theirs = build('dino', seed=1, label_space=OTHER).state_dict()
    report = fit_checkpoint(model, theirs, OTHER.classes)[1]
    assert report.copied == ['wall/crack', 'wall/brick', 'wall/dog']


def test_other_shape_mismatches_are_errors_that_name_the_keys():
    theirs = build('retinanet', head=dict(feat_channels=8)).state_dict()
    with pytest.raises(CheckpointError, match=r'cls_convs\.0\.conv\.weight: \(8, 16, 3, 3\)'):
        fit_checkpoint(build('retinanet', moe=moe_specs('retinanet')), theirs, SPACE.classes)


def test_class_names_that_do_not_fit_the_rows_are_an_error():
    theirs = build('retinanet', label_space=OTHER).state_dict()
    with pytest.raises(CheckpointError, match='not 4 anchors x 2 channels'):
        fit_checkpoint(build('retinanet'), theirs, ['crack', 'dog'])


def test_rows_of_one_dataset_are_copied_into_every_expert():
    theirs = build('retinanet', seed=1, label_space=OTHER).state_dict()
    spec = dict(moe_specs('retinanet')[0], targets=r'bbox_head\.retina_cls')
    model = build('retinanet', moe=[spec])
    before = model.bbox_head.retina_cls.experts[1].bias.detach().clone().unflatten(0, (-1, 5))
    copy_class_rows(model, theirs, OTHER.classes, ['crack'])
    after = model.bbox_head.retina_cls.experts[1].bias.detach().unflatten(0, (-1, 5))
    old = theirs['bbox_head.retina_cls.bias'].unflatten(0, (-1, 3))
    assert torch.equal(after[:, 4], old[:, 0])
    assert torch.equal(after[:, :4], before[:, :4])


def test_class_names_are_found_in_checkpoints_of_any_mmdet():
    assert checkpoint_classes(dict(meta=dict(dataset_meta=dict(classes=('a', 'b'))))) == ['a', 'b']
    assert checkpoint_classes(dict(meta=dict(dataset_meta=dict(CLASSES=('a',))))) == ['a']
    assert checkpoint_classes(dict(meta=dict(CLASSES='ship'))) == ['ship']
    assert checkpoint_classes(dict(state_dict={})) is None
