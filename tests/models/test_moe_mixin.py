"""The mixin: who an image is, what is kept out of the model, and mmengine's machinery around it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.model import BaseModel, ExponentialMovingAverage
from mmengine.optim import OptimWrapper
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from tiny_models import (
    CONFIGS,
    PLAN,
    SPACE,
    build,
    colour_plan,
    images,
    mixed_batch,
    moe_specs,
    sample,
    street_sample,
    total_loss,
    yard_sample,
)

from mmdet_moe.models import MoEMixin
from mmdet_moe.models.moe_mixin import restore_images, routing_summary
from mmdet_moe.planning import ExpertPlan
from mmdet_moe.registry import MODELS

KINDS = list(CONFIGS)
LEARNED = dict(
    targets=r'bbox_head\.cls_convs\.\d',
    num_experts=2,
    router=dict(type='TopKRouter', k=1, noise=False),
    balance=[dict(type='ImportanceLoss', weight=0.1)],
)


def coloured(*rgb):
    """A preprocessed image (1, 3, 64, 64) of one colour, RGB in 0..255; padded beyond 48 x 64."""
    mean = torch.tensor([123.675, 116.28, 103.53])
    std = torch.tensor([58.395, 57.12, 57.375])
    image = ((torch.tensor(rgb, dtype=torch.float32) - mean) / std)[:, None, None].repeat(1, 64, 64)
    image[:, 48:] = 0
    return image[None]


def unknown_sample():
    return sample(None, [], [], size=(48, 64))


# -- who an image is -----------------------------------------------------------------------------


def test_plan_of_other_datasets_is_refused_at_start_up_listing_both():
    plan = ExpertPlan.from_assignment({'street': 'e0', 'moon': 'e1'})
    with pytest.raises(ValueError, match='datasets') as error:
        build('retinanet', moe=moe_specs('retinanet', plan=plan))
    for name in ('street', 'moon', 'blood', 'yard'):
        assert name in str(error.value)


def test_plan_may_stand_once_in_the_model_and_on_disk(tmp_path):
    path = tmp_path / 'plan.json'
    PLAN.save(path)
    spec = dict(targets=r'bbox_head\.cls_convs\.\d', router=dict(type='PlanRouter'))
    model = build('retinanet', moe=[spec], plan=str(path), init=False)
    assert model.moe_names == ['bbox_head.cls_convs.0']
    assert len(model.moe_layers()['bbox_head.cls_convs.0'].experts) == 3
    with pytest.raises(ValueError, match='router of targets .* has no plan'):
        build('retinanet', moe=[spec])
    taught = dict(type='DAMEXRouter', router=dict(type='CosineRouter', k=1))  # needs a plan as well
    model = build('retinanet', moe=[{**spec, 'router': taught}], plan=str(path), init=False)
    assert model.moe_layers()['bbox_head.cls_convs.0'].router.plan.datasets == PLAN.datasets


@pytest.mark.parametrize('entry', ['forward', 'direct'])
@pytest.mark.parametrize('mode', ['loss', 'predict', 'tensor'])
def test_routing_begins_exactly_once_through_every_entry(entry, mode, monkeypatch):
    model = build('retinanet', moe=moe_specs('retinanet'))
    model.train(mode == 'loss')
    begun = []
    begin = model.routing_state.begin
    monkeypatch.setattr(
        model.routing_state, 'begin', lambda *a, **k: (begun.append(a[0]), begin(*a, **k))
    )
    inputs, samples = mixed_batch()
    for _ in range(2):
        if entry == 'forward' or mode == 'tensor':
            model(inputs, copy.deepcopy(samples), mode=mode)
        else:
            getattr(model, mode)(inputs, copy.deepcopy(samples))
    assert begun == [['street', 'blood', 'yard']] * 2


def test_failed_forward_does_not_keep_the_next_from_beginning():
    model = build('retinanet', moe=moe_specs('retinanet'))
    with pytest.raises(ValueError, match='unknown domain'):
        model.loss(images(1), [sample('moon', [], [])])
    assert model.loss(images(1), [street_sample()])
    assert model.routing_state.domains == ('street',)


def test_domain_of_the_model_is_that_of_samples_without_one():
    model = build('retinanet', moe=moe_specs('retinanet'), domain='blood').eval()
    found = model.predict(images(2), [sample(None, [], []), yard_sample()])
    assert model.routing_state.domains == ('blood', 'yard')
    assert found[0].domain == 'blood'
    assert set(found[0].pred_instances.labels.tolist()) <= set(SPACE.unified_ids('blood'))
    model.domain = 'street'
    assert model.predict(images(1), [sample(None, [], [])])[0].domain == 'street'


def test_unknown_domain_is_routed_and_restricted_to_the_nearest():
    model = build('retinanet', moe=moe_specs('retinanet', plan=colour_plan())).eval()
    inputs = torch.cat([coloured(10, 200, 30), coloured(20, 10, 220), coloured(255, 0, 0)])
    samples = [unknown_sample(), unknown_sample(), sample('yard', [], [], size=(48, 64))]
    found = model.predict(inputs, samples)
    assert [s.get('nearest_domain') for s in found] == ['blood', 'yard', None]
    for item, domain in zip(found, ('blood', 'yard', 'yard'), strict=True):
        assert set(item.pred_instances.labels.tolist()) <= set(SPACE.unified_ids(domain))
    weights = model.routing_state.stats()['bbox_head.cls_convs.0/weight']
    # Three levels: each image counts three times. e1 has the green one, e2 both others.
    assert weights.tolist() == [0.0, 3.0, 6.0]


def test_embedder_sees_unpadded_rgb_images_and_only_when_needed():
    model = build('retinanet', moe=moe_specs('retinanet', plan=colour_plan())).eval()
    model.predict(coloured(10, 200, 30), [sample('yard', [], [], size=(48, 64))])
    assert model._embedder._module is None
    model.predict(coloured(10, 200, 30), [unknown_sample()])
    (given,) = model._embedder._module.seen
    assert given[0].shape == (3, 48, 64)
    torch.testing.assert_close(given[0][:, 0, 0], torch.tensor([10.0, 200.0, 30.0]))


def test_preprocessing_is_undone_for_bgr_too():
    preprocessor = MODELS.build(dict(type='DetDataPreprocessor', mean=[1, 2, 3], std=[2, 2, 2]))
    inputs = torch.tensor([10.0, 20.0, 30.0]).reshape(1, 3, 1, 1)  # B, G, R
    (image,) = restore_images(inputs, [None], preprocessor, images_are_rgb=False)
    # B: 10*2+1 = 21, G: 20*2+2 = 42, R: 30*2+3 = 63.
    assert image.flatten().tolist() == [63, 42, 21]


def test_a_held_out_domain_is_routed_by_its_embedding_though_it_is_told():
    plan = ExpertPlan.from_assignment(
        {'street': 'e0', 'blood': 'e1'},
        prototypes=dict(
            embedder=dict(type='ColourEmbedder'),
            dimension=3,
            mean=dict(street=[1.0, 0.0, 0.0], blood=[0.0, 1.0, 0.0]),
            concentration=10.0,
        ),
    )
    model = build('retinanet', moe=moe_specs('retinanet', plan=plan)).eval()
    # The label space knows 'yard', the plan does not; the image is green, as those of 'blood' are.
    model.predict(coloured(10, 200, 30), [sample('yard', [], [])])
    counts = model.routing_state.stats()[f'{model.moe_names[0]}/count']
    assert counts[1] > 0 and counts[0] == 0


def test_unknown_domain_with_error_policy_is_refused():
    specs = moe_specs('retinanet')
    specs[0]['router'] = dict(type='PlanRouter', plan=colour_plan(), unknown='error')
    model = build('retinanet', moe=specs).eval()
    with pytest.raises(ValueError, match='unknown'):
        model.predict(coloured(10, 200, 30), [unknown_sample()])


def test_dense_model_scores_unknown_images_on_all_classes():
    model = build('retinanet').eval()
    labels = model.predict(images(1), [sample(None, [], [])])[0].pred_instances.labels
    assert len(set(labels.tolist())) > 3


def test_mixin_needs_no_detector():
    """A classifier has no ``_forward``, calls its preprocessor otherwise and knows no img_shape."""

    class Classifier(BaseModel):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 4, 3)

        def forward(self, inputs, data_samples=None, mode='tensor'):
            return getattr(self, mode)(inputs, data_samples)

        def tensor(self, inputs, data_samples=None):
            return self.stem(inputs).mean((2, 3))

        def loss(self, inputs, data_samples):
            return dict(loss=self.tensor(inputs).square().mean())

        def predict(self, inputs, data_samples=None, **kwargs):
            return self.tensor(inputs)

    class MoEClassifier(MoEMixin, Classifier):
        pass

    spec = dict(targets='stem', router=dict(type='PlanRouter', plan=PLAN))
    model = MoEClassifier(moe=[spec])
    model.init_weights()
    samples = [DetDataSample(metainfo=dict(domain=name)) for name in ('yard', 'blood')]
    for mode in ('tensor', 'loss', 'predict'):
        model(images(2), samples, mode=mode)
        assert model.routing_state.domains == ('yard', 'blood')
    model.eval()
    assert model.predict(images(2), samples).shape == (2, 4)


# -- what is kept out ----------------------------------------------------------------------------


def test_embedder_is_no_part_of_the_model():
    model = build('retinanet', moe=moe_specs('retinanet', plan=colour_plan())).eval()
    keys = set(model.state_dict())
    model.predict(coloured(10, 200, 30), [unknown_sample()])
    assert set(model.state_dict()) == keys
    embedder = model._embedder._module
    assert not any(p is embedder.scale for p in model.parameters())
    assert not embedder.scale.requires_grad and not embedder.training
    assert copy.deepcopy(model)._embedder is model._embedder


def test_copies_and_pickles_drop_what_belongs_to_one_forward():
    model = build('dino', moe=moe_specs('dino'))
    inputs, samples = mixed_batch()
    losses = model.loss(inputs, copy.deepcopy(samples))
    twin = copy.deepcopy(model)  # in the middle of training: losses still have their graph
    total_loss(losses).backward()
    assert twin.routing_state is not model.routing_state
    assert twin.moe_layers()[twin.moe_names[0]].state is twin.routing_state
    again = pickle.loads(pickle.dumps(model))
    for other in (twin, again):
        torch.manual_seed(0)
        expected = total_loss(model.loss(inputs, copy.deepcopy(samples)))
        torch.manual_seed(0)
        got = total_loss(other.loss(inputs, copy.deepcopy(samples)))
        torch.testing.assert_close(got, expected)


# -- losses and statistics -----------------------------------------------------------------------


def test_routing_losses_join_the_sum_and_statistics_do_not():
    model = build('retinanet', moe=[LEARNED])
    losses = model.loss(images(2), [street_sample(), yard_sample()])
    assert 'loss_moe_importance' in losses
    total, log = model.parse_losses(losses)
    extra = [key for key in losses if key.startswith('moe/')]
    assert extra == ['moe/max_share', 'moe/idle'] and not any('loss' in key for key in extra)
    torch.testing.assert_close(total, total_loss(losses))
    assert set(extra) <= set(log)


def test_routing_summary_by_hand():
    # Layer a: 6 of 8 items on one expert, none of 4 idle; b: all 4 on one, 1 of 2 idle.
    stats = {'a/count': torch.tensor([6, 1, 0, 1]), 'b/count': torch.tensor([0, 4])}
    got = routing_summary({**stats, 'a/weight': torch.tensor([1.0])})
    # (6/8 + 4/4) / 2 = 0.875; (1/4 + 1/2) / 2 = 0.375.
    assert {k: v.item() for k, v in got.items()} == {'moe/max_share': 0.875, 'moe/idle': 0.375}
    assert routing_summary({}) == {}


# -- mmengine ------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
def test_train_step_under_bf16_autocast(kind):
    model = build(kind, moe=moe_specs(kind))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    wrapper = OptimWrapper(optimizer)
    inputs, samples = mixed_batch()
    before = {k: v.clone() for k, v in model.named_parameters()}
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = model.loss(inputs, copy.deepcopy(samples))
    total, log = model.parse_losses(losses)
    wrapper.update_params(total)
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in log.values())
    changed = [k for k, v in model.named_parameters() if not torch.equal(v, before[k])]
    assert all(torch.isfinite(v).all() for v in model.parameters())
    assert any('.experts.' in k for k in changed)


@pytest.mark.parametrize('kind', KINDS)
def test_activation_checkpointing_changes_no_gradient(kind):
    names = dict(retinanet='backbone.layer4', dino='decoder.layers.1.ffn')
    specs = moe_specs(kind)
    if kind == 'retinanet':
        specs[0]['targets'] = names[kind]
        specs.append(LEARNED)
    model = build(kind, moe=specs)
    twin = copy.deepcopy(model)
    checkpointed = [names[kind]] + (['bbox_head.cls_convs.0'] if kind == 'retinanet' else [])
    turn_on_activation_checkpointing(twin, checkpointed)
    inputs, samples = mixed_batch()
    gradients = []
    for one in (model, twin):
        torch.manual_seed(0)
        total_loss(one.loss(inputs, copy.deepcopy(samples))).backward()
        gradients.append({k: p.grad for k, p in one.named_parameters() if p.grad is not None})
    assert set(gradients[0]) == set(gradients[1])
    assert any('router' in key for key in gradients[0]) or kind == 'dino'
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize('kind', KINDS)
def test_ema_follows_the_model_and_predicts(kind):
    model = build(kind, moe=moe_specs(kind))
    inputs, samples = mixed_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    average = ExponentialMovingAverage(model, momentum=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        total_loss(model.loss(inputs, copy.deepcopy(samples))).backward()
        average.update_parameters(model)  # between forward and step: graphs are alive
        optimizer.step()
    average.eval()
    found = average.module.predict(inputs, copy.deepcopy(samples))
    assert average.module.routing_state.domains == ('street', 'blood', 'yard')
    for item in found:
        assert set(item.pred_instances.labels.tolist()) <= set(SPACE.unified_ids(item.domain))


def test_data_preprocessor_and_val_step_work_as_ever():
    model = build('retinanet', moe=moe_specs('retinanet')).eval()
    image = torch.randint(0, 255, (3, 48, 64), dtype=torch.uint8)
    data = dict(inputs=[image], data_samples=[sample('street', [], [], size=(48, 64))])
    (found,) = model.val_step(data)
    assert found.pad_shape == (64, 64) and len(found.pred_instances)


# -- targets -------------------------------------------------------------------------------------


def test_ffn_keeps_identity_dropout_and_layer_scale():
    from mmcv.cnn.bricks.transformer import FFN

    from mmdet_moe.moe import RoutingState, replace_modules

    torch.manual_seed(0)
    ffn = FFN(8, 16, layer_scale_init_value=0.3, dropout_layer=dict(type='DropPath', drop_prob=0.5))
    holder = torch.nn.Module()
    holder.ffn = copy.deepcopy(ffn)
    state = RoutingState()
    replace_modules(holder, [dict(targets='ffn', router=dict(type='PlanRouter', plan=PLAN))], state)
    x, identity = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    state.begin(['street', 'blood'])
    holder.eval(), ffn.eval()
    torch.testing.assert_close(holder.ffn(x), ffn(x))
    torch.testing.assert_close(holder.ffn(x, identity), ffn(x, identity))
    torch.testing.assert_close(holder.ffn(x, identity=identity), ffn(x, identity=identity))
    # DropPath in training drops a whole branch: what is left is the identity alone.
    holder.train()
    state.begin(['street', 'blood'], training=True)
    difference = holder.ffn(x, identity) - identity
    branch = (ffn(x, identity) - identity) / 0.5
    for got, full in zip(difference, branch, strict=True):
        assert torch.allclose(got, torch.zeros_like(got)) or torch.allclose(got, full, atol=1e-5)


@pytest.mark.parametrize('target', ['bbox_head.cls_branches.0', 'bbox_head.reg_branches.1'])
def test_branches_that_dino_reads_from_outside_are_refused(target):
    spec = dict(targets=target.replace('.', r'\.'), router=dict(type='PlanRouter', plan=PLAN))
    with pytest.raises(ValueError, match=f"'{target}' cannot be a MoE target"):
        build('dino', moe=[spec])


@pytest.mark.parametrize(
    'targets',
    [
        r'backbone\.layer[34]',
        r'backbone\.(bn1|layer\d\.\d\.bn\d)',
        r'neck\.fpn_convs\.\d',
        r'neck\.lateral_convs\.\d\.conv',
        r'bbox_head\.retina_(cls|reg)',
    ],
)
def test_retinanet_takes_experts_in_backbone_norm_neck_and_head(targets):
    spec = dict(targets=targets, router=dict(type='PlanRouter', plan=PLAN))
    model, dense = build('retinanet', moe=[spec]), build('retinanet')
    inputs, samples = mixed_batch()
    got = model.loss(inputs, copy.deepcopy(samples))
    expected = dense.loss(inputs, copy.deepcopy(samples))
    torch.testing.assert_close(total_loss(got), total_loss(expected), rtol=1e-5, atol=1e-5)
    total_loss(got).backward()
