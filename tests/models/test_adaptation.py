"""A domain joins a trained model: what it brings is trained, what was there stays to the bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.optim import build_optim_wrapper
from tiny_models import DOMAINS, build, images, moe_specs, raw_batch, retinanet_cfg, sample

from mmdet_moe.models.adaptation import Adaptation
from mmdet_moe.models.checkpoint import CheckpointError, fit_checkpoint
from mmdet_moe.models.domain_classes import newcomer_classes
from mmdet_moe.models.layers import RowLayout, with_blocks
from mmdet_moe.moe import PlanRouter
from mmdet_moe.planning import ExpertPlan
from mmdet_moe.structures import LabelSpace

KINDS = ['retinanet', 'dino']
#: Before: street and yard. blood joins; its 'crack' is yard's, 'cell' and 'dot' are new. It stands
#: between the others, so that its rows come between theirs.
BEFORE = LabelSpace({name: DOMAINS[name] for name in ('street', 'yard')})
AFTER = LabelSpace({name: DOMAINS[name] for name in ('street', 'blood', 'yard')})
OLD_PLAN = ExpertPlan.from_assignment({'street': 'e0', 'yard': 'e1'}, experts=2)
PLAN = ExpertPlan.from_assignment({'street': 'e0', 'yard': 'e1', 'blood': 'e2'}, experts=3)


def adapted(kind, **options):
    """The model before, and the one that blood has joined, with the weights of the first."""
    old = build(kind, label_space=BEFORE, moe=moe_specs(kind, OLD_PLAN))
    options = {'adapt': dict(domain='blood', previous=OLD_PLAN, start='e1'), **options}
    new = build(
        kind, seed=1, label_space=AFTER, moe=moe_specs(kind, PLAN), newcomers=['blood'], **options
    )
    spread(old)
    fitted, report = fit_checkpoint(new, old.state_dict(), BEFORE.classes)
    missing = new.load_state_dict(fitted, strict=False)
    assert not missing.unexpected_keys
    return old, new, report, missing.missing_keys


def spread(model):
    """Weights at which classes, boxes and experts differ."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if any(part in key for part in ('cls', 'reg', 'label_embedding', 'experts')):
                value.add_(torch.randn(value.shape, generator=generator) * 0.05)


def detections(model, *domains):
    """Boxes, scores and class names of a batch."""
    samples = [sample(domain, [], []) for domain in domains]
    with torch.no_grad():
        found = model.eval().predict(images(len(domains)), samples)
    model.train()
    names = model.label_space.classes
    return [
        (p.bboxes, p.scores, [names[i] for i in p.labels])
        for p in (s.pred_instances for s in found)
    ]


def assert_identical(before, after):
    for (boxes, scores, names), (boxes2, scores2, names2) in zip(before, after, strict=True):
        assert torch.equal(boxes, boxes2) and torch.equal(scores, scores2) and names == names2


def train(model, steps=2, lr=0.1, batch=None):
    wrapper = build_optim_wrapper(
        model,
        ConfigDict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=lr, weight_decay=0.5)),
    )
    for _ in range(steps):
        model.train_step(batch or raw_batch_of(model, 'blood', ['cell', 'crack']), wrapper)


def raw_batch_of(model, domain, names):
    """Two images of a domain, labelled in the model's label space."""
    batch = raw_batch('retinanet', ['blood', 'blood'])
    for data_sample in batch['data_samples']:
        ids = [model.label_space.unified_id(name) for name in names]
        data_sample.gt_instances.labels = torch.tensor(ids)
        data_sample.set_metainfo(dict(domain=domain))
    return batch


@pytest.mark.parametrize('kind', KINDS)
def test_old_domains_are_detected_bit_identically_before_and_after_adapting(kind):
    old, new, _, missing = adapted(kind)
    # Of the rows, those of cell and dot alone are new.
    assert missing and all('newcomers.blood' in key for key in missing)
    batches = [('street', 'yard', 'yard'), ('yard',), ('street', 'street')]
    before = [detections(old, *batch) for batch in batches]
    assert any(len(scores) for batch in before for _, scores, _ in batch)
    frozen = {k: v.clone() for k, v in new.state_dict().items()}
    first = detections(new, 'blood')
    train(new)
    moved = {k for k, v in new.state_dict().items() if not torch.equal(v, frozen[k])}
    assert moved == {k for k, p in new.named_parameters() if p.requires_grad}
    assert all('.experts.2.' in key or '.newcomers.blood.' in key for key in moved)
    assert any('.experts.2.' in key for key in moved)
    for batch, expected in zip(batches, before, strict=True):
        assert_identical(expected, detections(new, *batch))
    # blood itself is detected otherwise than before, in its own three classes.
    (_, scores, names), (_, scores2, _) = first[0], detections(new, 'blood')[0]
    assert set(names) <= set(DOMAINS['blood']) and not torch.equal(scores, scores2)


@pytest.mark.parametrize('channels', [5, 6], ids=['sigmoid', 'softmax'])
def test_old_rows_keep_their_order_wherever_the_newcomer_stands(channels):
    """Before: car, dog, crack. blood comes first and makes it cell, dot, crack, car, dog."""
    space = LabelSpace({name: DOMAINS[name] for name in ('blood', 'street', 'yard')})
    assert space.classes == ('cell', 'dot', 'crack', 'car', 'dog')
    before, blocks = newcomer_classes(space, ['blood'])
    assert [space.classes[i] for i in before] == list(BEFORE.classes)
    layout = RowLayout(channels, blocks, before)
    background = tuple(range(5, channels))
    assert layout.own == (3, 4, 2, *background) and layout.blocks == {'blood': (0, 1)}
    # What the blocks give comes out in the order of the label space.
    dense = torch.nn.Linear(3, channels)
    x = torch.randn(2, 3)
    torch.testing.assert_close(with_blocks(dense, layout)(x), dense(x))
    # A second newcomer, listed before the first one, changes neither the old rows nor the first's.
    late = {'late': ['dot', 'tree', 'dog']}
    both = LabelSpace({**late, **{name: space.local_classes(name) for name in space.domains}})
    before, blocks = newcomer_classes(both, ['blood', 'late'])
    assert [both.classes[i] for i in before] == list(BEFORE.classes)
    names = {name: [both.classes[i] for i in ids] for name, ids in blocks.items()}
    assert names == {'blood': ['cell', 'dot'], 'late': ['tree']}


def test_a_newcomer_without_classes_of_its_own_trains_its_expert_alone():
    """As UODB's Comic after COCO: all its classes are known, and their rows stay as they are."""
    domains = {**DOMAINS, 'comic': ['dog', 'cell']}
    plan = ExpertPlan.from_assignment(
        {'street': 'e0', 'yard': 'e1', 'blood': 'e1', 'comic': 'e2'}, experts=3
    )
    model = build(
        'retinanet', label_space=LabelSpace(domains), moe=moe_specs('retinanet', plan),
        newcomers=['comic'], adapt=dict(domain='comic'),
    )  # fmt: skip
    assert not any('newcomers' in key for key in model.state_dict())
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained and all('.experts.2.' in key for key in trained)


@pytest.mark.parametrize('kind', KINDS)
def test_an_adapted_checkpoint_loads_again_and_another_newcomer_leaves_it_alone(kind):
    _, new, _, _ = adapted(kind)
    train(new, steps=1)
    fitted, report = fit_checkpoint(new, new.state_dict(), AFTER.classes)
    assert not report.rows and not report.grown and not report.reinitialised
    assert all(torch.equal(value, fitted[key]) for key, value in new.state_dict().items())
    # late shares a class with blood alone, and stands before all others.
    space = LabelSpace({'late': ['dot', 'tree'], **{d: DOMAINS[d] for d in AFTER.domains}})
    plan = ExpertPlan.from_assignment({**PLAN.assignment, 'late': 'e3'}, experts=4)
    later = build(
        kind, seed=2, label_space=space, moe=moe_specs(kind, plan), newcomers=['blood', 'late'],
        adapt=dict(domain='late', previous=PLAN),
    )  # fmt: skip
    fitted, report = fit_checkpoint(later, new.state_dict(), AFTER.classes)
    assert report.reinitialised == ['tree'] and list(report.grown) == ['e3']
    later.load_state_dict(fitted, strict=False)
    train(later, 1, batch=raw_batch_of(later, 'late', ['dot', 'tree']))
    trained = {key for key, p in later.named_parameters() if p.requires_grad}
    assert all('.experts.3.' in key or '.newcomers.late.' in key for key in trained)
    for batch in (('blood', 'street'), ('yard',)):
        assert_identical(detections(new, *batch), detections(later, *batch))
    joint = build(kind, label_space=AFTER, moe=moe_specs(kind, PLAN), init=False)
    with pytest.raises(CheckpointError, match='newcomers have rows of their own there'):
        fit_checkpoint(joint, new.state_dict(), AFTER.classes)


def test_new_expert_starts_as_it_is_told():
    old, new, report, _ = adapted('retinanet')
    assert report.grown == {'e2': ['e1']}
    assert report.reinitialised == ['cell', 'dot'] and report.copied == ['car', 'dog', 'crack']
    for name, layer in new.moe_layers().items():
        theirs = old.get_submodule(name).experts
        for key, value in layer.experts[2].state_dict().items():
            assert torch.equal(value, theirs[1].state_dict()[key])
            assert torch.equal(layer.experts[0].state_dict()[key], theirs[0].state_dict()[key])
    old, new, report, _ = adapted(
        'retinanet', adapt=dict(domain='blood', previous=OLD_PLAN, start='mean')
    )
    assert report.grown == {'e2': ['e0', 'e1']}
    name, layer = next(iter(new.moe_layers().items()))
    key, value = next(iter(layer.experts[2].named_parameters()))
    two = [dict(e.named_parameters())[key] for e in old.get_submodule(name).experts]
    assert torch.allclose(value, (two[0] + two[1]) / 2, atol=1e-7)


def test_nearest_is_the_largest_affinity_and_without_affinities_the_mean():
    adaptation = Adaptation(domain='blood', previous=OLD_PLAN)
    assert adaptation.expert_start(PLAN).new == {'e2': [0, 1]}, 'made by hand'
    measured = copy.copy(PLAN)
    measured.affinity = np.zeros((3, 3))
    measured.affinity[PLAN.datasets.index('blood')] = [-0.9, -0.1, 1.0]
    assert adaptation.expert_start(measured).new == {'e2': [1]}


def test_newcomer_on_an_existing_expert_trains_that_one():
    shared = ExpertPlan.from_assignment({'street': 'e0', 'yard': 'e1', 'blood': 'e1'}, experts=2)
    model = build(
        'retinanet', label_space=AFTER, moe=moe_specs('retinanet', shared), newcomers=['blood'],
        adapt=dict(domain='blood'),
    )  # fmt: skip
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained and all('.experts.1.' in k or '.newcomers.' in k for k in trained)


def test_what_the_config_frees_is_trained_too_and_frozen_norms_rest():
    free = dict(domain='blood', previous=OLD_PLAN, train=[r'neck\..*', r'backbone\.layer3\..*'])
    options = dict(backbone={**retinanet_cfg()['backbone'], 'norm_eval': False})
    model = build(
        'retinanet', label_space=AFTER, moe=moe_specs('retinanet', PLAN), plan=PLAN,
        newcomers=['blood'], adapt=free, **options,
    )  # fmt: skip
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    named = {key for key, _ in model.named_parameters() if key.startswith('neck.')}
    assert named <= trained and 'bbox_head.retina_cls.weight' not in trained
    norms = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    rest = {n for n, m in norms.items() if not m.training}
    assert rest == {n for n in norms if '.experts.2.' not in n and 'layer3' not in n}
    with pytest.raises(ValueError, match="no parameter is called 'nothing'"):
        adapted('retinanet', adapt={**free, 'train': 'nothing'})


def test_wrong_adaptations_are_refused():
    with pytest.raises(ValueError, match="no experts for dataset 'blood' is unknown"):
        build(
            'retinanet', label_space=AFTER, moe=moe_specs('retinanet', OLD_PLAN),
            newcomers=['blood'], adapt=dict(domain='blood'),
        )  # fmt: skip
    moved = ExpertPlan.from_assignment({'street': 'x', 'yard': 'e0', 'blood': 'e2'})
    with pytest.raises(ValueError, match='not the first of the plan'):
        build(
            'retinanet', label_space=AFTER, moe=moe_specs('retinanet', moved), plan=moved,
            newcomers=['blood'], adapt=dict(domain='blood', previous=OLD_PLAN),
        )  # fmt: skip
    with pytest.raises(ValueError, match="'e9'"):
        adapted('retinanet', adapt=dict(domain='blood', previous=OLD_PLAN, start='e9'))
    with pytest.raises(ValueError, match='to whom do they come'):
        build('retinanet', newcomers=list(DOMAINS))
    with pytest.raises(ValueError, match="unknown domain 'moon'"):
        build('retinanet', newcomers=['moon'])


def test_damex_router_keeps_its_old_rows():
    def specs(plan):
        router = dict(type='DAMEXRouter', plan=plan, router=dict(type='TopKRouter', kind='cosine'))
        return [dict(moe_specs('retinanet')[0], router=router)]

    old = build('retinanet', label_space=BEFORE, moe=specs(OLD_PLAN))
    new = build(
        'retinanet', seed=1, label_space=AFTER, moe=specs(PLAN), plan=PLAN, newcomers=['blood'],
        adapt=dict(domain='blood', previous=OLD_PLAN),
    )  # fmt: skip
    fitted, _ = fit_checkpoint(new, old.state_dict(), BEFORE.classes)
    own = copy.deepcopy(new.state_dict())
    new.load_state_dict(fitted, strict=False)
    name = new.moe_names[0]
    key = f'{name}.router.inner.expert_embeddings'
    assert torch.equal(new.state_dict()[key][:2], old.state_dict()[key])
    assert torch.equal(new.state_dict()[key][2], own[key][2])
    assert isinstance(new.moe_layers()[name].router.plan, PlanRouter)
