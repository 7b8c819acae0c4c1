"""What mmcv's and mmdet's modules need in the place of a MoE layer.

Importing this module teaches :mod:`mmdet_moe.moe`, which knows torch only, their kinds: adapters
for what can be replaced, and names of what must not be.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from mmcv.cnn import ConvModule, Linear
from mmcv.cnn.bricks import DropPath
from mmcv.cnn.bricks.transformer import FFN
from mmdet.models.layers import ResLayer
from mmengine.model import Sequential
from torch import nn

from mmdet_moe.moe import Target, register_target, register_unsafe
from mmdet_moe.moe.grouped import CHAINS, LINEARS, register_chain
from mmdet_moe.moe.layer import MAP_GRANULARITIES

#: Stages of mmdet's ResNet, and of mmpretrain's where it is installed.
STAGES: tuple[type[nn.Module], ...] = (ResLayer,)
if find_spec('mmpretrain'):
    from mmpretrain.models.backbones.resnet import ResLayer as ClassifierResLayer

    STAGES += (ClassifierResLayer,)


@register_target(lambda module: isinstance(module, FFN))
def ffn(module: FFN) -> Target:
    """mmcv's ``FFN``: ``ffn(x, identity=None)`` on (B, N, d) or (N, B, d).

    Layers, dropout and layer scale (``gamma2``) are each expert's own. The identity is not: the
    MoE layer adds it once, whatever the combine weights sum to, so a dropped token passes through
    unchanged and a weighted one keeps all of it. Nor is stochastic depth, which drops the whole
    sum for an image; in an expert it would drop single tokens.
    """
    residual, module.add_identity = module.add_identity, False
    drop = None
    if isinstance(module.dropout_layer, DropPath):
        drop, module.dropout_layer = module.dropout_layer, nn.Identity()
    return Target(
        module,
        in_channels=module.embed_dims,
        channel_dim=-1,
        default_granularity='token',
        residual=residual,
        drop=drop,
    )


LINEARS.add(Linear)
CHAINS[Sequential] = list


@register_chain(FFN)
def ffn_chain(module: FFN) -> Sequence[nn.Module]:
    """An ``FFN`` that adds no identity is its layers in turn, where nothing drops or scales."""
    drop = module.dropout_layer
    idle = isinstance(drop, nn.Identity) or not drop.training
    idle = idle or getattr(drop, 'drop_prob', getattr(drop, 'p', 1.0)) == 0
    if module.add_identity or not idle or not isinstance(module.gamma2, nn.Identity):
        return [module]
    return [module.layers]


@register_target(lambda module: isinstance(module, ConvModule))
def conv_module(module: ConvModule) -> Target:
    """mmcv's ``ConvModule`` (convolution, norm, activation) on (B, C, H, W)."""
    return Target(
        module, in_channels=module.in_channels, channel_dim=1, granularities=MAP_GRANULARITIES
    )


@register_target(lambda module: isinstance(module, STAGES))
def res_layer(module: nn.Module) -> Target:
    """A stage of mmdet's or mmpretrain's ``ResNet`` (``backbone.layer3``) on (B, C, H, W)."""
    first = next(part for part in module.modules() if isinstance(part, nn.Conv2d))
    return Target(
        module, in_channels=first.in_channels, channel_dim=1, granularities=MAP_GRANULARITIES
    )


register_unsafe(
    r'(.*\.)?bbox_head\.cls_branches\.\d+',
    'DETR detectors read its .out_features, and its logits are masked by domain',
)
register_unsafe(
    r'(.*\.)?bbox_head\.reg_branches\.\d+',
    'the head reads its last layer ([-1]), and the decoder runs it a second time',
)
