"""An image's domain, told or guessed by the detector's own features, and the two readings of it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from tiny_models import (
    CONFIGS,
    SPACE,
    blood_sample,
    build,
    colour_plan,
    images,
    mixed_batch,
    moe_specs,
    sample,
    street_sample,
    yard_sample,
)

from mmdet_moe.models.checkpoint import checkpoint_domains, fit_checkpoint
from mmdet_moe.models.domain_features import DomainFeatures, last_unrouted_layer, pool_features
from mmdet_moe.moe import RoutingState
from mmdet_moe.moe.routers.plan import PlanRouter
from mmdet_moe.moe.routing import RoutingContext

KINDS = list(CONFIGS)
HEAD = [r'bbox_head\.cls_convs\.\d']


def measured(kind='retinanet', **model):
    """A model whose prototypes are the features of one image of each domain, and these images."""
    specs = moe_specs(kind, plan=colour_plan())
    built = build(kind, moe=specs, domain_features={}, **model).eval()
    inputs = images(3)
    features = built.pooled_features(inputs)
    names = list(SPACE.domains)
    mean = dict(zip(names, features.tolist(), strict=True))
    prototypes = dict(mean=mean, dimension=features.shape[1], concentration=20.0)
    built.domain_features.set_prototypes(prototypes)
    return built, inputs


def test_features_are_means_over_the_images_own_places():
    maps = torch.zeros(2, 2, 2, 2)
    maps[0, 0] = 3.0
    maps[0, 1] = 4.0
    # The second image has the upper row only; the lower one is padding.
    maps[1, 0] = torch.tensor([[5.0, 7.0], [100.0, 100.0]])
    maps[1, 1] = torch.tensor([[8.0, 8.0], [100.0, 100.0]])
    pooled = pool_features(('an earlier level', maps), [(1.0, 1.0), (0.5, 1.0)])
    # (3, 4) / 5, and the mean (6, 8) / 10.
    torch.testing.assert_close(pooled, torch.tensor([[0.6, 0.8], [0.6, 0.8]]))
    tokens = torch.tensor([[[0.0, 2.0], [0.0, 4.0]]])
    assert pool_features(tokens).tolist() == [[0.0, 1.0]]
    with pytest.raises(ValueError, match=r'must give \(B, C, H, W\) or \(B, T, C\), got \(2, 3\)'):
        pool_features(torch.zeros(2, 3))


def test_the_layer_is_the_last_before_the_first_with_experts():
    model = build('retinanet', init=False)
    assert last_unrouted_layer(model, ['bbox_head.cls_convs.0']) == 'backbone'
    assert last_unrouted_layer(model, ['neck.fpn_convs.0', 'backbone.layer4']) == 'backbone.layer3'
    assert last_unrouted_layer(model, ['backbone.layer1.0.conv1']) == 'backbone.bn1'
    with pytest.raises(ValueError, match="no layer before 'backbone.conv1'"):
        last_unrouted_layer(model, ['backbone.conv1'])


@pytest.mark.parametrize('kind', KINDS)
def test_domains_are_told_by_features_and_route(kind):
    model, inputs = measured(kind)
    # DINO's backbone has no experts and so gives its last level, RetinaNet's fourth stage does.
    layer = {'retinanet': 'backbone.layer3', 'dino': 'backbone'}[kind]
    assert (model.domain_features.layer, model.guess_by) == (layer, 'features')
    samples = [sample(None, [], []) for _ in range(3)]
    found = model.predict(inputs, samples)
    assert [item.nearest_domain for item in found] == list(SPACE.domains)
    for item, domain in zip(found, SPACE.domains, strict=True):
        assert set(item.pred_instances.labels.tolist()) <= set(SPACE.unified_ids(domain))
    assert model._embedder._module is None, 'no second network'
    # As if the domains had been told, to the bit.
    told = model.predict(inputs, [sample(name, [], []) for name in SPACE.domains])
    for one, other in zip(found, told, strict=True):
        assert torch.equal(one.pred_instances.scores, other.pred_instances.scores)
        assert torch.equal(one.pred_instances.bboxes, other.pred_instances.bboxes)


def test_a_told_domain_can_be_hidden_for_a_test_and_comes_back():
    model, inputs = measured()
    order = [1, 2, 0]
    samples = [street_sample(), blood_sample(), yard_sample()]
    model.set_domain_mode('nearest')
    found = model.predict(inputs[order], samples)
    names = list(SPACE.domains)
    assert [item.domain for item in found] == names
    assert [item.nearest_domain for item in found] == [names[i] for i in order]
    for item in found:
        assert set(item.pred_instances.labels.tolist()) <= set(
            SPACE.unified_ids(item.nearest_domain)
        )
    model.set_domain_mode('given')
    again = model.predict(inputs[order], [street_sample(), blood_sample(), yard_sample()])
    assert all('nearest_domain' not in item for item in again)
    assert model.routing_state.domains == tuple(names)
    # Training never guesses.
    model.set_domain_mode('nearest')
    model.train()
    model.loss(inputs, [street_sample(), blood_sample(), yard_sample()])
    assert model.routing_state.domains == tuple(names)


def test_both_guesses_stand_side_by_side():
    model, inputs = measured()
    model.set_domain_mode('nearest', 'embedder')
    model.predict(inputs, [street_sample(), blood_sample(), yard_sample()])
    assert model._embedder._module is not None
    assert model.routing_state.prototypes is None
    model.set_domain_mode('mixture', 'features')
    assert all(router.unknown == 'mixture' for router in model.plan_routers())
    model.predict(inputs, [street_sample(), blood_sample(), yard_sample()])
    assert model.routing_state.prototypes[1] == 20.0
    model.set_domain_mode('given')
    assert all(router.unknown == 'nearest' for router in model.plan_routers())
    for arguments, message in [
        (('guess',), r"domain mode must be one of .*, got 'guess'"),
        (('nearest', 'magic'), r"guessed by one of .*, got 'magic'"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.set_domain_mode(*arguments)
    bare = build('retinanet', init=False)
    with pytest.raises(ValueError, match='give the model domain_features'):
        bare.set_domain_mode('nearest', 'features')
    with pytest.raises(ValueError, match='needs a plan that has prototypes'):
        bare.set_domain_mode('nearest')


def test_the_mixture_is_the_posterior_of_the_states_prototypes():
    router = PlanRouter({'a': 'e0', 'b': 'e1'}, unknown='mixture')
    state = RoutingState()
    prototypes = dict(a=torch.tensor([1.0, 0.0]), b=torch.tensor([0.0, 1.0]), c=torch.zeros(2))
    state.begin([None], 1, lambda: torch.tensor([[0.8, 0.6]]), prototypes=(prototypes, 5.0))
    context = RoutingContext(state=state, num_items=1, training=False)
    # exp(5 x 0.8) : exp(5 x 0.6), so 1 / (1 + exp(-1)) for a.
    expected = 1 / (1 + math.exp(-1.0))
    torch.testing.assert_close(
        router.image_weights(context).double(),
        torch.tensor([[expected, 1 - expected]], dtype=torch.float64),
        rtol=0,
        atol=1e-6,
    )
    state.begin([None], 1, lambda: torch.ones(1, 2), prototypes=({'a': torch.ones(2)}, 5.0))
    with pytest.raises(ValueError, match=r"no prototype was measured for \['b'\]"):
        router.image_weights(context)


def test_prototypes_are_in_checkpoints_and_copies():
    model, inputs = measured()
    state = model.state_dict()
    assert {k for k in state if k.startswith('domain_features.')} == {
        'domain_features.mean',
        'domain_features.concentration',
    }
    fresh = build('retinanet', seed=1, moe=moe_specs('retinanet', plan=colour_plan()),
                  domain_features={}).eval()  # fmt: skip
    with pytest.raises(ValueError, match="no prototypes among the features of 'backbone.layer3'"):
        fresh.predict(inputs, [sample(None, [], []) for _ in range(3)])
    fresh.load_state_dict(state)
    for other in (fresh, copy.deepcopy(model), ExponentialMovingAverage(model).module.eval()):
        found = other.predict(inputs, [sample(None, [], []) for _ in range(3)])
        assert [item.nearest_domain for item in found] == list(SPACE.domains)
        # A copy has a hook and features of its own.
        assert other._features is not model._features
    # Without the option nothing is added to a model.
    plain = build('retinanet', moe=moe_specs('retinanet'), init=False)
    assert not any('domain_features' in key for key in plain.state_dict())


def test_a_layer_with_experts_before_the_features_is_refused_when_the_model_is_built():
    with pytest.raises(ValueError, match="before 'neck' has run.*choose an earlier"):
        build('retinanet', moe=moe_specs('retinanet'), domain_features=dict(layer='neck'))
    with pytest.raises(ValueError, match=r"no layer 'backbone.layr2'; near: \['backbone.layer2'"):
        build('retinanet', domain_features=dict(layer='backbone.layr2'))
    with pytest.raises(ValueError, match="'bbox_head.cls_convs.0' does not run when features"):
        build('retinanet', domain_features=dict(layer='bbox_head.cls_convs.0'))


def test_prototypes_that_do_not_fit_are_refused():
    features = DomainFeatures(['a', 'b'], 'backbone', 2)
    with pytest.raises(ValueError, match="no domain 'c'"):
        features.set_prototypes(dict(mean=dict(c=[1.0, 0.0]), dimension=2, concentration=1.0))
    with pytest.raises(ValueError, match='prototypes of 3 numbers.* have 2'):
        features.set_prototypes(dict(mean=dict(a=[1.0, 0, 0]), dimension=3, concentration=1.0))
    features.set_prototypes(dict(mean=dict(b=[0.0, 1.0]), dimension=2, concentration=4.0))
    rows, concentration = features.prototypes()
    assert list(rows) == ['b'] and concentration == 4.0, 'a was not measured and is nobody nearest'


def test_prototypes_of_others_stay_when_a_newcomers_are_measured():
    features = DomainFeatures(['a', 'b', 'c'], 'backbone', 2)
    features.set_prototypes(dict(mean=dict(a=[1.0, 0], b=[0, 1.0]), dimension=2, concentration=4.0))
    features.set_prototypes(dict(mean=dict(c=[0.6, 0.8]), dimension=2, concentration=1.0))
    rows, concentration = features.prototypes()
    assert {name: row.tolist() for name, row in rows.items()} == dict(
        a=[1.0, 0.0], b=[0.0, 1.0], c=pytest.approx([0.6, 0.8])
    )
    assert concentration == 4.0, 'of one domain it cannot be told'


def test_prototypes_are_loaded_by_the_domains_names():
    """A checkpoint of yard and street, in that order, fits a model that blood has joined."""
    model = build('retinanet', domain_features=dict(layer='backbone'), init=False)
    assert SPACE.domains == ('street', 'blood', 'yard')
    width = model.domain_features.mean.shape[1]
    yard, street = torch.eye(2, width)
    saved = {
        'domain_features.mean': torch.stack([yard, street]),
        'domain_features.concentration': torch.tensor(9.0),
    }
    space = {'domains': dict(yard=['dog'], street=['car'])}
    domains = checkpoint_domains({'meta': {'dataset_meta': {'label_space': space}}})
    fitted, _ = fit_checkpoint(model, {**model.state_dict(), **saved}, domains=domains)
    model.load_state_dict(fitted)
    rows, concentration = model.domain_features.prototypes()
    assert list(rows) == ['street', 'yard'] and concentration == 9.0
    assert torch.equal(rows['yard'], yard) and torch.equal(rows['street'], street)
    # Of another layer, or of nobody knows whom: they are to be measured anew.
    other = {**saved, 'domain_features.mean': torch.ones(2, width + 1)}
    for given, whose in ((other, domains), (saved, None)):
        fitted, _ = fit_checkpoint(model, {**model.state_dict(), **given}, domains=whose)
        assert not any(key.startswith('domain_features') for key in fitted)


@pytest.mark.parametrize('kind', KINDS)
def test_both_readings_are_those_of_two_tests(kind):
    """RetinaNet's in one forward; DINO chooses other queries, and so runs twice."""
    specs = moe_specs(kind, plan=colour_plan())
    model = build(kind, moe=specs, both_readings=True).eval()
    inputs, samples = mixed_batch()
    calls = []
    model.bbox_head.register_forward_pre_hook(lambda *args: calls.append(1))
    found = model.predict(inputs, copy.deepcopy(samples))
    assert len(calls) == {'retinanet': 1, 'dino': 2}[kind]
    for restrict, key in ((True, 'pred_instances'), (False, 'pred_instances_unrestricted')):
        alone = build(kind, moe=specs, restrict_classes=restrict).eval()
        assert alone.both_readings is False
        expected = alone.predict(inputs, copy.deepcopy(samples))
        for one, other in zip(found, expected, strict=True):
            assert 'pred_instances_unrestricted' not in other
            for field in ('bboxes', 'scores', 'labels'):
                assert torch.equal(one.get(key)[field], other.pred_instances[field]), (key, field)
    labels = [item.pred_instances_unrestricted.labels for item in found]
    assert len(torch.cat(labels).unique()) > 2, 'all classes compete'
