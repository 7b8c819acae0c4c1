"""An image is trained and scored as by a head that has its domain's classes and no others.

The reference is mmdet's own RetinaNet and DINO with as many classes as one domain has, their class
rows copied from ours.
"""

from __future__ import annotations

import copy

import pytest
import torch
from mmdet.models.layers import CdnQueryGenerator
from mmengine.config import ConfigDict
from tiny_models import (
    CONFIGS,
    DOMAINS,
    SPACE,
    blood_sample,
    build,
    images,
    mixed_batch,
    sample,
    street_sample,
    yard_sample,
)

from mmdet_moe.models import DomainClasses, MultiDomainCdnQueryGenerator, domain_loss_weights
from mmdet_moe.models.dense_heads.multi_domain_retina_head import mask_channels, slice_channels
from mmdet_moe.registry import MODELS

KINDS = list(CONFIGS)
PLAIN = dict(
    retinanet=('mmdet.RetinaNet', 'mmdet.RetinaHead'), dino=('mmdet.DINO', 'mmdet.DINOHead')
)
SAMPLES = dict(street=street_sample, blood=blood_sample, yard=yard_sample)


def spread(model):
    """Weights at which classes, boxes and queries differ (fresh ones give nearly equal scores)."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if 'cls' in key or 'reg' in key or 'label_embedding' in key:
                value.add_(torch.randn(value.shape, generator=generator) * 0.05)
    return model


def plain_model(kind, model, ids):
    """mmdet's own detector with the classes ``ids`` of ``model``, row by row."""
    detector, head = PLAIN[kind]
    cfg = ConfigDict(CONFIGS[kind](type=detector, head=dict(type=head, num_classes=len(ids))))
    plain = MODELS.build(cfg)
    anchors = model.bbox_head.num_base_priors if kind == 'retinanet' else 1
    state = copy.deepcopy(model.state_dict())
    for key, value in state.items():
        if 'retina_cls' in key or 'cls_branches' in key or 'label_embedding' in key:
            rows = [a * SPACE.num_classes + i for a in range(anchors) for i in ids]
            state[key] = value[rows]
    plain.load_state_dict(state)
    return plain.train(model.training)


def localised(data_sample, domain):
    """The sample with labels of ``domain``, as that domain's own dataset would give it."""
    data_sample = copy.deepcopy(data_sample)
    table = torch.tensor(SPACE.local_ids(domain))
    data_sample.gt_instances.labels = table[data_sample.gt_instances.labels]
    return data_sample


def losses_of(model, inputs, samples, seed=5):
    torch.manual_seed(seed)
    losses = model.loss(inputs, copy.deepcopy(samples))
    return {
        key: sum(value) if isinstance(value, list) else value
        for key, value in losses.items()
        if 'loss' in key
    }


def predictions_of(model, inputs, samples):
    with torch.no_grad():
        return [s.pred_instances for s in model.predict(inputs, copy.deepcopy(samples))]


def assert_same_predictions(got, expected, label_map=None):
    labels = expected.labels if label_map is None else torch.tensor(label_map)[expected.labels]
    assert len(got.labels) == len(labels) > 0
    assert torch.equal(got.labels, labels)
    torch.testing.assert_close(got.scores, expected.scores, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.bboxes, expected.bboxes, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('domain', list(DOMAINS))
def test_losses_equal_those_of_a_model_with_only_the_domains_classes(kind, domain):
    model = spread(build(kind))
    plain = plain_model(kind, model, SPACE.unified_ids(domain))
    one, two = SAMPLES[domain](), SAMPLES[domain]()
    two.gt_instances = two.gt_instances[:1]
    inputs = images(2)
    got = losses_of(model, inputs, [one, two])
    expected = losses_of(plain, inputs, [localised(s, domain) for s in (one, two)])
    # For DINO this includes the denoising losses: the same labels were drawn.
    assert set(got) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('domain', list(DOMAINS))
def test_predictions_equal_those_of_a_model_with_only_the_domains_classes(kind, domain):
    model = spread(build(kind)).eval()
    ids = SPACE.unified_ids(domain)
    plain = plain_model(kind, model, ids)
    inputs, samples = images(2), [SAMPLES[domain]() for _ in range(2)]
    got = predictions_of(model, inputs, samples)
    for one, other in zip(got, predictions_of(plain, inputs, samples), strict=True):
        assert_same_predictions(one, other, ids)


@pytest.mark.parametrize('kind', KINDS)
def test_predictions_of_a_mixed_batch_are_each_domains_own(kind):
    model = spread(build(kind)).eval()
    inputs, samples = mixed_batch()
    for i, got in enumerate(predictions_of(model, inputs, samples)):
        domain = samples[i].domain
        ids = SPACE.unified_ids(domain)
        plain = plain_model(kind, model, ids)
        expected = predictions_of(plain, inputs[i : i + 1], samples[i : i + 1])[0]
        assert set(got.labels.tolist()) <= set(ids)
        assert_same_predictions(got, expected, ids)


@pytest.mark.parametrize('kind', KINDS)
def test_mixed_batch_is_normalised_by_the_batch_or_by_each_domain(kind):
    """Images are independent, so a mixed loss is a weighted sum of the domains' own losses."""
    inputs, samples = mixed_batch()
    model = spread(build(kind))
    norm_model = build(kind, head=dict(loss_norm='domain'))
    norm_model.load_state_dict(model.state_dict())
    own, positives = [], []
    for i, item in enumerate(samples):
        plain = plain_model(kind, model, SPACE.unified_ids(item.domain))
        own.append(losses_of(plain, inputs[i : i + 1], [localised(item, item.domain)]))
        positives.append(positives_of(kind, plain, item))
    by_batch = losses_of(model, inputs, samples)
    by_domain = losses_of(norm_model, inputs, samples)
    for key in own[0]:
        if 'dn_' in key:
            continue  # the number of denoising groups depends on the batch; see the next test
        # batch: sum_d P_d L_d / P; domain: sum_d (B_d / B) L_d with B_d = 1, B = 3.
        batch = sum(p * loss[key] for p, loss in zip(positives, own, strict=True)) / sum(positives)
        domain = sum(loss[key] for loss in own) / 3
        torch.testing.assert_close(by_batch[key], batch, rtol=1e-4, atol=1e-5, msg=key)
        torch.testing.assert_close(by_domain[key], domain, rtol=1e-4, atol=1e-5, msg=key)


def positives_of(kind, plain, item):
    if kind == 'dino':
        return len(item.gt_instances)
    head = plain.bbox_head
    sizes = [(8, 8), (4, 4), (2, 2)]
    anchors, flags = head.get_anchors(sizes, [item.metainfo], device='cpu')
    labelled = localised(item, item.domain)
    return head.get_targets(anchors, flags, [labelled.gt_instances], [item.metainfo])[4]


def test_denoising_losses_of_a_mixed_batch_are_masked_and_normalised_too():
    model = spread(build('dino'))
    norm_model = build('dino', head=dict(loss_norm='domain'))
    norm_model.load_state_dict(model.state_dict())
    _, samples = mixed_batch()
    gts = [len(s.gt_instances) for s in samples]  # 2, 3, 1
    groups, width = 2, 2 * 2 * 3
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, width + 10, 256, generator=generator)
    references = [torch.rand(3, width + 10, 4, generator=generator) for _ in range(3)]
    dn_meta = dict(num_denoising_queries=width, num_denoising_groups=groups)

    def dn_losses(head, rows, items):
        head.restrict([s.metainfo for s in items]) if hasattr(head, 'restrict') else None
        losses = head.loss(
            hidden[:, rows], [r[rows] for r in references], None, None, items, dn_meta
        )
        return {k: v for k, v in losses.items() if 'dn_' in k}

    own = []
    for i, item in enumerate(samples):
        plain = plain_model('dino', model, SPACE.unified_ids(item.domain))
        own.append(dn_losses(plain.bbox_head, [i], [localised(item, item.domain)]))
    by_batch = dn_losses(model.bbox_head, [0, 1, 2], samples)
    by_domain = dn_losses(norm_model.bbox_head, [0, 1, 2], samples)
    for key in own[0]:
        batch = sum(n * loss[key] for n, loss in zip(gts, own, strict=True)) / sum(gts)
        torch.testing.assert_close(by_batch[key], batch, rtol=1e-4, atol=1e-5, msg=key)
        domain = sum(loss[key] for loss in own) / 3
        torch.testing.assert_close(by_domain[key], domain, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize('kind', KINDS)
def test_classes_of_other_domains_get_no_gradient(kind):
    model = spread(build(kind))
    losses = losses_of(model, images(1), [street_sample()])
    sum(losses.values()).backward()
    names = ('retina_cls', 'cls_branches', 'label_embedding')
    own = set(SPACE.unified_ids('street'))
    seen = 0
    for key, value in model.named_parameters():
        if any(name in key for name in names):
            rows = value.grad.reshape(-1, SPACE.num_classes, *value.shape[1:])
            for i in range(SPACE.num_classes):
                moved = bool(rows[:, i].abs().sum() > 0)
                assert moved <= (i in own), f'{key}: class {SPACE.classes[i]}'
            seen += 1
    assert seen >= 2


@pytest.mark.parametrize('kind', KINDS)
def test_unrestricted_reading_lets_all_classes_compete(kind):
    model = spread(build(kind, restrict_classes=False)).eval()
    plain = plain_model(kind, model, range(SPACE.num_classes))
    inputs, samples = mixed_batch()
    got = predictions_of(model, inputs, samples)
    for one, other in zip(got, predictions_of(plain, inputs, samples), strict=True):
        assert_same_predictions(one, other)


@pytest.mark.parametrize('kind', KINDS)
def test_dino_asks_for_no_more_boxes_than_queries_times_classes(kind):
    # 10 queries x 2 classes are fewer than 50 boxes; mmdet's top-k would raise.
    model = spread(build(kind, test_cfg=dict(CONFIGS[kind]()['test_cfg'], max_per_img=50))).eval()
    found = predictions_of(model, images(1), [street_sample()])[0]
    assert len(found) == (20 if kind == 'dino' else 50)


@pytest.mark.parametrize('kind', KINDS)
def test_training_without_a_domain_is_refused(kind):
    with pytest.raises(ValueError, match=r"image 'None.png' has no domain.*MultiDomainDataset"):
        losses_of(build(kind), images(1), [sample(None, [[4, 4, 30, 28]], ['dog'])])


@pytest.mark.parametrize('kind', KINDS)
def test_label_of_another_domain_is_refused_by_name(kind):
    wrong = sample('street', [[4, 4, 30, 28], [1, 1, 20, 20]], ['dog', 'cell'])
    with pytest.raises(ValueError, match=r"'street.png' of domain 'street'.*label 2 \(cell\)"):
        losses_of(build(kind), images(1), [wrong])


@pytest.mark.parametrize('kind', KINDS)
def test_image_without_boxes_trains(kind):
    losses = losses_of(build(kind), images(2), [sample('street', [], []), sample('blood', [], [])])
    assert all(torch.isfinite(value).all() for value in losses.values())


def test_unknown_domain_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown domain 'moon'.*street.*blood.*yard"):
        losses_of(build('retinanet'), images(1), [sample('moon', [[4, 4, 30, 28]], ['dog'])])


def test_head_without_label_space_is_the_base_head():
    model = build('retinanet', label_space=None, head=dict(num_classes=3))
    assert model.bbox_head.num_classes == 3
    labelled = sample(None, [[4, 4, 30, 28]], ['car'])
    assert sum(losses_of(model, images(1), [labelled]).values()) > 0


def test_bad_arguments_of_a_head_are_named():
    with pytest.raises(ValueError, match="loss_norm must be 'batch' or 'domain', got 'image'"):
        build('retinanet', head=dict(loss_norm='image'))
    with pytest.raises(ValueError, match='MultiDomainDINOHead needs num_classes or a label_space'):
        build('dino', label_space=None)


# -- pure functions ------------------------------------------------------------------------------


def test_domain_loss_weights_by_hand():
    # B = 3, P = 18 + 1 + 2 = 21. Domain a: B_a = 1, P_a = 18; b: B_b = 2, P_b = 3.
    # w_a = 1/3 * 21/18 = 7/18, w_b = 2/3 * 21/3 = 14/3.
    weights = domain_loss_weights(['a', 'b', 'b'], [18, 1, 2])
    assert weights == pytest.approx([7 / 18, 14 / 3, 14 / 3])
    assert domain_loss_weights(['a', 'a'], [5, 3]) == [1.0, 1.0]
    # A domain without positives is divided by 1: w_a = 1/2 * 4/4, w_b = 1/2 * 4/1.
    assert domain_loss_weights(['a', 'b'], [4, 0]) == pytest.approx([0.5, 2.0])


def test_masks_and_slices_keep_the_anchor_class_order():
    # 2 anchors x 3 classes, channel = anchor * 3 + class.
    scores = torch.arange(6.0).reshape(1, 6, 1, 1)
    allowed = torch.tensor([[True, False, True]])
    assert mask_channels(scores, allowed).flatten().tolist() == [0, -1e4, 2, 3, -1e4, 5]
    # Classes in the order 2, 0.
    assert slice_channels(scores[0], torch.tensor([2, 0]), 3).flatten().tolist() == [2, 0, 5, 3]


def test_background_belongs_to_every_domain():
    classes = DomainClasses(SPACE, background=True)
    assert classes.ids('yard').tolist() == [1, 4]
    assert classes.columns('yard').tolist() == [1, 4, 5]
    assert classes.allowed(['yard']).tolist() == [[False, True, False, False, True, True]]


def test_denoising_labels_come_from_the_images_own_domain():
    generator = MultiDomainCdnQueryGenerator(
        SPACE,
        num_classes=SPACE.num_classes,
        embed_dims=1,
        num_matching_queries=5,
        label_noise_scale=2.0,  # every label is replaced
        group_cfg=dict(dynamic=False, num_groups=300),
    )
    with torch.no_grad():  # the embedding of class i is i + 1; padding is 0
        generator.label_embedding.weight.copy_(torch.arange(5.0)[:, None] + 1)
    torch.manual_seed(0)
    _, samples = mixed_batch()
    queries, *_ = generator(samples)
    for domain, row in zip(DOMAINS, queries.squeeze(-1), strict=True):
        drawn = row[row > 0].long() - 1
        counts = torch.bincount(drawn, minlength=5)
        ids = list(SPACE.unified_ids(domain))
        assert set(drawn.tolist()) == set(ids)
        # Uniform: each class within 5 standard deviations of n / n_classes.
        share = 1 / len(ids)
        spread_ = 5 * (len(drawn) * share * (1 - share)) ** 0.5
        assert all(abs(counts[i] - len(drawn) * share) < spread_ for i in ids)


def test_denoising_of_one_domain_draws_what_a_model_of_that_domain_would():
    cfg = dict(embed_dims=4, num_matching_queries=5, group_cfg=dict(num_dn_queries=12))
    ours = MultiDomainCdnQueryGenerator(SPACE, num_classes=5, **cfg)
    ids = SPACE.unified_ids('blood')
    reference = CdnQueryGenerator(num_classes=3, **cfg)
    reference.label_embedding.weight.data = ours.label_embedding.weight.data[list(ids)]
    torch.manual_seed(2)
    got = ours([blood_sample(), blood_sample()])
    torch.manual_seed(2)
    expected = reference([localised(blood_sample(), 'blood') for _ in range(2)])
    for one, other in zip(got[:3], expected[:3], strict=True):
        assert torch.equal(one, other)
