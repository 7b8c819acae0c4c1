"""RetinaNet's subnets as experts: exact at step 0, mixed as the paper does, at home in mmdet."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict
from test_multi_domain_heads import losses_of, predictions_of, spread
from tiny_models import (
    SPACE,
    blood_sample,
    build,
    images,
    mixed_batch,
    retinanet_cfg,
    sample,
    street_sample,
    total_loss,
)

from mmdet_moe.models.checkpoint import fit_checkpoint
from mmdet_moe.moe import MoELayer, ProbabilityMoELayer, TargetError, kl_loss
from mmdet_moe.structures import LabelSpace

BOTH = r'bbox_head\.(cls|reg)_subnet'
#: Where experts may stand, and the layers that makes.
VARIANTS = {
    BOTH: ['bbox_head.cls_subnet', 'bbox_head.reg_subnet'],
    r'bbox_head\.cls_subnet': ['bbox_head.cls_subnet'],
    r'bbox_head\.reg_subnet': ['bbox_head.reg_subnet'],
    BOTH + r'\.output': ['bbox_head.cls_subnet.output', 'bbox_head.reg_subnet.output'],
    BOTH + r'\.convs\.1': ['bbox_head.cls_subnet.convs.1', 'bbox_head.reg_subnet.convs.1'],
    r'backbone\.layer4': ['backbone.layer4'],
}
MIXES = ('probability', 'logit')


def dense_model(**kwargs):
    """The RetinaNet to start from: MultiDomainRetinaHead with two stacked convolutions."""
    head = dict(stacked_convs=2, **kwargs.pop('head', {}))
    return build('retinanet', head=head, **kwargs)


def moe_model(targets=BOTH, *, mix='probability', k=2, balance=(), noise=0.0, **kwargs):
    """The same with MoERetinaHead, and four experts at ``targets`` where given."""
    spec = dict(
        targets=targets,
        num_experts=4,
        router=dict(type='TopKRouter', k=k),
        balance=list(balance),
        noise=noise,
    )
    head = dict(type='MoERetinaHead', mix=mix, **kwargs.pop('head', {}))
    return dense_model(head=head, moe=[spec] if targets else None, **kwargs)


def scatter(model, seed=0):
    """Give every expert weights of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.moe_layers().values():
            for value in layer.experts.parameters():
                value.add_(torch.randn(value.shape, generator=generator) * 0.05)
    return model


def features(images_=2, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images_, 16, s, s, generator=generator) for s in (8, 4, 2)]


def weights_of(layer, x):
    """(T, E) the combine weights that the layer's router gives items x."""
    seen = []
    handle = layer.router.register_forward_hook(lambda *call: seen.append(call[-1]))
    layer.state.begin(num_images=len(x))
    layer(x)
    handle.remove()
    weights = torch.zeros(len(x), layer.num_experts)
    experts = torch.arange(layer.num_experts).repeat_interleave(torch.tensor(seen[0].counts))
    weights[seen[0].items, experts] = seen[0].weights.detach()
    return weights


# -- without experts -----------------------------------------------------------------------------


@pytest.mark.parametrize('mix', MIXES)
def test_dense_twin_is_the_plain_head(mix):
    # From one seed: construction and initialisation draw the same numbers.
    for init in (False, True):
        plain = dense_model(init=init)
        twin = moe_model(None, mix=mix, init=init)
        theirs = {
            'cls_subnet.convs': plain.bbox_head.cls_convs,
            'reg_subnet.convs': plain.bbox_head.reg_convs,
            'cls_subnet.output': plain.bbox_head.retina_cls,
            'reg_subnet.output': plain.bbox_head.retina_reg,
        }
        for place, module in theirs.items():
            ours = twin.bbox_head.get_submodule(place).state_dict()
            assert list(ours) == list(module.state_dict())
            for key, value in module.state_dict().items():
                assert torch.equal(ours[key], value), f'{place}.{key}'
        assert len(twin.state_dict()) == len(plain.state_dict())
    # bias_prob: sigmoid(bias) = 0.01 before training.
    torch.testing.assert_close(
        twin.bbox_head.cls_subnet.output.bias.sigmoid(), torch.full((20,), 0.01)
    )
    inputs, samples = mixed_batch()
    expected, got = losses_of(plain, inputs, samples), losses_of(twin, inputs, samples)
    for key, value in expected.items():
        assert torch.equal(got[key], value), key
    for one, other in zip(
        predictions_of(twin.eval(), inputs, samples),
        predictions_of(plain.eval(), inputs, samples),
        strict=True,
    ):
        assert torch.equal(one.scores, other.scores) and torch.equal(one.bboxes, other.bboxes)


def test_head_works_without_a_label_space():
    model = moe_model(label_space=None, head=dict(num_classes=3))
    losses = losses_of(model, images(1), [sample(None, [[4, 4, 30, 28]], ['car'])])
    assert sum(losses.values()) > 0


# -- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize('targets', [None, *VARIANTS])
def test_checkpoint_of_a_retinanet_fills_twin_and_every_expert(targets):
    dense = spread(dense_model(seed=1))
    ours = {
        'cls_convs.': 'cls_subnet.convs.',
        'reg_convs.': 'reg_subnet.convs.',
        'retina_cls.': 'cls_subnet.output.',
        'retina_reg.': 'reg_subnet.output.',
    }
    expected = {}
    for key, value in dense.state_dict().items():
        for old, new in ours.items():
            key = key.replace(f'bbox_head.{old}', f'bbox_head.{new}')
        expected[key] = value
    for load in (
        lambda model, state: model.load_state_dict(state, strict=True),
        lambda model, state: load_state_dict(model, state, strict=True),  # mmengine's
        lambda model, state: model.load_state_dict(fit_checkpoint(model, state, SPACE.classes)[0]),
    ):
        model = moe_model(targets)
        before = copy.deepcopy(dense.state_dict())
        load(model, before)
        assert list(before) == list(dense.state_dict())  # the caller's own is left alone
        names = model.moe_names
        assert names == ([] if targets is None else VARIANTS[targets])
        for key, value in model.state_dict().items():
            if '.router.' in key:
                continue
            head, found, tail = key.partition('.experts.')
            key = f'{head}.{tail[2:]}' if found else key
            assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize('targets', [None, BOTH, BOTH + r'\.output'])
def test_class_rows_go_by_name_into_every_expert(targets):
    # Has crack and dog of ours, in another order, and a class of its own.
    other = LabelSpace(dict(wall=['crack', 'brick', 'dog']))
    theirs = dense_model(seed=1, label_space=other).state_dict()
    model = moe_model(targets)
    fitted, report = fit_checkpoint(model, theirs, other.classes)
    assert report.copied == ['dog', 'crack'] and report.reinitialised == ['car', 'cell', 'dot']
    assert report.upcycled == model.moe_names
    model.load_state_dict(fitted, strict=True)
    old = theirs['bbox_head.retina_cls.weight'].unflatten(0, (-1, 3))  # crack, brick, dog
    # Four anchors of five classes, in each of four experts.
    outputs = [p for key, p in model.named_parameters() if p.ndim == 4 and len(p) == 20]
    assert len(outputs) == (1 if targets is None else 4)
    for value in outputs:
        rows = value.unflatten(0, (-1, 5))  # car, dog, cell, dot, crack
        assert torch.equal(rows[:, 1], old[:, 2]) and torch.equal(rows[:, 4], old[:, 0])


# -- experts -------------------------------------------------------------------------------------


@pytest.mark.parametrize('mix', MIXES)
@pytest.mark.parametrize('targets', VARIANTS)
def test_experts_compute_what_the_dense_head_did_at_step_0(targets, mix):
    dense = spread(dense_model())
    model = moe_model(targets, mix=mix)
    model.load_state_dict(dense.state_dict(), strict=True)
    inputs, samples = mixed_batch()
    expected, got = losses_of(dense, inputs, samples), losses_of(model, inputs, samples)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5, msg=key)
    dense.eval(), model.eval()
    with torch.no_grad():
        x = dense.extract_feat(inputs)
        model.routing_state.begin(num_images=len(inputs))
        for one, other in zip(model.bbox_head(x), dense.bbox_head(x), strict=True):
            torch.testing.assert_close(list(one), list(other), rtol=1e-5, atol=1e-5)
    for one, other in zip(
        predictions_of(model, inputs, samples), predictions_of(dense, inputs, samples), strict=True
    ):
        assert torch.equal(one.labels, other.labels)
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.bboxes, other.bboxes, rtol=1e-4, atol=1e-4)


def test_one_seed_gives_experts_and_dense_head_the_same_weights():
    dense = dense_model().state_dict()
    # Loading the dense checkpoint changes nothing: the experts have its weights already.
    model = moe_model()
    before = copy.deepcopy(model.state_dict())
    model.load_state_dict(dense, strict=True)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize('mix', MIXES)
@pytest.mark.parametrize('part', ['subnet', 'output'])
def test_class_experts_are_mixed_after_the_sigmoid_or_as_logits(mix, part):
    model = scatter(moe_model(BOTH if part == 'subnet' else BOTH + r'\.output', mix=mix)).eval()
    head = model.bbox_head
    x = features()[0]
    model.routing_state.begin(num_images=2)
    scores, deltas = head.forward_single(x)
    for subnet, got in ((head.cls_subnet, scores), (head.reg_subnet, deltas)):
        inputs, layer = x, subnet
        if part == 'output':
            for conv in subnet.convs:
                inputs = conv(inputs)
            layer = subnet.output
        weights = weights_of(layer, inputs)
        assert ((weights > 0).sum(1) == 2).all()
        torch.testing.assert_close(weights.sum(1), torch.ones(2))
        # Without its hooks an expert is the dense module again.
        plain = [copy.deepcopy(expert) for expert in layer.experts]
        for expert in plain:
            expert._forward_hooks.clear()
        each = [expert(inputs) for expert in plain]
        after_sigmoid = mix == 'probability' and subnet is head.cls_subnet
        assert isinstance(layer, ProbabilityMoELayer) is after_sigmoid
        mixed = sum(
            w[:, None, None, None] * (y.sigmoid() if after_sigmoid else y)
            for w, y in zip(weights.t(), each, strict=True)
        )
        torch.testing.assert_close(got.sigmoid() if after_sigmoid else got, mixed)


def test_each_image_and_level_has_a_decision_of_its_own():
    model = moe_model()
    losses_of(model, *mixed_batch())
    stats = model.routing_state.stats()
    for name in model.moe_names:
        # 3 images on 3 levels, 2 experts each.
        assert stats[f'{name}/count'].sum() == 3 * 3 * 2
        torch.testing.assert_close(stats[f'{name}/weight'].sum(), torch.tensor(9.0))


def test_balance_loss_is_one_over_all_levels():
    model = moe_model(balance=[dict(type='KLLoss', weight=0.25)])
    losses = losses_of(model, *mixed_batch())
    stats = model.routing_state.stats()
    # Of the weights of all three levels together, for each of the two subnets.
    expected = sum(0.25 * kl_loss(stats[f'{name}/weight']) for name in model.moe_names)
    torch.testing.assert_close(losses['loss_moe_kl'], expected)
    # An expert for each level is no imbalance, though each level by itself uses one only.
    model = moe_model(k=1, balance=[dict(type='KLLoss', weight=0.25, of='probabilities')])
    with torch.no_grad():
        layer = model.bbox_head.cls_subnet
        layer.router.gate.zero_()
        layer.router.gate[:, 0] = torch.tensor([1.0, -1.0, 0.0, 0.0]) * 50
    model.routing_state.begin(num_images=2, training=True)
    ones = torch.ones(2, 16, 4, 4)
    layer(ones), layer(-ones)
    got = model.routing_state.collect()['loss_moe_kl']
    # P = (1/2, 1/2, 0, 0): KL = ln 4 - ln 2; each call alone would be ln 4.
    torch.testing.assert_close(got, 0.25 * torch.tensor(2.0).log(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('mix', MIXES)
def test_training_moves_experts_and_gates(mix):
    balance = [dict(type='RelativeImportanceConstraint', threshold=0.3)]
    model = scatter(moe_model(mix=mix, balance=balance))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        total_loss(model.loss(*mixed_batch())).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    moved = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    for name in model.moe_names:
        assert f'{name}.router.gate' in moved and f'{name}.balance.0.relative' in moved
        experts = {key.split('.experts.')[1][0] for key in moved if f'{name}.experts.' in key}
        assert len(experts) >= 2


def test_an_expert_without_an_image_stays_where_it_was():
    model = moe_model(k=1)
    for layer in model.moe_layers().values():
        with torch.no_grad():  # equal logits and no noise: all to one expert
            layer.router.gate.zero_()
            layer.router.noise = None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    before = copy.deepcopy(model.state_dict())
    total_loss(model.loss(*mixed_batch())).backward()
    optimizer.step()
    counts = model.routing_state.stats()
    for name in model.moe_names:
        for e, count in enumerate(counts[f'{name}/count'].tolist()):
            keys = [key for key in before if key.startswith(f'{name}.experts.{e}.')]
            moved = any(not torch.equal(before[k], model.state_dict()[k]) for k in keys)
            assert moved is (count > 0)
        assert (counts[f'{name}/count'] == 0).sum() == 3


def test_noise_parts_the_experts_of_a_trained_retinanet():
    dense = spread(dense_model())
    model = moe_model(noise=0.1)
    model.load_state_dict(dense.state_dict(), strict=True)
    weight = dense.bbox_head.retina_cls.weight
    experts = [expert.output.weight for expert in model.bbox_head.cls_subnet.experts]
    for i, one in enumerate(experts):
        # A tenth of the parameter's own standard deviation, of 2880 numbers: within 5 %.
        share = (one - weight).std() / weight.std()
        assert share.item() == pytest.approx(0.1, rel=0.05)
        for other in experts[:i]:
            assert not torch.equal(one, other)
    again = moe_model(noise=0.1, seed=5)  # the same on every rank, whatever its seed
    again.load_state_dict(dense.state_dict(), strict=True)
    for one, other in zip(experts, again.bbox_head.cls_subnet.experts, strict=True):
        assert torch.equal(one, other.output.weight)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_trains_and_predicts_with_finite_numbers(dtype):
    model = scatter(moe_model(balance=[dict(type='KLLoss', weight=0.25)]))
    inputs, samples = images(2), [street_sample(), blood_sample()]
    with torch.no_grad():  # scores that are sure beyond half precision
        for expert in model.bbox_head.cls_subnet.experts:
            expert.output.bias.copy_(torch.linspace(-40, 40, 20))
    with torch.autocast('cpu', dtype):
        losses = total_loss(model.loss(inputs, samples))
    (1024 * losses).backward()
    assert losses.isfinite()
    for key, value in model.named_parameters():
        assert value.grad is None or value.grad.isfinite().all(), key
    with torch.autocast('cpu', dtype):
        for found in predictions_of(model.eval(), inputs, samples):
            assert len(found) and found.scores.isfinite().all() and found.bboxes.isfinite().all()


def test_copy_of_a_model_mixes_as_the_model():
    # EMA keeps a deep copy.
    model = scatter(moe_model()).eval()
    inputs, samples = mixed_batch()
    copied = predictions_of(copy.deepcopy(model), inputs, samples)
    for one, other in zip(copied, predictions_of(model, inputs, samples), strict=True):
        assert torch.equal(one.scores, other.scores) and torch.equal(one.bboxes, other.bboxes)


def test_only_what_gives_the_class_scores_is_mixed_as_probabilities():
    model = moe_model([BOTH + r'\.convs\.\d', r'bbox_head\.reg_subnet\.output'])
    kinds = {type(layer) for layer in model.moe_layers().values()}
    assert kinds == {MoELayer}
    with pytest.raises(TargetError, match='is a ModuleList'):
        moe_model(r'bbox_head\.cls_subnet\.convs')


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"mix must be one of \('probability', 'logit'\), got 'p'"):
        moe_model(mix='p')
    softmax = dict(loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False))
    with pytest.raises(ValueError, match="use_sigmoid=False; use mix='logit'"):
        moe_model(head=softmax)
    with pytest.raises(ValueError, match="granularity 'token' does not suit a RetinaSubnet"):
        build(
            'retinanet',
            head=dict(type='MoERetinaHead'),
            moe=[
                dict(
                    targets=BOTH,
                    num_experts=2,
                    granularity='token',
                    router=dict(type='TopKRouter', k=1),
                )
            ],
        )


# -- levels --------------------------------------------------------------------------------------


@pytest.mark.parametrize('restrict', [True, False])
@pytest.mark.parametrize(
    'test_cfg', [{}, dict(min_bbox_size=20, nms_pre=20), dict(score_thr=0.011)]
)
def test_levels_change_nothing_else_of_the_predictions(restrict, test_cfg):
    cfg = {**retinanet_cfg()['test_cfg'], **test_cfg}
    for model in (dense_model(restrict_classes=restrict, test_cfg=cfg), moe_model(test_cfg=cfg)):
        spread(model).eval()
        inputs, samples = mixed_batch()
        for item in samples:  # boxes are scaled before they are filtered by size
            item.set_metainfo(dict(scale_factor=(2.0, 0.5)))
        without = predictions_of(model, inputs, samples)
        assert 'levels' not in without[0]
        model.bbox_head.with_levels = True
        for got, expected in zip(predictions_of(model, inputs, samples), without, strict=True):
            assert set(got.keys()) == {*expected.keys(), 'levels'} and len(expected) > 0
            for key in ('scores', 'labels', 'bboxes'):
                assert torch.equal(got[key], expected[key]), key
            assert got.levels.dtype == torch.long and got.levels.shape == got.labels.shape
            assert got.levels.min() >= 0 and got.levels.max() <= 2


@pytest.mark.parametrize('with_nms', [True, False])
def test_levels_are_those_of_the_boxes(with_nms):
    cfg = {**retinanet_cfg()['test_cfg'], 'max_per_img': 1000}
    model = spread(dense_model(head=dict(with_levels=True), test_cfg=cfg)).eval()
    with torch.no_grad():  # every box is its anchor
        model.bbox_head.retina_reg.weight.zero_()
        model.bbox_head.retina_reg.bias.zero_()
    size = (512, 512)
    item = sample('blood', [], [], size=size)
    head = model.bbox_head
    with torch.no_grad():
        outputs = head(features_of(512))
        (found,) = head.predict_by_feat(
            *outputs, batch_img_metas=[item.metainfo], with_nms=with_nms
        )
    inside = ((found.bboxes > 0) & (found.bboxes < 512)).all(1)
    widths = found.bboxes[:, 2:] - found.bboxes[:, :2]
    sides = widths.prod(1).sqrt()[inside]
    # Anchors have sides 3 * stride * (1, sqrt 2): 24 and 34, 48 and 68, 96 and 136.
    expected = (sides > 41).long() + (sides > 82).long()
    assert torch.equal(found.levels[inside], expected)
    assert set(found.levels.tolist()) == {0, 1, 2}


def features_of(size):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 16, size // s, size // s, generator=generator) for s in (8, 16, 32)]


def test_levels_of_no_prediction_are_none():
    cfg = {**retinanet_cfg()['test_cfg'], 'score_thr': 1.0}
    model = dense_model(head=dict(with_levels=True), test_cfg=cfg).eval()
    (found,) = predictions_of(model, images(1), [street_sample()])
    assert len(found) == 0 and found.levels.dtype == torch.long
