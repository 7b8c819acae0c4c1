"""The ResNet in front of the hybrid ViTs: standardised weights, group norm. Needs mmpretrain."""

from __future__ import annotations

from typing import Any

from mmpretrain.models.backbones import ResNet
from mmpretrain.models.backbones.resnet import Bottleneck
from torch import Tensor, nn
from torch.nn import functional as F

from mmdet_moe.models.backbones.efficientnet_lite import SamePad2d
from mmdet_moe.registry import MODELS

#: Added to the variance of a filter's weights.
EPS = 1e-8


@MODELS.register_module()
class StdConv2dSame(nn.Conv2d):
    r"""A convolution whose filters are standardised, with TensorFlow's ``SAME`` padding.

    .. math:: \hat W_o = \frac{W_o - \mathrm{mean}(W_o)}{\sqrt{\mathrm{Var}(W_o) + 10^{-8}}}

    The padding follows from kernel and stride, whatever is given.

    Source: Qiao et al. 2019 (arXiv 1903.10520), eq. 4-5.
    """

    def __init__(self, *args: Any, padding: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pad = SamePad2d(self.kernel_size[0], self.stride[0])

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', ceil(H / stride), ceil(W / stride))."""
        flat = self.weight.flatten(1)
        centred = flat - flat.mean(1, keepdim=True)
        weight = centred / (centred.square().mean(1, keepdim=True) + EPS).sqrt()
        return F.conv2d(self.pad(x), weight.view_as(self.weight), self.bias, self.stride)


@MODELS.register_module()
class ResNetV2Stem(ResNet):
    """mmpretrain's ``ResNet`` of 26 or 50 layers as the hybrid ViTs have it in front of them.

    It is BiT's: bottlenecks with :class:`StdConv2dSame` and group norm of 32 groups, one map of
    2048 channels and stride 32. As the ``stem`` of a :class:`HybridVisionTransformer` of arch
    'deit-small' it makes R26+ViT-S/32. The names of timm's ``vit_small_r26_s32`` below
    ``patch_embed.backbone`` are translated when a checkpoint is loaded.

    Args:
        depth: 26 (2, 2, 2, 2 blocks) or 50 (3, 4, 6, 3).
        **kwargs: As mmpretrain's ``ResNet``.

    Source: Steiner et al. 2021 (arXiv 2106.10270), table 1; Kolesnikov et al. 2020 (BiT, arXiv
    1912.11370), section 3.
    """

    arch_settings = {26: (Bottleneck, (2, 2, 2, 2)), 50: (Bottleneck, (3, 4, 6, 3))}

    def __init__(self, depth: int = 26, **kwargs: Any) -> None:
        kwargs.setdefault('conv_cfg', dict(type='mmdet_moe.StdConv2dSame'))
        kwargs.setdefault('norm_cfg', dict(type='GN', num_groups=32))
        super().__init__(depth, **kwargs)
        # Behind a ReLU zeros pad as minus infinity does.
        self.maxpool = nn.Sequential(SamePad2d(3, 2), nn.MaxPool2d(3, 2))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name = _from_timm(key[len(prefix) :])
            if name is not None:
                state_dict[prefix + name] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _from_timm(key: str) -> str | None:
    """Our name of a tensor of timm's ``ResNetV2``; None for one that is no name of it.

    Example:
        >>> _from_timm('stages.2.blocks.0.downsample.norm.bias')
        'layer3.0.downsample.1.bias'
    """
    parts = key.split('.')
    if parts[0] == 'stem':
        return '.'.join([{'conv': 'conv1', 'norm': 'gn1'}[parts[1]], parts[2]])
    if parts[0] != 'stages':
        return None
    stage, block, module, leaf = int(parts[1]) + 1, parts[3], parts[4], parts[-1]
    if module == 'downsample':
        module = f'downsample.{("conv", "norm").index(parts[5])}'
    return f'layer{stage}.{block}.{module.replace("norm", "gn")}.{leaf}'
