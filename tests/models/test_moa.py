"""MoA in mmpretrain's ViT: configs, what trains, checkpoints of adapters alone, merging."""

from __future__ import annotations

import copy
import functools
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('mmpretrain')

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

import mmdet_moe  # noqa: F401 - lets configs name mmdet_moe::
from mmdet_moe.moe import AdapterLayer, adapter_layers, count_parameters, merged_state_dict

CONFIGS = Path(__file__).parents[2] / 'configs/dg'
TOOLS = Path(__file__).parents[2] / 'tools/model_converters'
KINDS = ('full', 'lora', 'kadaptation', 'lora-moa', 'kadaptation-moa')
SMALL = dict(embed_dims=128, num_layers=4, num_heads=4, feedforward_channels=64)


pytestmark = pytest.mark.usefixtures('mmpretrain_scope')


@functools.cache
def _read(name: str) -> Config:
    return Config.fromfile(CONFIGS / f'{name}.py', format_python_code=False)


def small(kind: str) -> Config:
    """The config with a ViT of 4 blocks, as it is initialised."""
    cfg = copy.deepcopy(_read(f'vit-b16-clip_{kind}'))
    cfg.model.backbone.update(arch=SMALL, img_size=32, init_cfg=None)
    cfg.model.head.update(
        num_classes=6, in_channels=128, init_cfg=dict(type='TruncNormal', layer='Linear', std=0.2)
    )
    return cfg


def build(cfg: Config, seed: int = 0):
    torch.manual_seed(seed)
    model = MODELS.build(cfg.model)
    torch.manual_seed(seed)
    model.init_weights()
    return model


def batch_of(size: int = 4):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (size, 3, 32, 32), generator=generator).byte()
    samples = []
    for i in range(size):
        sample = DataSample().set_gt_label(i % 6)
        sample.set_metainfo(dict(domain=f'style{i % 2}', img_shape=(32, 32)))
        samples.append(sample)
    return dict(inputs=list(images), data_samples=samples)


def train(model, cfg, steps=2):
    model.train()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    for _ in range(steps):  # adapters' first factors get no gradient while the second are zero
        log = model.train_step(batch_of(), optim_wrapper)
        assert all(torch.isfinite(torch.as_tensor(value)).all() for value in log.values())
    return log


def features(model):
    model.eval()
    with torch.no_grad():
        return torch.stack([sample.pred_score for sample in model.test_step(batch_of())])


@pytest.mark.parametrize('kind', KINDS)
def test_a_config_trains_what_it_should_and_nothing_else(kind):
    cfg = small(kind)
    model = build(cfg)
    before = {key: value.clone() for key, value in model.named_parameters()}
    log = train(model, cfg)
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    layers = adapter_layers(model)
    assert {'head.layers.head.weight', 'head.layers.head.bias'} <= moved
    if kind == 'full':
        assert not layers and len(moved) > 40
        return
    assert list(layers) == ['backbone.layers.0.attn.qkv', 'backbone.layers.2.attn.qkv']
    others = {key for key in moved if not key.startswith((*layers, 'head.'))}
    assert not others
    assert not any(key.endswith('base.weight') for key in moved)
    assert any(key.endswith('base.bias') for key in moved) is kind.startswith('kadaptation')
    assert any('.experts.' in key for key in moved)
    assert any('.router.' in key for key in moved) is kind.endswith('moa')
    assert ('loss_moe_importance' in log and 'loss_moe_load' in log) is kind.endswith('moa')
    assert model.training and count_parameters(model).others == 6 * 128 + 6


@functools.cache
def pretrained():
    return features(build(small('full')))


@pytest.mark.parametrize('kind', KINDS[1:])
def test_step_0_is_the_pretrained_model_bit_for_bit(kind):
    assert torch.equal(features(build(small(kind))), pretrained())


@pytest.mark.parametrize('kind', ['lora-moa', 'kadaptation-moa'])
def test_vit_b_trains_as_many_parameters_as_published(kind):
    """1.46 M and 1.49 M: adapters, the u and v and the biases that train with KAdaptation, routers;
    without the head. tests/moe/test_adapters.py has the arithmetic."""
    cfg = copy.deepcopy(_read(f'vit-b16-clip_{kind}'))
    with torch.device('meta'):
        counts = count_parameters(MODELS.build(cfg.model))
    assert counts.others == 768 * 7 + 7  # the head for PACS
    published = {'lora-moa': 1.46, 'kadaptation-moa': 1.49}[kind]
    assert round((counts.adapters + counts.routers) / 1e6, 2) == published
    assert round(0.79, 2) <= 6 * 768 * 256 / (counts.adapters + counts.routers) < 0.81
    assert '1,4' in str(counts) and 'parameters train' in str(counts)


def test_the_counts_are_in_the_log(monkeypatch):
    said = []
    monkeypatch.setattr('mmdet_moe.models.moe_mixin.print_log', lambda text, **_: said.append(text))
    model = build(small('lora-moa'))
    assert said == [str(count_parameters(model))]


@pytest.mark.parametrize('kind', KINDS[1:])
def test_a_dense_checkpoint_loads_into_a_model_with_adapters(kind, tmp_path):
    from mmengine.runner import load_checkpoint

    from mmdet_moe.models.checkpoint import fit_checkpoint

    dense, model = build(small('full'), seed=3), build(small(kind))
    torch.save(dict(state_dict=dense.state_dict()), tmp_path / 'dense.pth')
    load_checkpoint(model, str(tmp_path / 'dense.pth'), strict=True)
    assert torch.equal(features(model), features(dense))
    fitted, report = fit_checkpoint(model, dense.state_dict())
    assert (
        report.upcycled == list(adapter_layers(model))
        and fitted.keys() == dense.state_dict().keys()
    )


@pytest.mark.parametrize('kind', ['lora', 'kadaptation'])
def test_a_single_adapter_merges_into_mmpretrains_own_classifier(kind):
    cfg = small(kind)
    model = build(cfg)
    train(model, cfg, steps=3)
    stock_cfg = copy.deepcopy(small('full').model)
    stock_cfg.type = 'ImageClassifier'
    stock = MODELS.build(stock_cfg)
    stock.load_state_dict(merged_state_dict(model))  # strictly
    torch.testing.assert_close(features(stock), features(model), rtol=1e-6, atol=1e-6)


def test_freeze_others_names_what_matches_nothing():
    cfg = small('lora')
    cfg.model.freeze_others = dict(train=[r'neck\..*'])
    with pytest.raises(ValueError, match=r"no parameter is called 'neck"):
        build(cfg)
    cfg.model.freeze_others = dict(head=True)
    with pytest.raises(ValueError, match='must be a bool or dict'):
        build(cfg)


def test_an_ema_copy_keeps_one_pair_of_kronecker_factors():
    from mmengine.model import ExponentialMovingAverage

    model = build(small('kadaptation-moa'))
    average = ExponentialMovingAverage(model)
    twin = average.module
    experts = [
        e for layer in twin.modules() if isinstance(layer, AdapterLayer) for e in layer.experts
    ]
    owner = twin.get_submodule('backbone.layers.0.attn.qkv').kronecker
    assert len(experts) == 8 and all(expert.kronecker is owner for expert in experts)
    average.update_parameters(model)


# Checkpoints and tools, by the Runner


@pytest.fixture
def emoji(tmp_path, monkeypatch):
    """A folder of style/class/concept.png, as the configs read it, and runners without words: the
    description of the machine and the config's pretty print take seconds of each."""
    import cv2
    import numpy as np
    from mmengine.runner import Runner

    monkeypatch.setattr(Runner, '_log_env', lambda self, env_cfg: None)
    plain = property(lambda cfg: ''.join(f'{k} = {v!r}\n' for k, v in cfg.to_dict().items()))
    monkeypatch.setattr(Config, 'pretty_text', plain)

    rng = np.random.default_rng(0)
    for style in ('noto', 'openmoji'):
        for label in ('faces', 'flags', 'food', 'nature', 'objects', 'travel'):
            folder = tmp_path / 'emoji' / style / label
            folder.mkdir(parents=True)
            for concept in range(4):
                image = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                cv2.imwrite(str(folder / f'{label}{concept}.png'), image)
    monkeypatch.setenv('EMOJI_DG', f'{tmp_path}/emoji/')
    return tmp_path


def config_file(folder: Path, kind: str, **changes) -> Config:
    """The small config of one epoch as a file, on the images of ``folder``."""
    cfg = Config.fromfile(CONFIGS / f'vit-b16-clip_{kind}.py', format_python_code=False)
    cfg.model = small(kind).model
    data = Config.fromfile(CONFIGS.parent / '_base_/datasets/emoji.py', format_python_code=False)
    for part in ('train', 'val', 'test'):
        cfg[f'{part}_dataloader'] = dict(data[f'{part}_dataloader'], batch_size=16)
        cfg[f'{part}_evaluator'] = data.get(f'{part}_evaluator')
    cfg.train_cfg = dict(by_epoch=True, max_epochs=1)
    cfg.custom_hooks = [x for x in cfg.custom_hooks if x.type != 'mmdet_moe.DGRecordHook']
    cfg.work_dir = str(folder / f'work_{kind}')
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=1)
    cfg.merge_from_dict(changes)
    return cfg


def test_checkpoints_of_adapters_alone_load_resume_and_know_their_base(emoji):
    from mmengine.runner import Runner

    dense = build(small('full'), seed=5)
    torch.save(dict(state_dict=dense.state_dict()), emoji / 'dense.pth')
    base = str(emoji / 'dense.pth')
    cfg = config_file(emoji, 'lora-moa')
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=base, prefix='backbone.')
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.train()
    saved = torch.load(Path(cfg.work_dir) / 'epoch_1.pth', weights_only=False)
    keys = saved['state_dict'].keys()
    assert not any('base.weight' in key or 'ffn' in key for key in keys)
    assert any('experts.3.B' in key for key in keys) and 'head.layers.head.weight' in keys
    trained = features(runner.model)

    # It is a checkpoint like any other: to test from, where mmengine does not look at init_cfg,
    # and to resume from; then the base may also be told to the hook.
    for resume in (False, True):
        again = copy.deepcopy(cfg)
        again.load_from, again.resume = str(Path(cfg.work_dir) / 'epoch_1.pth'), resume
        if resume:
            again.model.backbone.init_cfg = None
            again.custom_hooks[-1]['base'] = base
        other = Runner.from_cfg(again)
        other.call_hook('before_run')
        if resume:
            other._init_model_weights()
            other.optim_wrapper = other.build_optim_wrapper(other.optim_wrapper)
        other.load_or_resume()
        assert torch.equal(features(other.model), trained)
    # On another pretrained model it is refused.
    torch.save(dict(state_dict=build(small('full'), seed=6).state_dict()), emoji / 'dense.pth')
    again.resume = False
    other = Runner.from_cfg(again)
    with pytest.raises(ValueError, match='trained on another pretrained model'):
        other.load_or_resume()


@pytest.mark.parametrize('kind', ['full', 'lora'])
def test_the_hook_refuses_what_it_cannot_do(kind, emoji):
    from mmengine.runner import Runner

    hooks = [dict(type='mmdet_moe.AdapterCheckpointHook')]
    hooks += [dict(type='EMAHook')] if kind == 'lora' else []
    runner = Runner.from_cfg(config_file(emoji, kind, custom_hooks=hooks))
    message = {'full': 'has no adapters', 'lora': 'an EMAHook saves'}[kind]
    with pytest.raises(ValueError, match=message):
        runner.call_hook('before_run')


def run_tool(monkeypatch, name, *args):
    monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(TOOLS / f'{name}.py'), run_name='__main__')
    return caught.value.code


def test_the_tools_extract_and_merge(emoji, monkeypatch, capsys):
    cfg = config_file(emoji, 'kadaptation')
    cfg.dump(emoji / 'config.py')
    model = build(cfg)
    dense = {key: value.clone() for key, value in build(small('full')).state_dict().items()}
    torch.save(dict(state_dict=dense), emoji / 'dense.pth')
    train(model, cfg, steps=3)
    torch.save(dict(state_dict=model.state_dict()), emoji / 'whole.pth')
    paths = (emoji / 'config.py', emoji / 'whole.pth', emoji / 'adapters.pth')
    assert run_tool(monkeypatch, 'extract_adapters', *paths) == 0
    saved = torch.load(emoji / 'adapters.pth', weights_only=True)
    assert sum(v.numel() for v in saved['state_dict'].values()) == count_parameters(model).trainable

    base = ('--base', emoji / 'dense.pth')
    for source, more in ((emoji / 'whole.pth', ()), (emoji / 'adapters.pth', base)):
        out = emoji / 'merged.pth'
        assert run_tool(monkeypatch, 'merge_adapters', paths[0], source, out, *more) == 0
        stock = MODELS.build(dict(small('full').model, type='ImageClassifier'))
        stock.load_state_dict(torch.load(out, weights_only=True)['state_dict'])
        torch.testing.assert_close(features(stock), features(model), rtol=1e-6, atol=1e-6)
    capsys.readouterr()
    # The wrong base, and a mixture.
    dense['backbone.ln1.weight'] += 1
    torch.save(dict(state_dict=dense), emoji / 'dense.pth')
    args = (paths[0], emoji / 'adapters.pth', emoji / 'none.pth', *base)
    assert run_tool(monkeypatch, 'merge_adapters', *args) == 2
    assert 'another pretrained model' in capsys.readouterr().err
    mixture = config_file(emoji, 'lora-moa')
    mixture.dump(emoji / 'mixture.py')
    torch.save(dict(state_dict=build(mixture).state_dict()), emoji / 'mixture.pth')
    args = (emoji / 'mixture.py', emoji / 'mixture.pth', emoji / 'none.pth')
    assert run_tool(monkeypatch, 'merge_adapters', *args) == 2
    assert 'cannot be merged' in capsys.readouterr().err
    assert not (emoji / 'none.pth').exists()


# The small ViT of the emoji experiments


@pytest.mark.parametrize('kind', KINDS[1:])
def test_an_emoji_config_trains_adapters_and_head_beside_a_frozen_stem(kind):
    cfg = copy.deepcopy(_read(f'vit_effnet-lite0_{kind}_emoji'))
    assert cfg.load_from.endswith('vit_effnet-lite0_dense_emoji/iter_200.pth')
    cfg.model.backbone.stem.init_cfg = None
    cfg.model.head.init_cfg = dict(type='TruncNormal', layer='Linear', std=0.2)
    model = build(cfg)
    before = copy.deepcopy(model.state_dict())
    train(model, cfg)
    moved = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    layers = [f'backbone.layers.{i}.attn.qkv' for i in (0, 2, 4)]
    assert list(adapter_layers(model)) == layers
    assert all(key.startswith((*layers, 'head.')) for key in moved)
    assert all(any(key.startswith(f'{name}.experts') for key in moved) for name in layers)
