"""MoE classifiers: mmpretrain's ImageClassifier with experts, in mmpretrain's own scope."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import DOMAINS, PLAN, SPACE, build, label_sample, raw_batch, vit_cfg

from mmdet_moe.planning import ExpertPlan

pytest.importorskip('mmpretrain')

TARGETS = r'backbone\.layers\.\d\.ffn'
LAYERS = ['backbone.layers.0.ffn', 'backbone.layers.1.ffn']
SPECS = {
    'plan': dict(targets=TARGETS, router=dict(type='PlanRouter', plan=PLAN.to_dict())),
    'top-2': dict(targets=TARGETS, num_experts=3, router=dict(type='TopKRouter', k=2)),
}


def dense_classifier(seed=0):
    """mmpretrain's own class, which knows nothing of us, from the same config."""
    from mmengine.registry import init_default_scope
    from mmpretrain.registry import MODELS

    init_default_scope('mmpretrain')
    torch.manual_seed(seed)
    model = MODELS.build(dict(vit_cfg(), type='ImageClassifier'))
    torch.manual_seed(seed)
    model.init_weights()
    return model.train()


def batch_of(model, domains=tuple(DOMAINS), told=True):
    """Preprocessed inputs and data samples."""
    return model.data_preprocessor(raw_batch('vit', domains, told))


def scores(samples):
    return torch.stack([sample.pred_score for sample in samples])


@pytest.mark.parametrize('name', SPECS)
def test_moe_classifier_computes_what_the_dense_one_does_at_step_0(name):
    """From the same seed: a ViT's initialisation walks the modules of its FFNs."""
    dense, moe = dense_classifier(), build('vit', moe=[SPECS[name]])
    assert moe.moe_names == LAYERS
    data = batch_of(dense)
    expected, got = dense(**data, mode='loss'), moe(**data, mode='loss')
    torch.testing.assert_close(got['loss'], expected['loss'], rtol=1e-5, atol=1e-5)
    dense.eval(), moe.eval()
    with torch.no_grad():
        torch.testing.assert_close(moe(**data), dense(**data), rtol=1e-5, atol=1e-5)
        one, other = (scores(model.predict(**copy.deepcopy(data))) for model in (moe, dense))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('way', ['state dict', 'file'])
def test_a_dense_checkpoint_of_mmpretrain_loads_into_every_expert(way, tmp_path):
    from mmengine.runner import load_checkpoint

    dense, moe = dense_classifier(seed=7), build('vit', moe=[SPECS['top-2']])
    weights = dense.state_dict()
    if way == 'file':
        torch.save(dict(state_dict=weights), tmp_path / 'dense.pth')
        load_checkpoint(moe, str(tmp_path / 'dense.pth'), strict=True)
    else:
        moe.load_state_dict(copy.copy(weights))
    for name, layer in moe.moe_layers().items():
        for expert in layer.experts:
            for key, value in expert.state_dict().items():
                assert torch.equal(value, weights[f'{name}.{key}']), f'{name}.{key}'
    data = batch_of(dense)
    dense.eval(), moe.eval()
    with torch.no_grad():
        torch.testing.assert_close(moe(**data), dense(**data), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('mode', ['tensor', 'loss', 'predict'])
def test_the_domain_in_the_metainfo_reaches_the_plan(mode):
    model = build('vit', moe=[SPECS['plan']])
    model(**batch_of(model, ['street', 'blood', 'yard']), mode=mode)
    assert model.routing_state.domains == ('street', 'blood', 'yard')
    # street and yard are e0's, blood is e1's, e2 has none.
    for layer in LAYERS:
        assert model.routing_state.stats()[f'{layer}/count'].tolist() == [2, 1, 0]


def test_learned_routers_need_no_domain_and_no_data_samples():
    model = build('vit', moe=[SPECS['top-2']], label_space=None).eval()
    inputs = batch_of(model)['inputs']
    with torch.no_grad():
        found = model.predict(inputs)
        logits = model(inputs)
    assert logits.shape == (3, 5)
    torch.testing.assert_close(scores(found), logits.softmax(1))
    assert model.routing_state.domains == (None, None, None)
    # 3 images of 4 x 4 patches, 2 experts each.
    assert model.routing_state.stats()['backbone.layers.0.ffn/count'].sum() == 3 * 16 * 2


def test_label_space_gives_the_head_its_classes_and_refuses_other_domains():
    alone = build('vit', label_space=None, head=dict(num_classes=7), init=False)
    assert alone.head.num_classes == 7 and alone.label_space is None
    model = build('vit', moe=[SPECS['plan']], head=dict(num_classes=7))
    assert model.head.num_classes == model.head.layers.head.out_features == SPACE.num_classes == 5
    data = batch_of(model)
    data['data_samples'][1] = label_sample('moon', 'car')
    with pytest.raises(ValueError, match="unknown domain 'moon'"):
        model.loss(**data)


def test_an_image_without_domain_goes_to_the_nearest_by_the_embedder_of_the_plan():
    """The embedder of a shipped plan names its backbone without a scope, which is ours here too."""
    backbone = dict(type='EfficientNetLite', out_indices=[1])
    mean = {name: torch.eye(24)[i].tolist() for i, name in enumerate(DOMAINS)}
    plan = ExpertPlan.from_assignment(
        dict(street='e0', blood='e1', yard='e2'),
        prototypes=dict(
            embedder=dict(type='FrozenEmbedder', backbone=backbone, size=32),
            dimension=24,
            mean=mean,
            concentration=5.0,
        ),
    )
    spec = dict(targets=TARGETS, router=dict(type='PlanRouter', plan=plan))
    model = build('vit', moe=[spec]).eval()
    found = model.test_step(raw_batch('vit', ['street', 'yard'], told=False))
    embeddings = model.routing_state.embeddings()
    assert embeddings.shape == (2, 24)
    nearest = [list(DOMAINS)[i] for i in embeddings[:, :3].argmax(1)]
    assert [sample.nearest_domain for sample in found] == nearest


@pytest.mark.parametrize('name', SPECS)
def test_five_steps_under_the_runner(name, tmp_path):
    """With types of ours named from mmpretrain's scope, an mmpretrain head, metric and samples."""
    from mmengine.dataset import pseudo_collate
    from mmengine.runner import Runner
    from torch.utils.data import DataLoader

    data = raw_batch('vit', ['street', 'blood'] * 5)
    items = [dict(inputs=i, data_samples=s) for i, s in zip(*data.values(), strict=True)]
    loader = DataLoader(items, batch_size=2, collate_fn=pseudo_collate)
    runner = Runner(
        model=vit_cfg(moe=[SPECS[name]], label_space=dict(domains=DOMAINS)),
        work_dir=str(tmp_path),
        experiment_name=f'{tmp_path.name}_{name}',
        default_scope='mmpretrain',
        train_dataloader=loader,
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=5, val_interval=5),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.1)),
        val_dataloader=loader,
        val_cfg=dict(type='ValLoop'),
        val_evaluator=dict(type='Accuracy', topk=1),
        custom_hooks=[dict(type='mmdet_moe.UpcycleHook'), dict(type='mmdet_moe.RandomStateHook')],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=5)),
        visualizer=dict(type='Visualizer', vis_backends=[], name=f'{tmp_path.name}_{name}'),
        log_level='ERROR',
        randomness=dict(seed=0),
    )
    runner._init_model_weights()  # a second call does nothing
    before = copy.deepcopy(runner.model.state_dict())
    runner.train()
    after = torch.load(tmp_path / 'iter_5.pth', weights_only=False)['state_dict']
    assert set(after) == set(before)
    assert all(value.isfinite().all() for value in after.values())
    moved = [key for key in after if not torch.equal(after[key], before[key])]
    experts = {key.split('.experts.')[1][0] for key in moved if '.experts.' in key}
    assert experts == ({'0', '1'} if name == 'plan' else {'0', '1', '2'})
    assert any('.router.' in key for key in moved) == (name == 'top-2')
    accuracy = runner.message_hub.get_scalar('val/accuracy/top1').current()
    assert 0 <= accuracy <= 100
