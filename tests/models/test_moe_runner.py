"""MoE detectors under mmengine's Runner and mmdet's inference API, on files."""

from __future__ import annotations

import logging
import runpy
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from tiny_models import retinanet_cfg

from mmdet_moe.models.checkpoint import CheckpointError
from mmdet_moe.models.inferencer import MultiDomainInferencer
from mmdet_moe.planning import ExpertPlan
from mmdet_moe.structures import LabelSpace

TARGETS = [r'bbox_head\.(cls|reg)_convs\.\d', r'backbone\.layer4']


@pytest.fixture
def config(tmp_path, tiny_dataset, tiny_domains, tiny_label_space):
    """Config of a run on the tiny domains: ``config(name, moe=True, **changes)``."""
    plan = tmp_path / 'plan.json'
    ExpertPlan.from_assignment({'ink': 'e0', 'heat': 'e1', 'blue': 'e1'}).save(plan)

    def make(name, moe=True, label_space=tiny_label_space, iters=2, **changes):
        model = retinanet_cfg(label_space=label_space)
        if moe:
            model['plan'] = str(plan)
            model['moe'] = [dict(targets=TARGETS, router=dict(type='PlanRouter'))]

        def loader(split, sampler):
            dataset = tiny_dataset(split, label_space=label_space)
            dataset['domains'] = {
                key: value
                for key, value in dataset['domains'].items()
                if key in label_space['domains']
            }
            return dict(
                batch_size=2,
                num_workers=0,
                persistent_workers=False,
                sampler=sampler,
                dataset=dataset,
            )

        def metric(domain):
            ann_file = f'{tiny_domains}/{domain}/val.json'
            return [dict(type='CocoMetric', ann_file=ann_file, metric='bbox')]

        evaluator = dict(
            type='MultiDomainEvaluator',
            label_space=label_space,
            metrics={domain: metric(domain) for domain in label_space['domains']},
        )
        return Config(
            dict(
                default_scope='mmdet_moe',
                work_dir=str(tmp_path / name),
                experiment_name=f'{tmp_path.name}_{name}',
                model=model,
                train_dataloader=loader('train', dict(type='MultiDomainSampler', seed=0)),
                train_cfg=dict(type='IterBasedTrainLoop', max_iters=iters, val_interval=100),
                optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
                val_dataloader=loader('val', dict(type='DefaultSampler', shuffle=False)),
                val_cfg=dict(type='ValLoop'),
                val_evaluator=evaluator,
                test_dataloader=loader('val', dict(type='DefaultSampler', shuffle=False)),
                test_cfg=dict(type='TestLoop'),
                test_evaluator=evaluator,
                default_hooks=dict(
                    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1),
                    logger=dict(type='LoggerHook', interval=1),
                ),
                custom_hooks=[dict(type='UpcycleHook')],
                visualizer=dict(
                    type='DetLocalVisualizer', vis_backends=[], name=f'{tmp_path.name}_{name}'
                ),
                log_level='WARNING',
                randomness=dict(seed=0),
                **changes,
            )
        )

    return make


@pytest.fixture(autouse=True)
def cheap_runner(monkeypatch):
    """A Runner spends most of its time on reporting compilers and formatting the config."""
    monkeypatch.setattr(Runner, '_log_env', lambda *args: None)
    monkeypatch.setattr(Runner, 'dump_config', lambda *args: None)
    monkeypatch.setattr(Config, 'pretty_text', property(lambda self: repr(self._cfg_dict)))


def train(cfg):
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def test_moe_detector_trains_validates_and_resumes(config, tmp_path):
    runner = train(config('first', iters=2))
    metrics = runner.val_loop.run()
    assert {'ink/coco/bbox_mAP', 'blue/coco/bbox_mAP', 'macro/coco/bbox_mAP'} <= set(metrics)
    straight = train(config('straight', iters=3)).model.state_dict()
    cfg = config('first', iters=3, resume=True, load_from=str(tmp_path / 'first/iter_2.pth'))
    resumed = train(cfg).model.state_dict()
    for key, value in straight.items():
        torch.testing.assert_close(resumed[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_subnet_experts_start_from_a_trained_retinanet(config, tmp_path):
    # Trained with the classes in another order: rows go by name.
    other = dict(domains=dict(blue=['bolt'], ink=['cow', 'dog', 'cat'], heat=['cat', 'car']))
    trained = train(config('dense', moe=False, label_space=other, iters=1)).model.state_dict()
    cfg = config('subnets', moe=False, iters=1, load_from=str(tmp_path / 'dense/iter_1.pth'))
    cfg.model.bbox_head.type = 'MoERetinaHead'
    router = dict(type='TopKRouter', k=2)
    cfg.model.moe = [dict(targets=r'bbox_head\.(cls|reg)_subnet', num_experts=3, router=router)]
    runner = Runner.from_cfg(cfg)
    runner.load_or_resume()
    space, theirs = runner.model.label_space, LabelSpace.from_config(other)
    rows = [theirs.unified_id(name) for name in space.classes]
    for name, layer in runner.model.bbox_head.named_children():
        for expert in getattr(layer, 'experts', []):
            weight = trained[f'bbox_head.{name[:3]}_convs.0.conv.weight']
            assert torch.equal(expert.convs[0].conv.weight, weight)
            weight = trained[f'bbox_head.retina_{name[:3]}.weight']
            if name == 'cls_subnet':
                weight = weight.unflatten(0, (-1, theirs.num_classes))[:, rows].flatten(0, 1)
            assert torch.equal(expert.output.weight, weight)
    runner.train()
    assert runner.iter == 1


def test_load_from_a_dense_checkpoint_with_other_classes(config, tmp_path, caplog):
    # Only 'cat' and 'bolt' are classes of both.
    other = dict(domains=dict(ink=['cat', 'dog', 'cow'], blue=['bolt']))
    dense = train(config('dense', moe=False, label_space=other, iters=1)).model
    changes = dict(
        load_from=str(tmp_path / 'dense/iter_1.pth'),
        custom_hooks=[
            dict(type='UpcycleHook'),
            dict(type='EMAHook', ema_type='ExponentialMovingAverage'),
        ],
    )
    cfg = config('moe', iters=1)
    cfg.merge_from_dict(changes)
    runner = Runner.from_cfg(cfg)
    runner.call_hook('before_run')
    runner.logger.setLevel(logging.INFO)
    runner._init_model_weights()
    runner.load_or_resume()
    model = runner.model
    space = model.label_space
    assert space.classes == ('cat', 'dog', 'cow', 'car', 'bolt')
    weight = model.bbox_head.retina_cls.weight.unflatten(0, (-1, 5))
    theirs = dense.bbox_head.retina_cls.weight.unflatten(0, (-1, 4))
    for i, name in enumerate(space.classes):
        if name != 'car':
            assert torch.equal(weight[:, i], theirs[:, dense.label_space.unified_id(name)]), name
    for layer in model.moe_layers().values():
        for expert in layer.experts:
            for key, value in expert.named_parameters():
                assert torch.equal(value, dense.state_dict()[f'{layer.name}.{key}'])
    (ema,) = [hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook']
    for key, value in model.state_dict().items():
        assert torch.equal(ema.ema_model.module.state_dict()[key], value), key


def test_load_from_a_checkpoint_of_another_shape_is_an_error(config, tmp_path):
    cfg = config('wide', moe=False, iters=1)
    cfg.model.bbox_head.feat_channels = 8
    train(cfg)
    cfg = config('narrow', load_from=str(tmp_path / 'wide/iter_1.pth'))
    with pytest.raises(CheckpointError, match=r'reg_convs\.0\.conv\.weight'):
        train(cfg)


def test_experts_start_from_models_of_single_datasets(config, tmp_path):
    sources = {}
    for domain, classes in dict(ink=['cat', 'dog', 'cow'], heat=['car', 'cat']).items():
        cfg = config(domain, moe=False, label_space=dict(domains={domain: classes}), iters=1)
        cfg.randomness.seed = len(domain)
        sources[domain] = train(cfg).model
    hook = dict(
        type='UpcycleHook',
        experts={domain: str(tmp_path / domain / 'iter_1.pth') for domain in sources},
    )
    cfg = config('moe', iters=1)
    cfg.custom_hooks = [hook]
    runner = Runner.from_cfg(cfg)
    runner._init_model_weights()
    runner.call_hook('before_train')
    model = runner.model
    for domain, expert in (('ink', 0), ('heat', 1)):
        dense = sources[domain].state_dict()
        for layer in model.moe_layers().values():
            for key, value in layer.experts[expert].named_parameters():
                assert torch.equal(value, dense[f'{layer.name}.{key}'])
    bias = model.bbox_head.retina_cls.bias.unflatten(0, (-1, 5))
    # 'cat' is a class of both; the later checkpoint has it.
    heat = sources['heat'].bbox_head.retina_cls.bias.unflatten(0, (-1, 2))
    ink = sources['ink'].bbox_head.retina_cls.bias.unflatten(0, (-1, 3))
    space = model.label_space
    for name, expected in dict(cat=heat[:, 1], car=heat[:, 0], dog=ink[:, 1]).items():
        assert torch.equal(bias[:, space.unified_id(name)], expected), name


def test_inference_api_takes_a_domain(config, tmp_path, tiny_domains, tiny_label_space):
    from mmdet.apis import DetInferencer, inference_detector, init_detector

    cfg = config('run', iters=1)
    train(cfg)
    path, weights = tmp_path / 'config.py', str(tmp_path / 'run/iter_1.pth')
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.pipeline = [
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(64, 48), keep_ratio=True),
            dict(type='PackDetInputs'),
        ]
    cfg.custom_imports = dict(
        imports=['mmdet_moe.models', 'mmdet_moe.datasets'], allow_failed_imports=False
    )
    path.write_text('\n'.join(f'{key} = {value!r}' for key, value in cfg.to_dict().items()))
    image = str(tiny_domains / 'heat/val/1.png')
    space = LabelSpace.from_config(tiny_label_space)

    def only(result, domain):
        labels = getattr(result, 'pred_instances', result)
        labels = labels['labels']
        labels = labels.tolist() if isinstance(labels, torch.Tensor) else labels
        assert labels and set(labels) <= set(space.unified_ids(domain))

    # mmdet's functions, with the domain in the config or set at any time.
    model = init_detector(str(path), weights, device='cpu', cfg_options={'model.domain': 'heat'})
    assert tuple(model.dataset_meta['classes']) == space.classes
    only(inference_detector(model, image), 'heat')
    model.domain = 'ink'
    only(inference_detector(model, image), 'ink')
    # or in the pipeline
    model.domain = None
    from mmcv.transforms import Compose

    pipeline = [*cfg.test_dataloader.dataset.pipeline, dict(type='SetDomain', domain='blue')]
    only(inference_detector(model, image, test_pipeline=Compose(pipeline)), 'blue')

    # The inferencer behind mmdet's image demo, which draws.
    inferencer = MultiDomainInferencer(
        str(path), weights, device='cpu', domain='heat', show_progress=False
    )
    only(inferencer(image)['predictions'][0], 'heat')
    out = inferencer(image, domain='ink', out_dir=str(tmp_path / 'out'), pred_score_thr=0.0)
    only(out['predictions'][0], 'ink')
    assert (tmp_path / 'out/vis/1.png').is_file()
    assert inferencer.model.domain == 'heat'
    # The tool is the same with a command line.
    tool = runpy.run_path(str(Path(__file__).parents[2] / 'tools/image_demo.py'))
    out_dir = tmp_path / 'demo'
    arguments = [image, str(path), '--weights', weights, '--domain', 'ink', '--device', 'cpu']
    assert tool['main']([*arguments, '--out-dir', str(out_dir)]) == 0
    assert (out_dir / 'vis/1.png').is_file() and (out_dir / 'preds/1.json').is_file()
    # mmdet's own class works too, in our scope.
    plain = DetInferencer(str(path), weights, device='cpu', scope='mmdet_moe', show_progress=False)
    plain.model.domain = 'blue'
    only(plain(image)['predictions'][0], 'blue')
    # Last, because mmdet then keeps loading arrays.
    model.domain = 'heat'
    only(inference_detector(model, np.asarray(mmcv.imread(image))), 'heat')
    with pytest.raises(ValueError, match="unknown domain 'moon'"):
        inferencer(image, domain='moon')


def test_ema_hook_keeps_an_average_that_validates(config):
    cfg = config('ema', iters=3)
    cfg.custom_hooks = [dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.5)]
    runner = train(cfg)
    (hook,) = [hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook']
    live, average = runner.model, hook.ema_model.module
    # A copy of its own, with a routing state of its own that its layers share.
    assert average.routing_state is not live.routing_state
    assert all(m.state is average.routing_state for m in average.moe_layers().values())
    weights = dict(live.named_parameters())
    apart = [key for key, value in average.named_parameters() if not value.equal(weights[key])]
    assert any('.experts.' in key for key in apart)
    metrics = runner.val_loop.run()
    assert 0 <= metrics['macro/coco/bbox_mAP'] <= 1
