"""The core, which knows nothing of mmdet, against mmdet's real modules."""

import copy

import pytest
import torch
from moe_testlib import MIXED, plan_router
from torch import nn

from mmdet_moe.moe import RoutingState, Target, TargetError, replace_modules, upcycle_
from mmdet_moe.moe.targets import TARGET_ADAPTERS, register_target, why_unsafe

pytest.importorskip('mmdet')


@pytest.fixture(scope='module')
def dino():
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    attention = dict(embed_dims=256, num_heads=8, dropout=0.0)
    ffn = dict(embed_dims=256, feedforward_channels=64, ffn_drop=0.0)
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='DINO',
            num_queries=10,
            with_box_refine=True,
            as_two_stage=True,
            backbone=dict(
                type='ResNet', depth=18, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1),
                out_indices=(1, 2), norm_eval=True,
            ),
            neck=dict(
                type='ChannelMapper', in_channels=[128, 256], kernel_size=1, out_channels=256,
                norm_cfg=dict(type='GN', num_groups=8), num_outs=2,
            ),
            num_feature_levels=2,
            encoder=dict(
                num_layers=1,
                layer_cfg=dict(
                    self_attn_cfg=dict(embed_dims=256, num_heads=8, num_levels=2), ffn_cfg=ffn
                ),
            ),
            decoder=dict(
                num_layers=2, return_intermediate=True, post_norm_cfg=None,
                layer_cfg=dict(
                    self_attn_cfg=attention,
                    cross_attn_cfg=dict(embed_dims=256, num_heads=8, num_levels=2),
                    ffn_cfg=ffn,
                ),
            ),
            positional_encoding=dict(num_feats=128, normalize=True),
            bbox_head=dict(
                type='DINOHead', num_classes=5, embed_dims=256,
                loss_cls=dict(type='FocalLoss', use_sigmoid=True),
            ),
            dn_cfg=dict(
                label_noise_scale=0.5, box_noise_scale=1.0,
                group_cfg=dict(dynamic=True, num_groups=None, num_dn_queries=10),
            ),
        )
    )  # fmt: skip
    return model


@pytest.mark.parametrize(
    'name',
    [
        'decoder.layers.0.self_attn.attn.out_proj',
        'bbox_head.cls_branches.0',
        'bbox_head.reg_branches.1',
        'query_embedding',
        'memory_trans_fc',
    ],
)
def test_what_dino_reads_from_outside_is_refused(dino, name):
    assert why_unsafe(dino, name)
    with pytest.raises(TargetError, match='cannot be a MoE target'):
        replace_modules(
            dino, [dict(targets=name.replace('.', r'\.'), router=plan_router())], RoutingState()
        )


@pytest.mark.parametrize(
    'name',
    [
        'encoder.layers.0.ffn',
        'decoder.layers.1.ffn',
        'decoder.layers.0.norms.1',
        'backbone.layer1',
        'backbone.layer2.0.conv1',
        'backbone.bn1',
        'neck.convs.0',
        'neck.convs.0.gn',
    ],
)
def test_what_dino_only_calls_is_not_refused(dino, name):
    assert why_unsafe(dino, name) is None


def test_moe_dino_is_the_dense_dino_after_init_weights_and_after_loading(dino):
    """Sixteen layers of six kinds; init_weights scrambles them and upcycle_ puts them right."""
    import copy

    from mmcv.cnn.bricks.transformer import FFN

    @register_target(lambda module: isinstance(module, FFN))
    def ffn(module):
        residual, module.add_identity = module.add_identity, False
        return Target(module, module.embed_dims, -1, 'token', residual=residual)

    state, model = RoutingState(), copy.deepcopy(dino)
    targets = [
        r'(en|de)coder\.layers\.\d\.(ffn|norms\.\d)',
        r'backbone\.(bn1|layer1|layer2\.0\.conv1)',
        r'neck\.convs\.0\.(conv|gn)',
    ]
    try:
        replace_modules(model, [dict(targets=targets, router=plan_router(MIXED))], state)
    finally:
        TARGET_ADAPTERS.pop(0)
    model.init_weights()
    upcycle_(model)
    names = [name for name, _ in model.named_modules()]
    assert len([n for n in names if n.endswith('.router')]) == 16

    dense = copy.deepcopy(dino)
    dense.load_state_dict(
        {k.replace('.experts.0', ''): v for k, v in model.state_dict().items()
         if '.experts.' not in k or '.experts.0.' in k}
    )  # fmt: skip
    inputs = torch.randn(3, 3, 64, 64)

    def outputs(net):
        from mmdet.structures import DetDataSample

        samples = [DetDataSample(metainfo=dict(
            img_shape=(64, 64), batch_input_shape=(64, 64), pad_shape=(64, 64)
        )) for _ in range(3)]  # fmt: skip
        net.eval()
        with torch.no_grad():
            return net(inputs, samples, mode='tensor')

    def compare():
        for domains in (['mixed', 'b', 'a'], ['b', 'b', 'b']):
            state.begin(domains)
            # hidden states, references, encoder's class scores: as the dense ones
            for ours, theirs in zip(
                _tensors(outputs(model)), _tensors(outputs(dense)), strict=True
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    compare()
    for p in dense.parameters():
        if p.dim() > 1:
            p.data *= 1.1
    from mmengine.runner.checkpoint import load_state_dict

    load_state_dict(model, dense.state_dict(), strict=True)
    compare()


def _tensors(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, (tuple, list)):
        return [t for part in tree for t in _tensors(part)]
    return []


def test_mmcvs_conv_module_takes_moe_parts():
    from mmcv.cnn import ConvModule

    model = nn.Sequential(ConvModule(3, 4, 3, norm_cfg=dict(type='BN')))
    state = RoutingState()
    replace_modules(model, [dict(targets=r'0\.(conv|bn)', router=plan_router())], state)
    model[0].init_weights()
    state.begin(['a', 'c'], training=True)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 4, 6, 6)


def test_idle_experts_of_mmcvs_ffn_and_of_a_resnet_stage_do_not_move(dino):
    import mmdet_moe.models.targets  # noqa: F401 - the adapter of mmcv's FFN

    model = nn.ModuleDict(
        dict(
            ffn=copy.deepcopy(dino.decoder.layers[0].ffn),
            stage=copy.deepcopy(dino.backbone.layer2),
        )
    ).train()
    state = RoutingState()
    router = dict(type='PlanRouter', plan={'a': 'e0', 'b': 'e1', 'c': 'e2'})
    replace_modules(model, [dict(targets='ffn|stage', router=router)], state)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    # e2 works in the first step, so that it has momentum, and rests in the second.
    for domains in (['a', 'c'], ['a', 'b']):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        state.begin(domains, training=True)
        optimiser.zero_grad()
        tokens, maps = torch.randn(2, 7, 256), torch.randn(2, 64, 8, 8)
        (model['ffn'](tokens).square().mean() + model['stage'](maps).square().mean()).backward()
        optimiser.step()
    moved = {key for key, value in model.state_dict().items() if not value.equal(before[key])}
    for name in ('ffn', 'stage'):
        assert any(key.startswith(f'{name}.experts.0.') for key in moved)
        assert any(key.startswith(f'{name}.experts.1.') for key in moved)
        assert not any(key.startswith(f'{name}.experts.2.') for key in moved)
