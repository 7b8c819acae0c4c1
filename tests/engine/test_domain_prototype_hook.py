"""Prototypes are measured when training ends, and are in the last checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from tiny_models import retinanet_cfg

from mmdet_moe.engine.domain_prototypes import measure_prototypes, prototype_dataset
from mmdet_moe.planning.affinity import dataset_prototypes


@pytest.fixture
def runner(tmp_path, tiny_dataset, tiny_label_space, monkeypatch):
    """A RetinaNet on the tiny domains, two steps of it, with EMA."""
    monkeypatch.setattr(Runner, '_log_env', lambda *args: None)
    monkeypatch.setattr(Runner, 'dump_config', lambda *args: None)
    monkeypatch.setattr(Config, 'pretty_text', property(lambda self: repr(self._cfg_dict)))

    def loader(split, **dataset):
        return dict(
            batch_size=2,
            num_workers=0,
            persistent_workers=False,
            sampler=dict(type='MultiDomainSampler', seed=0),
            dataset=tiny_dataset(split, **dataset),
        )

    test = loader('val', domain_pipelines=dict(heat=tiny_dataset()['pipeline']))
    test['sampler'] = dict(type='DefaultSampler', shuffle=False)
    cfg = Config(
        dict(
            default_scope='mmdet_moe',
            work_dir=str(tmp_path),
            experiment_name=tmp_path.name,
            model=retinanet_cfg(label_space=tiny_label_space, domain_features={}),
            train_dataloader=loader('train', pipeline=flipping(tiny_dataset()['pipeline'])),
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=2, val_interval=100),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-3)),
            test_dataloader=test,
            test_cfg=dict(type='TestLoop'),
            test_evaluator=dict(
                type='MultiDomainEvaluator',
                label_space=tiny_label_space,
                metrics={name: dict(type='VOCMetric') for name in tiny_label_space['domains']},
            ),
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1)),
            custom_hooks=[
                dict(type='DomainPrototypeHook', max_images=4, batch_size=3),
                dict(type='EMAHook', momentum=0.5),
            ],
            visualizer=dict(type='DetLocalVisualizer', vis_backends=[], name=tmp_path.name),
            log_level='WARNING',
            randomness=dict(seed=0),
        )
    )
    return Runner.from_cfg(cfg)


def flipping(pipeline):
    """An augmentation that is not to be seen when prototypes are measured."""
    return [*pipeline[:-1], dict(type='RandomFlip', prob=1.0), pipeline[-1]]


def test_the_last_checkpoint_has_the_prototypes_of_its_own_weights(runner, tmp_path):
    runner.train()
    first, last = (
        torch.load(tmp_path / f'iter_{i}.pth', map_location='cpu', weights_only=False)
        for i in (1, 2)
    )
    assert first['state_dict']['domain_features.concentration'] == 0, 'features still move'
    assert last['state_dict']['domain_features.concentration'] > 0
    # EMA: what is tested stands in state_dict, the trained weights in ema_state_dict. Each has the
    # prototypes that measuring these weights gives.
    dataset = prototype_dataset(runner.cfg)
    assert dataset.domain_sizes == dict(ink=12, heat=5, blue=3), 'training images'
    names = [step.__class__.__name__ for step in dataset.datasets['ink'].pipeline.transforms]
    assert 'RandomFlip' not in names, 'through the test pipeline'
    states = {'averaged': last['state_dict'], 'trained': last['ema_state_dict']}
    found = {}
    for key, state in states.items():
        state = {name.removeprefix('module.'): value for name, value in state.items()}
        model = runner.model
        model.load_state_dict({k: v for k, v in state.items() if k != 'steps'})
        kept = model.domain_features.mean.clone()
        assert measure_prototypes(model, dataset, 4, 3) == dict(ink=4, heat=4, blue=3)
        torch.testing.assert_close(model.domain_features.mean, kept, rtol=0, atol=1e-6)
        found[key] = kept
    assert not torch.equal(found['averaged'], found['trained'])


def test_prototypes_are_those_a_plan_would_have_of_these_features(runner):
    model, dataset = runner.model, prototype_dataset(runner.cfg)
    assert model.train().training
    measure_prototypes(model, dataset, max_images=100, batch_size=5)
    assert model.training, 'put back into the mode it had'
    model.eval()
    rows, index = {}, 0
    for name, size in dataset.domain_sizes.items():
        rows[name] = []
        for _ in range(size):
            data = model.data_preprocessor(
                {key: [value] for key, value in dataset[index].items()}, False
            )
            features = model.pooled_features(data['inputs'], data['data_samples'])
            rows[name].append(features[0].numpy())
            index += 1
    expected = dataset_prototypes({k: np.stack(v) for k, v in rows.items()}, {})
    means, concentration = model.domain_features.prototypes()
    assert list(means) == ['ink', 'heat', 'blue']
    for name, mean in means.items():
        np.testing.assert_allclose(mean.numpy(), expected['mean'][name], atol=1e-5)
        assert float(mean.norm()) == pytest.approx(1, abs=1e-5)
    assert concentration == pytest.approx(expected['concentration'], rel=1e-3)


def test_a_model_without_features_is_refused(runner):
    runner.model.domain_features = None
    with pytest.raises(ValueError, match='has no domain_features'):
        measure_prototypes(runner.model, None)
    with pytest.raises(ValueError, match=r'train_dataloader\.dataset is no MultiDomainDataset'):
        prototype_dataset({'train_dataloader': {'dataset': {'type': 'CocoDataset'}}})
