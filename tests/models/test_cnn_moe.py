"""Experts in mmdet's and mmpretrain's real ResNets: every place the paper has."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from mmdet.models.backbones import ResNet as DetectionResNet
from mmengine.analysis import FlopAnalyzer
from mmengine.logging import MMLogger
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from tiny_models import build, images, mixed_batch, total_loss

from mmdet_moe.models.checkpoint import CheckpointError, fit_checkpoint
from mmdet_moe.moe import RoutingState, moe_layers, replace_modules, upcycle_
from mmdet_moe.moe.experts import Geometry, geometry
from mmdet_moe.moe.targets import describe_target

pytest.importorskip('mmpretrain')
from mmpretrain.models import ResNet, ResNet_CIFAR
from mmpretrain.structures import DataSample

from mmdet_moe.models import MoEImageClassifier

MMLogger.get_current_instance().setLevel('WARNING')
GATE = dict(type='TopKRouter', k=2, kind='conv', projection=8)


def backbone(kind, depth=18, base=8, **options):
    torch.manual_seed(0)
    options.update(stem_channels=base, base_channels=base, out_indices=(0, 1, 2, 3))
    cls = dict(mmdet=DetectionResNet, mmpretrain=ResNet, cifar=ResNet_CIFAR)[kind]
    return cls(depth, **options)


def with_experts(model, targets, num_experts=3, router=GATE, **spec):
    state = RoutingState()
    spec = dict(targets=targets, num_experts=num_experts, router=router, **spec)
    names = replace_modules(model, [spec], state)
    upcycle_(model)
    return state, names


def outputs(model, state, x, training=False):
    model.train(training)
    state.begin(num_images=len(x), training=training, images=x)
    return model(x)


def evaluated(model, x):
    model.eval()  # a ResNet does not return itself
    return model(x)


# -- where ---------------------------------------------------------------------------------------

PLACES = [
    *[(kind, 18, rf'layer{i}') for kind in ('mmdet', 'cifar', 'mmpretrain') for i in (1, 4)],
    *[('cifar', 18, rf'layer{i}') for i in (2, 3)],
    *[(kind, 50, rf'layer{i}') for kind in ('mmdet', 'mmpretrain') for i in (1, 3)],
    *[(kind, 18, r'layer2\.1') for kind in ('mmdet', 'cifar')],
    *[(kind, 18, r'layer3\.1\.conv2') for kind in ('mmdet', 'cifar')],
    ('mmpretrain', 50, r'layer2\.0\.conv2'),
    *[(kind, 18, r'layer2\.\d\.conv\d') for kind in ('mmdet', 'cifar')],
    ('mmdet', 50, r'layer4\.\d\.conv\d'),
]
BALANCES = [
    [dict(type='ImportanceLoss', weight=0.5, of='weights', unbiased=True)],
    [dict(type='KLLoss', weight=0.5), dict(type='VarianceLoss', weight=0.1)],
    [dict(type='RelativeImportanceConstraint'), dict(type='MeanImportanceConstraint')],
]


@pytest.mark.parametrize('kind, depth, target', PLACES)
def test_a_step_trains_gate_and_experts_at_every_place(kind, depth, target):
    for balance in BALANCES:
        model = backbone(kind, depth)
        state, names = with_experts(model, target, noise=0.1, balance=balance)
        x = images(4, size=32)
        outs = outputs(model, state, x, training=True)
        losses = state.collect()
        assert len(losses) == sum('Loss' in loss['type'] for loss in balance)
        loss = sum(out.square().mean() for out in outs) + sum(losses.values())
        loss.backward()
        for name in names:
            layer = model.get_submodule(name)
            for key, p in layer.router.named_parameters():
                assert p.grad is not None and p.grad.isfinite().all(), (name, key)
            assert layer.router.gate.grad.abs().sum() > 0, name
            ran = state.stats()[f'{name}/count'].tolist()
            assert sum(ran) == 8  # 4 images, k = 2, whatever is closed
            for expert, count in zip(layer.experts, ran, strict=True):
                found = any(p.grad is not None and p.grad.any() for p in expert.parameters())
                assert found == (count > 0)
            for constraint in layer.balance:
                if hasattr(constraint, 'account'):
                    assert constraint.account().abs().sum() > 0  # it has booked the batch


@pytest.mark.parametrize('kind', ['mmdet', 'cifar'])
def test_stages_have_an_adapter(kind):
    found = describe_target(backbone(kind).layer3)
    assert found.in_channels == 16 and found.channel_dim == 1
    assert found.granularities == ('image', 'patch')


@pytest.mark.parametrize('kind', ['mmdet', 'cifar'])
def test_upcycled_stages_and_convolutions_are_the_dense_network(kind):
    dense = backbone(kind)
    x = images(3, size=32)
    for target in ('layer3', r'layer2\.\d\.conv\d'):
        model = copy.deepcopy(dense)
        state, _ = with_experts(model, target)
        for ours, theirs in zip(outputs(model, state, x), evaluated(dense, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# -- width ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'kind, depth, size, gate',
    [
        *((kind, 18, size, gate) for kind, size in (('cifar', 32), ('mmdet', 64))
          for gate in ('linear', 'conv')),
        ('cifar', 50, 32, 'linear'),
    ],
)  # fmt: skip
@pytest.mark.parametrize('position', [1, 2, 3, 4])
def test_narrow_top_2_costs_what_the_dense_stage_does(kind, depth, size, position, gate):
    """By mmengine's analysis, gate and norms included: within 5 % of the dense stage."""
    model = backbone(kind, depth, base=64)
    name = f'layer{position}'
    dense = model.get_submodule(name)
    given = []
    handle = dense.register_forward_pre_hook(lambda m, inputs: given.append(inputs[0]))
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    handle.remove()
    router = dict(type='TopKRouter', k=2, kind=gate)
    state, _ = with_experts(model, name, num_experts=4, router=router, width='iso')
    model.eval()
    state.begin(num_images=1)
    with torch.no_grad():
        before = FlopAnalyzer(dense, (given[0],)).total()
        after = FlopAnalyzer(model.get_submodule(name), (given[0],)).total()
    assert after / before == pytest.approx(1, abs=0.05)


def test_narrow_bottlenecks_and_single_blocks_train():
    for kind, target in (('mmdet', 'layer2'), ('mmpretrain', 'layer2'), ('mmdet', r'layer3\.0')):
        model = backbone(kind, 50, base=16)
        state, (name,) = with_experts(model, target, width='iso')
        block = next(m for m in model.get_submodule(name).experts[0].modules() if hasattr(m, 'bn2'))
        width = block.conv1.out_channels
        assert width < block.conv1.in_channels
        assert block.conv2.weight.shape[:2] == (width, width)
        assert block.conv3.in_channels == width == block.bn2.num_features
        out = outputs(model, state, images(2, size=32), training=True)
        sum(o.square().mean() for o in out).backward()


def test_dense_checkpoint_of_a_resnet_cannot_fill_narrow_experts_and_the_error_says_so():
    model = backbone('cifar')
    dense = copy.deepcopy(model.state_dict())
    with_experts(model, 'layer2', width='iso')
    from mmengine.runner.checkpoint import load_state_dict

    with pytest.raises(ValueError, match='inner width is .*a dense checkpoint cannot fill them'):
        load_state_dict(model, dense)
    with pytest.raises(CheckpointError, match='inner width is .*a dense checkpoint cannot fill'):
        fit_checkpoint(model, dense)


# -- residual, patches, norms, shared gates ------------------------------------------------------


@pytest.mark.parametrize('kind', ['mmdet', 'cifar'])
def test_residual_stages(kind):
    model = backbone(kind)
    dense = copy.deepcopy(model)
    state, names = with_experts(model, r'layer[12]', bypass=True)
    kept, projected = (model.get_submodule(name).bypass for name in names)
    assert isinstance(kept, torch.nn.Identity)
    assert projected[0].stride == (2, 2) and projected[0].weight.shape == (16, 8, 1, 1)
    x = images(2, size=32)
    ours, theirs = outputs(model, state, x), evaluated(dense, x)
    stem = dense.relu(dense.norm1(dense.conv1(x)))
    stem = dense.maxpool(stem) if kind == 'mmdet' else stem
    # k experts with weights that sum to 1 are the dense stage; the identity comes on top.
    torch.testing.assert_close(ours[0], theirs[0] + stem, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('target', ['layer1', 'layer2', r'layer3\.1\.conv2', r'layer2\.0\.conv1'])
@pytest.mark.parametrize('kind, size', [('cifar', 32), ('cifar', 30), ('mmdet', 72)])
def test_patches_with_halos_are_the_dense_network(kind, size, target):
    dense = backbone(kind)
    for norm in dense.modules():  # what a norm makes of zeros is not zero
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(norm.bias)
    model = copy.deepcopy(dense)
    state, (name,) = with_experts(model, target, granularity='patch', grid=2)
    x = images(2, size=size)
    for ours, theirs in zip(outputs(model, state, x), evaluated(dense, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert state.stats()[f'{name}/count'].sum() == 2 * 4 * 2
    upcycle_(model, noise=0.1)  # equal experts teach a gate nothing
    out = outputs(model, state, x, training=True)
    sum(o.square().mean() for o in out).backward()
    assert model.get_submodule(name).router.gate.grad.abs().sum() > 0


@pytest.mark.parametrize('kind', ['mmdet', 'cifar'])
def test_frozen_norms_of_a_stage_stay_through_train(kind):
    model = backbone(kind, norm_eval=False)
    state, _ = with_experts(model, 'layer2', expert_norm='frozen')
    statistics = {k: v.clone() for k, v in model.state_dict().items() if 'running' in k}
    outputs(model, state, images(4, size=32), training=True)
    moved = {k for k, v in statistics.items() if not torch.equal(model.state_dict()[k], v)}
    assert moved and not any(key.startswith('layer2.') for key in moved)
    norms = [m for m in model.layer2.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not any(norm.training or norm.weight.requires_grad for norm in norms)


@pytest.mark.parametrize('kind', ['mmdet', 'cifar'])
def test_an_idle_stage_touches_no_running_statistics(kind):
    model = backbone(kind, norm_eval=False)
    plan = dict(type='PlanRouter', plan={'a': 'e0', 'b': 'e1', 'c': 'e2'})
    state, _ = with_experts(model, 'layer2', router=plan)
    before = copy.deepcopy(model.layer2.state_dict())
    for domains in (['a', 'c'], []):  # one expert idle, then all
        state.begin(domains=domains, training=True)
        model.train()
        model(images(2, size=32)[: len(domains)]) if domains else model.layer2(
            torch.zeros(0, 8, 8, 8)
        )
    after = model.layer2.state_dict()
    moved = {k.split('.')[1] for k in before if not torch.equal(before[k], after[k])}
    assert moved == {'0', '2'}


def test_group_norms_in_experts_and_a_global_gate_over_three_stages():
    model = backbone('cifar')
    state, names = with_experts(
        model,
        r'layer[234]',
        share_router='image',
        image_size=16,
        expert_norm=dict(type='GN', num_groups=4),
        balance=[dict(type='KLLoss', weight=0.5)],
    )
    assert len([k for k in model.state_dict() if k.endswith('router.gate')]) == 1
    out = outputs(model, state, images(4, size=32), training=True)
    counts = [state.stats()[f'{name}/count'] for name in names]
    assert torch.equal(counts[0], counts[1]) and torch.equal(counts[0], counts[2])
    (sum(o.square().mean() for o in out) + state.collect()['loss_moe_kl']).backward()
    assert model.layer2.router.convs[0].weight.grad.abs().sum() > 0


# -- whole models --------------------------------------------------------------------------------


def classifier(moe, **options):
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    options.setdefault(
        'backbone', dict(type='ResNet_CIFAR', depth=18, stem_channels=8, base_channels=8)
    )
    model = MoEImageClassifier(
        neck=dict(type='GlobalAveragePooling'),
        head=dict(
            type='LinearClsHead',
            num_classes=5,
            in_channels=64,
            loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        ),
        moe=moe,
        **options,
    )
    model.init_weights()
    return model.train()


def step(model, inputs, samples):
    """One step of mmengine's optimiser, with weight decay; what moved."""
    cfg = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.5))
    optimiser = build_optim_wrapper(model, cfg)
    before = copy.deepcopy(model.state_dict())
    loss = total_loss(model.loss(inputs, samples))
    optimiser.update_params(loss)
    return {key for key, value in model.state_dict().items() if not value.equal(before[key])}


def test_classifier_with_independent_narrow_experts_and_a_global_gate_trains():
    spec = dict(
        targets=r'backbone\.layer[34]',
        num_experts=4,
        router=GATE,
        share_router='image',
        width='iso',
        noise='independent',
        bypass=True,
        balance=[dict(type='ImportanceLoss', weight=0.5, of='weights')],
    )
    model = classifier([spec])
    samples = [DataSample().set_gt_label(i) for i in range(4)]
    moved = step(model, images(4, size=32), samples)
    assert 'backbone.layer3.router.gate' in moved and 'backbone.layer4.bypass.0.weight' in moved
    first, second = (model.backbone.layer3.experts[e][0].conv1.weight for e in (0, 1))
    assert not torch.allclose(first, second, atol=0.05)
    model.eval()
    found = model.predict(images(2, size=32))
    assert len(found) == 2
    assert len(moe_layers(copy.deepcopy(model))) == 2


def test_an_average_of_all_buffers_averages_a_shared_router_once():
    spec = dict(
        targets=r'backbone\.layer[34]',
        num_experts=2,
        router=dict(type='TopKRouter', k=1),
        share_router='call',
    )
    model = classifier([spec])
    average = ExponentialMovingAverage(model, momentum=0.25, update_buffers=True)
    assert average.module.backbone.layer4.router is average.module.backbone.layer3.router
    average.update_parameters(model)  # the first only copies
    before = model.backbone.layer3.router.gate.detach().clone()
    with torch.no_grad():
        model.backbone.layer3.router.gate.add_(1.0)
    average.update_parameters(model)
    torch.testing.assert_close(average.module.backbone.layer4.router.gate, before + 0.25)


def test_freeze_others_moves_the_classifiers_experts_and_router_only():
    spec = dict(targets=r'backbone\.layer3', num_experts=3, router=GATE, bypass=True)
    model = classifier([spec], freeze_others=True)
    moved = step(model, images(4, size=32), [DataSample().set_gt_label(i) for i in range(4)])
    assert moved and all(key.startswith('backbone.layer3.') for key in moved)
    assert any('.router.' in key for key in moved) and any('.experts.' in key for key in moved)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert {n.startswith('backbone.layer3.') for n, m in norms.items() if m.training} == {True}
    assert not any(m.training for n, m in norms.items() if not n.startswith('backbone.layer3.'))


def test_freeze_others_freezes_a_detectors_heads_and_class_rows():
    gate = dict(type='TopKRouter', k=1)
    spec = dict(targets=r'backbone\.layer4', num_experts=2, router=gate)
    model = build('retinanet', moe=[spec], freeze_others=True)
    moved = step(model, *mixed_batch())
    assert moved and all(key.startswith('backbone.layer4.') for key in moved)
    assert not any(p.requires_grad for p in model.bbox_head.parameters())


def test_freeze_others_needs_something_to_train():
    with pytest.raises(ValueError, match='leaves nothing to train: no moe is given'):
        classifier([], freeze_others=True)


# -- the page ------------------------------------------------------------------------------------


def test_the_examples_of_the_page_build():
    page = (Path(__file__).parents[2] / 'docs' / 'cnn_moe.md').read_text()
    blocks = re.findall(r'```python\n(.*?)```', page.partition('## RetinaNet')[0], re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        found = {}
        exec(compile(block, 'docs/cnn_moe.md', 'exec'), found)
        model = classifier(found['moe'])
        samples = [DataSample().set_gt_label(i) for i in range(2)]
        moved = step(model, images(2, size=32), samples)
        assert any('.router.' in key for key in moved), block


def test_stages_reach_as_far_as_the_page_says():
    model = backbone('cifar')
    assert geometry(model.layer1, 8, '').reach == 4
    assert geometry(model.layer2, 8, '') == Geometry(stride=2, reach=7, channels=16)


def test_a_gate_in_a_frozen_stage_is_refused_and_a_plan_is_not():
    backbone = dict(
        type='ResNet_CIFAR', depth=18, stem_channels=8, base_channels=8, frozen_stages=1
    )
    spec = dict(targets=r'backbone\.layer1', num_experts=2, router=dict(type='TopKRouter'))
    with pytest.raises(ValueError, match="'backbone.layer1' is in a part that the model freezes"):
        classifier([spec], backbone=backbone)
    plan = dict(type='PlanRouter', plan={'a': 'e0', 'b': 'e1'})
    model = classifier([dict(targets=r'backbone\.layer1', router=plan)], backbone=backbone)
    assert model.moe_names == ['backbone.layer1']


def test_features_alone_are_a_forward_of_their_own():
    """As mmpretrain's FeatureExtractor takes them: no decision of the forward before is left."""
    spec = dict(
        targets=r'backbone\.layer[34]', num_experts=4, router=GATE, share_router='image', noise=0.5
    )
    model = classifier([spec]).eval()
    torch.nn.init.normal_(model.backbone.layer3.router.gate)
    first, second = images(2, size=32), images(2, size=32).flip(-1) * 3
    fresh = model.extract_feat(second)[0]
    model(first)
    torch.testing.assert_close(model.extract_feat(second)[0], fresh)


def test_circular_padding_cannot_be_cut_into_patches():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3, padding=1, padding_mode='circular'))
    with pytest.raises(ValueError, match='circular padding reaches over the whole map'):
        with_experts(model, '0', router=dict(type='TopKRouter'), granularity='patch', grid=2)
