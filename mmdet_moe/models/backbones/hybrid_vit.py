"""A ViT on the feature maps of a CNN. Needs mmpretrain.

Axis letters: B images, C channels, H and W an image's height and width, h and w a feature map's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmpretrain.models.backbones import VisionTransformer
from torch import Tensor, nn

from mmdet_moe.registry import MODELS


@MODELS.register_module()
class HybridVisionTransformer(VisionTransformer):
    """mmpretrain's ``VisionTransformer`` whose image is the last feature map of a backbone.

    The stem runs first; what is a patch of the image to a ViT is a patch of the stem's map here
    (one place of it by default). Everything behind, the names of the parameters too, is
    mmpretrain's: ``layers.0.ffn`` is a target of MoE specs, position embeddings are resized to
    other image sizes. mmpretrain's own ``HybridEmbed`` gives tokens without their grid and builds
    no stem from a config, so its ``VisionTransformer`` cannot take it.

    A frozen stem (``frozen_stages`` of :class:`EfficientNetLite`) costs a forward and no backward.

    Args:
        stem: Config of a backbone that maps (B, 3, H, W) to a tuple of maps; the last one is taken.
        img_size: Side of the images, or (H, W).
        patch_size: Places of the stem's map, to each side, that make a token.
        **kwargs: As mmpretrain's ``VisionTransformer``, without ``in_channels``.

    Raises:
        ValueError: If the stem gives no map.

    Source: Dosovitskiy et al. 2021 (ViT, arXiv 2010.11929), section 3.1, "Hybrid architecture".
    """

    def __init__(
        self,
        stem: Mapping[str, Any] | nn.Module,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 1,
        **kwargs: Any,
    ) -> None:
        built = stem if isinstance(stem, nn.Module) else MODELS.build(dict(stem))
        sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        channels, grid = _map_of(built, sides)
        super().__init__(img_size=grid, patch_size=patch_size, in_channels=channels, **kwargs)
        self.stem = built

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """As mmpretrain's, of images (B, 3, H, W)."""
        return super().forward(self.stem(x)[-1])

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """As mmpretrain's; the stem is at depth 0, as the patch embedding."""
        if param_name.startswith(f'{prefix}stem.'):
            param_name = f'{prefix}patch_embed'
        return super().get_layer_depth(param_name, prefix)


def _map_of(stem: nn.Module, sides: Sequence[int]) -> tuple[int, tuple[int, int]]:
    """Channels and (h, w) of the last map that ``stem`` makes of an image of these sides."""
    training = [(module, module.training) for module in stem.modules()]
    try:
        with torch.no_grad():
            maps = stem.eval()(torch.zeros(1, 3, *sides))
    finally:
        for module, mode in training:
            module.training = mode
    last = maps[-1] if isinstance(maps, (tuple, list)) and maps else None
    if not isinstance(last, Tensor) or last.ndim != 4:
        raise ValueError(
            f'HybridVisionTransformer: the stem {type(stem).__name__} must give a tuple of maps '
            f'(B, C, h, w), it gives a {type(maps).__name__}'
        )
    return last.shape[1], (last.shape[2], last.shape[3])
