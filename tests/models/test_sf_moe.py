"""SF-MoE and GMoE in a whole ViT, against the formulas written out here in float64; their configs.

Letters: B images, N tokens of an image, T = B · N tokens, E experts, d channels.
"""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip('mmpretrain')

from mmengine.config import Config, ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.runner import autocast
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from mmpretrain.structures import DataSample

import mmdet_moe.models  # noqa: F401 - registers the models
from mmdet_moe.registry import MODELS

ROOT = Path(__file__).parents[2] / 'configs'
VIT_MOE = Config.fromfile(ROOT / '_base_/vit_moe.py')
FAMILIES = ('vit-s16_*', 'vit-r26-s32_*', 'vit_effnet-lite0_*moe-e6*', 'vit_effnet-lite0_dense_*')
NAMES = sorted(path.stem for family in FAMILIES for path in (ROOT / 'dg').glob(f'{family}.py'))
E, D, HEADS, DEPTH, CLASSES = 3, 16, 2, 4, 5
SIDE = 32  # of the images of the shipped configs, here


pytestmark = pytest.mark.usefixtures('mmpretrain_scope')


def spec_of(kind, **router):
    """A spec of the shipped configs with fewer experts."""
    spec = copy.deepcopy(VIT_MOE[kind.removesuffix('_k2')].to_dict())
    if kind.endswith('_k2'):
        spec['router'] = dict(type='CosineRouter', k=2)
    spec['router'].update(router)
    return dict(spec, num_experts=E)


def build(moe=(), *, backbone=None, seed=0, **model):
    """A ViT of 4 blocks on 4 x 4 patches of 4 pixels and the class token: N = 17."""
    cfg = dict(
        type='mmdet_moe.MoEImageClassifier',
        backbone=dict(
            type='VisionTransformer',
            arch=dict(embed_dims=D, num_layers=DEPTH, num_heads=HEADS, feedforward_channels=24),
            img_size=16,
            patch_size=4,
            **(backbone or {}),
        ),
        head=dict(type='VisionTransformerClsHead', num_classes=CLASSES, in_channels=D),
        moe=list(moe),
        **model,
    )
    torch.manual_seed(seed)
    built = MODELS.build(ConfigDict(cfg))
    torch.manual_seed(seed)
    built.init_weights()
    return built


def stirred(model, size=0.3):
    """Every parameter off its start: experts differ, routers are sure, the head is not zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p += size * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def batch(dtype=torch.float64, size=3):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images.to(dtype), [DataSample().set_gt_label(i % CLASSES) for i in range(size)]


def total(losses):
    return sum(value for key, value in losses.items() if 'loss' in key)


# The formulas


class Reference:
    """The same network from its tensors: ``weights`` are leaves by their name in the model."""

    def __init__(self, model, kind, training, draws):
        self.w = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
        self.kind, self.training, self.draws = kind, training, list(draws)
        self.sparse = {name.rpartition('.')[0] for name in model.moe_names}
        self.router_options = dict(spec_of(kind)['router'])
        self.aux, self.dropped = 0.0, 0

    def layer_norm(self, x, name):
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return normed * self.w[f'{name}.weight'] + self.w[f'{name}.bias']

    def linear(self, x, name):
        return x @ self.w[f'{name}.weight'].T + self.w[f'{name}.bias']

    def attention(self, x, name):
        batch, n, d = x.shape
        q, k, v = self.linear(x, f'{name}.qkv').chunk(3, -1)
        heads = []
        for h in range(HEADS):
            part = slice(h * d // HEADS, (h + 1) * d // HEADS)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(d / HEADS)
            heads.append(scores.softmax(-1) @ v[..., part])
        return self.linear(torch.cat(heads, -1), f'{name}.proj')

    def ffn(self, x, name):
        hidden = self.linear(x, f'{name}.layers.0.0')
        gelu = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        return self.linear(gelu, f'{name}.layers.1')

    def expert(self, x, name, e):
        return self.ffn(x, f'{name}.experts.{e}')

    def sf_moe(self, x, name):
        """v2's gate, image by image and token by token."""
        n = x.shape[1]
        factor = 1.25 if self.training else 2.0
        capacity = max(min(n, math.floor(n * factor / E)), 4)
        draws = self.draws.pop(0).view(x.shape[0], n, 2) if self.training else None
        outs, aux = [], 0.0
        for b, image in enumerate(x):
            p = (image @ self.w[f'{name}.router.gate'].T).softmax(-1)
            best = p.argsort(dim=1, descending=True)[:, :2].tolist()
            top1 = [sum(e == first for first, _ in best) / n for e in range(E)]
            aux = aux + sum(p[:, e].mean() * top1[e] for e in range(E)) / E
            queue = []
            for choice in (0, 1):
                for t in range(n):
                    e = best[t][choice]
                    g = p[t, e] / (p[t, best[t][0]] + p[t, best[t][1]] + 1e-9)
                    if choice and self.training and not draws[b, t, 1] < min(1, g.item() / 0.2):
                        continue
                    queue.append((t, e, g))
            rows, taken = [0.0] * n, [0] * E
            for t, e, g in queue:
                taken[e] += 1
                if taken[e] > capacity:
                    self.dropped += 1
                else:
                    rows[t] = rows[t] + g * self.expert(image[t], name, e)
            outs.append(torch.stack([torch.zeros_like(image[0]) + row for row in rows]))
        self.aux = self.aux + 0.01 * E**2 * aux / len(x)
        return torch.stack(outs)

    def gmoe(self, x, name):
        """The cosine router on all tokens of the batch."""
        options = self.router_options
        k, factor = options['k'], options.get('capacity_factor')
        tokens = x.reshape(-1, D)
        projected = self.linear(tokens, f'{name}.router.project')
        experts = self.w[f'{name}.router.expert_embeddings']
        cosine = (
            projected @ experts.T / (projected.norm(dim=1)[:, None] * experts.norm(dim=1)[None])
        )
        logits = self.w[f'{name}.router.temperature'].clamp(max=math.log(100)).exp() * cosine
        p = logits.softmax(1)
        noisy = logits + self.draws.pop(0) / E if self.training else logits
        order = noisy.argsort(dim=1, descending=True)[:, :k].tolist()
        gates = noisy.softmax(1)
        capacity = len(tokens) if factor is None else math.ceil(factor * len(tokens) * k / E)
        # Batch-prioritised: first choices of the largest probability first.
        firsts = [p[t, order[t][0]].item() for t in range(len(tokens))]
        line = (
            sorted(range(len(tokens)), key=lambda t: -firsts[t]) if factor else range(len(tokens))
        )
        rows, taken = [torch.zeros(D, dtype=x.dtype)] * len(tokens), [0] * E
        for choice in range(k):
            for t in line:
                e = order[t][choice]
                taken[e] += 1
                if taken[e] > capacity:
                    self.dropped += 1
                    continue
                weight = gates[t, e]
                if k > 1:
                    weight = weight / sum(gates[t, chosen] for chosen in order[t])
                elif options.get('renormalize') == 'detached':
                    weight = weight / weight.item()
                rows[t] = rows[t] + weight * self.expert(tokens[t], name, e)
        if self.training:
            threshold = noisy.sort(dim=1, descending=True).values[:, k - 1 : k]
            wins = 0.5 * (1 + torch.erf((logits - threshold) * E / math.sqrt(2)))
            for amount in (p.sum(0), wins.sum(0)):  # importance, load
                variance = (amount - amount.mean()).square().mean()
                self.aux = self.aux + 0.01 / 2 * variance / (amount.mean().square() + 1e-10)
        return torch.stack(rows).view_as(x)

    def __call__(self, images):
        size, side = images.shape[0], 4
        patches = images.view(size, 3, side, 4, side, 4).permute(0, 2, 4, 1, 3, 5)
        kernel = self.w['backbone.patch_embed.projection.weight'].reshape(D, -1)
        x = patches.reshape(size, side * side, -1) @ kernel.T
        x = x + self.w['backbone.patch_embed.projection.bias']
        x = torch.cat([self.w['backbone.cls_token'].expand(size, 1, D), x], 1)
        x = x + self.w['backbone.pos_embed']
        for i in range(DEPTH):
            name = f'backbone.layers.{i}'
            x = x + self.attention(self.layer_norm(x, f'{name}.ln1'), f'{name}.attn')
            z = self.layer_norm(x, f'{name}.ln2')
            if name not in self.sparse:
                x = x + self.ffn(z, f'{name}.ffn')
            elif self.kind == 'sf_moe':
                x = x + self.sf_moe(z, f'{name}.ffn')
            else:
                x = x + self.gmoe(z, f'{name}.ffn')
        return self.linear(self.layer_norm(x[:, 0], 'backbone.ln1'), 'head.layers.head')


def draws_for(kind, monkeypatch, layers=2, tokens=3 * 17):
    """The random numbers of both, in the order of the layers."""
    generator = torch.Generator().manual_seed(11)
    make, shape = (torch.rand, (tokens, 2)) if kind == 'sf_moe' else (torch.randn, (tokens, E))
    draws = [make(shape, generator=generator, dtype=torch.float64) for _ in range(layers)]
    given = iter(draws)
    name = 'rand_like' if kind == 'sf_moe' else 'randn_like'
    monkeypatch.setattr(torch, name, lambda like, **_: next(given).to(like))
    return draws


KINDS = {'sf_moe': '[SF]*2', 'gmoe': 'last_two', 'gmoe_published': [2, 4], 'gmoe_k2': 'SFSF'}


@pytest.mark.parametrize('kind', KINDS)
def test_loss_and_every_gradient_are_the_formulas(kind, monkeypatch):
    model = stirred(build([dict(blocks=KINDS[kind], **spec_of(kind))]).double()).train()
    draws = draws_for(kind, monkeypatch)
    images, samples = batch()
    losses = model(images, samples, mode='loss')
    total(losses).backward()

    reference = Reference(model, kind, True, draws)
    labels = torch.tensor([0, 1, 2])
    scores = reference(images)
    loss = -scores.log_softmax(1)[range(3), labels].mean()
    close = dict(rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(losses['loss'], loss, **close)
    auxiliary = sum(value for key, value in losses.items() if key.startswith('loss_moe_'))
    torch.testing.assert_close(auxiliary, reference.aux, **close)
    assert bool(reference.dropped) is (kind in ('sf_moe', 'gmoe_published'))
    (loss + reference.aux).backward()
    routers = 0
    for name, p in model.named_parameters():
        expected = reference.w[name].grad
        got = torch.zeros_like(p) if p.grad is None else p.grad
        expected = torch.zeros_like(p) if expected is None else expected
        torch.testing.assert_close(got, expected, **close, msg=lambda m, n=name: f'{n}: {m}')
        routers += '.router.' in name and bool(got.abs().sum() > 1e-8)
    assert routers == 2 * (1 if kind == 'sf_moe' else 4)


@pytest.mark.parametrize('kind', KINDS)
def test_evaluation_is_the_formulas(kind):
    model = stirred(build([dict(blocks=KINDS[kind], **spec_of(kind))]).double()).eval()
    images, _ = batch()
    with torch.no_grad():
        got, expected = model(images), Reference(model, kind, False, ())(images)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


# Step 0


@pytest.mark.parametrize('kind', ['gmoe', 'gmoe_k2'])
@pytest.mark.parametrize('training', [True, False])
def test_step_0_of_our_gmoe_is_the_dense_network(kind, training):
    dense, moe = build().double(), build([dict(blocks='last_two', **spec_of(kind))]).double()
    assert all(layer.keeps_dense_function for layer in moe.moe_layers().values())
    images, samples = batch()
    for model in (dense, moe):
        model.train(training)
    got, expected = (m.extract_feat(images)[0] for m in (moe, dense))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        moe(images, samples, mode='loss')['loss'], dense(images, samples, mode='loss')['loss']
    )


def test_step_0_of_sf_moe_is_the_dense_network_where_no_choice_is_dropped():
    roomy = dict(second='all', capacity_factor=E, test_capacity_factor=E)
    dense = build().double()
    moe = build([dict(blocks='[SF]*2', **spec_of('sf_moe', **roomy))]).double()
    images, _ = batch()
    for model in (dense, moe):
        model.train()
    got, expected = (m.extract_feat(images)[0] for m in (moe, dense))
    # The weights are g / (g1 + g2 + 1e-9), with g1 + g2 over 2/3.
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)
    counts = moe.routing_state.stats()['backbone.layers.0.ffn/count']
    assert counts.sum() == 3 * 17 * 2


def test_the_pretrained_ffn_is_in_every_expert(tmp_path):
    """By the backbone's init_cfg, as in configs/_base_/models/deit-small_dg.py."""
    dense = stirred(build())
    torch.save(dict(state_dict=dense.state_dict()), tmp_path / 'dense.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'dense.pth'), prefix='backbone.')
    model = build(
        [dict(blocks='SFFS', **spec_of('gmoe'))], backbone=dict(init_cfg=init_cfg), seed=1
    )
    for i in range(DEPTH):
        ffn = dense.backbone.layers[i].ffn.state_dict()
        mine = model.backbone.layers[i].ffn
        for copied in mine.experts if i in (0, 3) else [mine]:
            assert all(torch.equal(value, ffn[key]) for key, value in copied.state_dict().items())
    images, _ = batch(torch.float32)
    model.eval(), dense.eval()
    with torch.no_grad():
        got, expected = (m.extract_feat(images)[0] for m in (model, dense))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_published_gmoe_scales_the_ffn_by_its_probability():
    model = build([dict(blocks=[1], **spec_of('gmoe_published'))]).double().eval()
    layer = model.get_submodule('backbone.layers.0.ffn')
    assert not layer.keeps_dense_function
    x = torch.randn(1, 17, D, dtype=torch.float64)
    # One image of 17 tokens, capacity ceil(1.5 · 17 / 3) = 9.
    model.routing_state.begin(num_images=1)
    out = layer(x) - x
    p = layer.router.logits(x[0]).softmax(1).amax(1)
    assert bool((p < 0.5).all())  # a third at uniform use, a sixth with 6 experts
    whole = layer.experts[0](x)
    kept = out[0].abs().sum(1) > 0
    torch.testing.assert_close(out[0][kept], (p[:, None] * whole[0])[kept])


# The word in the config


@pytest.mark.parametrize(('blocks', 'layers'), [('[SF]*2', [0, 2]), ([4], [3])])
def test_blocks_name_the_ffns_of_any_vit(blocks, layers):
    spec = dict(blocks=blocks, **spec_of('gmoe'))
    for options in (
        {},
        dict(type='DistilledVisionTransformer'),
        dict(type='BEiTViT', use_abs_pos_emb=True, use_rel_pos_bias=False),
    ):
        backbone = dict(type='VisionTransformer', img_size=16, patch_size=4)
        backbone['arch'] = dict(
            embed_dims=D, num_layers=DEPTH, num_heads=HEADS, feedforward_channels=24
        )
        cfg = dict(type='mmdet_moe.MoEImageClassifier', backbone={**backbone, **options})
        model = MODELS.build(ConfigDict(dict(cfg, moe=[spec])))
        assert model.moe_names == [f'backbone.layers.{i}.ffn' for i in layers]


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        (dict(blocks='[SF]*6'), 'a pattern of 12 blocks, the model has 4'),
        (dict(blocks='last_two', targets='x'), "blocks='last_two' and targets='x': give one"),
    ],
)
def test_a_wrong_spec_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        build([dict(spec, **spec_of('gmoe'))])


def test_blocks_of_a_resnet_are_refused():
    cfg = dict(
        type='mmdet_moe.MoEImageClassifier',
        backbone=dict(type='ResNet', depth=18),
        moe=[dict(blocks='SF', **spec_of('gmoe'))],
    )
    with pytest.raises(ValueError, match="blocks='SF' is for a backbone .* a ResNet is none"):
        MODELS.build(ConfigDict(cfg))


# Drop path, precision, checkpointing


@pytest.mark.parametrize('kind', ['sf_moe', 'gmoe'])
def test_drop_path_drops_the_sum_of_an_image(kind):
    # The only draws are the drop path's.
    quiet = dict(second='all') if kind == 'sf_moe' else dict(noise=False)
    spec = dict(spec_of(kind, **quiet), blocks=[DEPTH], balance=[])
    model = build([spec], backbone=dict(drop_path_rate=0.5))
    layer = stirred(model.double()).get_submodule(f'backbone.layers.{DEPTH - 1}.ffn')
    assert layer.drop.drop_prob == 0.5
    x = torch.randn(8, 17, D, dtype=torch.float64)

    def branch(mode):
        model.routing_state.begin(num_images=8, training=mode)
        return layer.train(mode)(x) - x

    layer.router.test_capacity_factor = layer.router.capacity_factor
    whole = branch(False)
    torch.manual_seed(0)
    # floor(1/2 + u) for a u of each image, over the 1/2 that is kept.
    kept = (0.5 + torch.rand(8, 1, 1, dtype=torch.float64)).floor() / 0.5
    assert 0 < kept.count_nonzero() < 8
    torch.manual_seed(0)
    torch.testing.assert_close(branch(True), kept * whole)


@pytest.mark.parametrize('kind', KINDS)
def test_bfloat16_trains(kind):
    model = stirred(build([dict(blocks='SFSF', **spec_of(kind))]), 0.1).train()
    images, samples = batch(torch.float32)
    with autocast(device_type='cpu', dtype=torch.bfloat16):
        losses = model(images, samples, mode='loss')
    for key, value in losses.items():
        if key.startswith('loss_moe_'):
            assert value.dtype == torch.float32
    total(losses).backward()
    for name, p in model.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name
        if '.router.' in name:
            assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize('kind', KINDS)
def test_activation_checkpointing_repeats_everything(kind):
    """mmengine's, which is reentrant: routing, noise, drops and drop path twice the same."""
    grads = []
    for checkpointed in (False, True):
        spec = dict(blocks='FSFS', **spec_of(kind))
        model = stirred(build([spec], backbone=dict(drop_path_rate=0.3)).double()).train()
        if checkpointed:
            turn_on_activation_checkpointing(model, [f'backbone.layers.{i}' for i in range(DEPTH)])
        torch.manual_seed(3)
        losses = model(*batch(), mode='loss')
        total(losses).backward()
        grads.append({k: p.grad for k, p in model.named_parameters()})
    for name, plain in grads[0].items():
        again = grads[1][name]
        assert (plain is None) == (again is None), name
        if plain is not None:
            torch.testing.assert_close(again, plain, msg=lambda m, n=name: f'{n}: {m}')


# The shipped configs


def small(name):
    """A shipped config with the depth it has, and less of everything else."""
    cfg = Config.fromfile(ROOT / 'dg' / f'{name}.py', format_python_code=False)
    backbone = cfg.model.backbone
    depth = 6 if name.endswith('emoji') else 12
    backbone.arch = dict(embed_dims=D, num_layers=depth, num_heads=HEADS, feedforward_channels=24)
    backbone.img_size = SIDE
    backbone.init_cfg = None
    cfg.model.head.in_channels = D
    if 'stem' in backbone:
        backbone.stem.init_cfg = None  # its weights are tested elsewhere
    cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return cfg


#: The sparse blocks, the first is 1.
PUBLISHED = {
    'vit-s16_sf-moe-e6-v1': [3, 6, 9, 12],
    'vit-s16_sf-moe-e6-v2': [6, 12],
    'vit-s16_sf-moe-e6-paper': [1, 3, 5, 7, 9, 11],
    'vit-s16_gmoe-e6': [9, 11],
    'vit-s16_gmoe-e6-published': [9, 11],
    'vit-s16_gmoe-e6-k2': [9, 11],
    'vit-r26-s32_sf-moe-e6-v2': [6, 12],
}


@pytest.mark.parametrize('name', NAMES)
def test_a_config_trains(name):
    cfg = small(name)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (4, 3, SIDE, SIDE), generator=generator).byte()
    data = dict(inputs=list(images), data_samples=batch(size=4)[1])
    before = {key: value.clone() for key, value in model.named_parameters()}
    for _ in range(2):  # the first step does not pass the head, which starts as zero
        log = model.train_step(data, optim_wrapper)
        assert all(torch.isfinite(torch.as_tensor(value)).all() for value in log.values())
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert any('.stem.' in key for key in moved) is ('r26' in name)
    if name in PUBLISHED:
        assert model.moe_names == [f'backbone.layers.{i - 1}.ffn' for i in PUBLISHED[name]]
    for layer in model.moe_layers():
        assert model.get_submodule(layer).num_experts == 6
        assert any(key.startswith(f'{layer}.experts.') for key in moved)
        assert any(key.startswith(f'{layer}.router.') for key in moved)
    losses = {key for key in log if key.startswith('loss_moe_')}
    expected = {'sf-moe': {'switch'}, 'gmoe': {'importance', 'load'}}
    family = next((family for family in expected if family in name), None)
    assert losses == {f'loss_moe_{key}' for key in expected.get(family, ())}


def test_the_example_of_the_page_builds():
    page = (ROOT.parent / 'docs/domain_generalization.md').read_text()
    example = next(x for x in re.findall(r'```python\n(.*?)```', page, re.DOTALL) if 'blocks' in x)
    namespace = {}
    exec(compile(example, 'docs/domain_generalization.md', 'exec'), namespace)
    cfg = namespace['model']
    cfg['backbone']['arch'] = dict(
        embed_dims=D, num_layers=12, num_heads=HEADS, feedforward_channels=24
    )
    model = MODELS.build(ConfigDict(cfg))
    assert model.moe_names == ['backbone.layers.8.ffn', 'backbone.layers.10.ffn']


def test_the_small_experiment_is_at_equal_active_multiply_adds():
    """Of a token: 2 · 160 · 640 in the dense FFN, in GMoE's one and in SF-MoE's two experts."""

    def of_token(name):
        cfg = Config.fromfile(ROOT / 'dg' / f'{name}.py', format_python_code=False)
        cfg.model.backbone.stem = dict(type='mmdet_moe.EfficientNetLite', out_indices=(0,))
        model = MODELS.build(cfg.model)
        ffn = model.get_submodule('backbone.layers.2.ffn')
        one = ffn if name.count('dense') else ffn.experts[0]
        weights = sum(p.numel() for p in one.parameters() if p.ndim == 2)
        return weights * (1 if name.count('dense') else ffn.router.k)

    names = [f'vit_effnet-lite0_{kind}_emoji' for kind in ('dense', 'gmoe-e6', 'sf-moe-e6')]
    assert [of_token(name) for name in names] == [2 * 160 * 640] * 3
