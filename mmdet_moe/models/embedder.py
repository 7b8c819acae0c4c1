"""The frozen embedder: one vector per image, for the affinity and for images of unknown domain.

Axis letters: B images, C channels, H and W an image's height and width, d embedding dimension.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmdet_moe.registry import MODELS

#: EfficientNet-Lite0 up to its last stage. Its 320 linear (signed) channels tell datasets apart
#: better than the 1280 rectified ones of the classification head; see docs/planning_from_data.md.
DEFAULT_BACKBONE = {
    'type': 'EfficientNetLite',
    'arch': 'lite0',
    'out_indices': [4],
    'init_cfg': {'type': 'EfficientNetLitePretrained'},
}
POOLS = ('gap', 'cls')
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
CHANNEL_ORDERS = ('rgb', 'bgr')


@MODELS.register_module()
class FrozenEmbedder(nn.Module):
    """A frozen backbone with its own preprocessing: images in, unit vectors out.

    An image is resized to ``size`` x ``size`` (antialiased, so that embeddings of the file and of
    the detector's smaller input agree), normalised, sent through the backbone, pooled and divided
    by its length. The module is always in eval mode, has no trainable parameters, computes without
    gradients and outside autocast, and building it leaves the global random state alone.

    It is meant to be used beside a model, not inside: as a submodule it would enter the model's
    state dict, EMA and DDP buckets.

    Args:
        backbone: Config of anything that mmdet, mmpretrain (``type='mmpretrain.ResNet'``) or this
            package can build as a backbone, its weights by its own ``init_cfg``. Default:
            EfficientNet-Lite0 with its registry weights.
        size: Side of the square the backbone sees, in pixels.
        mean: Mean per channel that is subtracted, in the backbone's channel order, for 0..255. By
            default the backbone's ``pixel_mean`` (EfficientNet-Lite has 127), else ImageNet's.
        std: Standard deviation per channel, likewise; ``pixel_std`` (EfficientNet-Lite: 128).
        channel_order: 'rgb' or 'bgr': what the backbone was trained with. Images are given as RGB
            either way.
        pool: 'gap' averages a feature map (B, C, H, W) over its positions or tokens (B, T, C) over
            T; 'cls' takes the first token. An output (B, C) is taken as it is.
        level: Which of the backbone's outputs to take, the last by default.
        batch_size: Most images the backbone sees at once.
        fingerprint: What :meth:`fingerprint` must give, or None. A plan keeps it, so that routing
            with other weights than those of the prototypes is an error and not a silence.

    Raises:
        ValueError: On bad arguments, or weights that do not have the ``fingerprint``.

    Example:
        >>> embedder = FrozenEmbedder()
        >>> embedder.embed([torch.zeros(3, 480, 640, dtype=torch.uint8)]).shape
        torch.Size([1, 320])
    """

    def __init__(
        self,
        backbone: Mapping[str, Any] | None = None,
        size: int = 224,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        channel_order: str = 'rgb',
        pool: str = 'gap',
        level: int = -1,
        batch_size: int = 32,
        fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f'FrozenEmbedder: pool must be one of {POOLS}, got {pool!r}')
        if channel_order not in CHANNEL_ORDERS:
            raise ValueError(
                f'FrozenEmbedder: channel_order must be one of {CHANNEL_ORDERS}, '
                f'got {channel_order!r}'
            )
        for name, value in (('size', size), ('batch_size', batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f'FrozenEmbedder: {name} must be a whole number >= 1: {value!r}')
        backbone = copy.deepcopy(dict(DEFAULT_BACKBONE if backbone is None else backbone))
        plain = _plain(backbone)
        built = _build(backbone)
        mean = getattr(built, 'pixel_mean', IMAGENET_MEAN) if mean is None else mean
        std = getattr(built, 'pixel_std', IMAGENET_STD) if std is None else std
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                'FrozenEmbedder: mean and std need 3 numbers each, std positive; '
                f'got {tuple(mean)} and {tuple(std)}'
            )
        self._cfg = {
            'backbone': plain,
            'size': size,
            'mean': [float(v) for v in mean],
            'std': [float(v) for v in std],
            'channel_order': channel_order,
            'pool': pool,
            'level': level,
            'batch_size': batch_size,
        }
        self.size = size
        self.channel_order = channel_order
        self.pool = pool
        self.level = level
        self.batch_size = batch_size
        self.register_buffer('mean', torch.tensor(self._cfg['mean']).view(1, 3, 1, 1))
        self.register_buffer('std', torch.tensor(self._cfg['std']).view(1, 3, 1, 1))
        self.backbone = built
        self.requires_grad_(False)
        self.eval()
        if fingerprint is not None and fingerprint != self.fingerprint():
            raise ValueError(
                f'FrozenEmbedder: the weights of {backbone.get("type")!r} are not those the plan '
                f'was made with (fingerprint {self.fingerprint()[:12]}, the plan has '
                f'{fingerprint[:12]}): its prototypes mean nothing here; plan again'
            )

    def train(self, mode: bool = True) -> FrozenEmbedder:
        """Stay in eval mode, whatever ``mode`` the owner is set to."""
        return super().train(False)

    @torch.no_grad()
    def embed(self, images: Sequence[Tensor]) -> Tensor:
        """Embed images of any sizes.

        Args:
            images: B RGB images of shape (3, H_b, W_b), uint8 or float, in 0..255, on one device
                (that of the embedder; others are moved).

        Returns:
            Float32 tensor of shape (B, d), rows of length 1.

        Raises:
            ValueError: If there are no images or one has another shape than (3, H, W).
        """
        if len(images) == 0:
            raise ValueError('FrozenEmbedder: no images to embed')
        for i, image in enumerate(images):
            if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
                raise ValueError(
                    f'FrozenEmbedder: image {i} has shape {tuple(image.shape)}, not (3, H, W)'
                )
        chunks = []
        with torch.autocast(self.mean.device.type, enabled=False):
            for start in range(0, len(images), self.batch_size):
                batch = torch.cat(
                    [self._resize(x) for x in images[start : start + self.batch_size]]
                )
                if self.channel_order == 'bgr':
                    batch = batch.flip(1)
                features = self._pool(self.backbone((batch - self.mean) / self.std))
                chunks.append(F.normalize(features.float(), dim=1))
        return torch.cat(chunks)

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """The same as :meth:`embed`."""
        return self.embed(images)

    def to_dict(self) -> dict[str, Any]:
        """The config that builds this embedder again, as plain data fit for JSON.

        It carries the fingerprint, so that the rebuilt one is the same or an error.
        """
        return {**copy.deepcopy(self._cfg), 'fingerprint': self.fingerprint()}

    def fingerprint(self) -> str:
        """SHA-256 of the preprocessing and of every weight: equal means equal embeddings."""
        preprocessing = {k: v for k, v in self._cfg.items() if k not in ('backbone', 'batch_size')}
        digest = hashlib.sha256(json.dumps(preprocessing, sort_keys=True).encode())
        for name, value in sorted(self.backbone.state_dict().items()):
            if not name.endswith('num_batches_tracked'):
                digest.update(f'{name}{tuple(value.shape)}'.encode())
                digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _resize(self, image: Tensor) -> Tensor:
        """One image (3, H, W) as float32 of shape (1, 3, size, size)."""
        image = image.to(self.mean.device, torch.float32)[None]
        if image.shape[-2:] == (self.size, self.size):
            return image
        return F.interpolate(
            image, (self.size, self.size), mode='bilinear', align_corners=False, antialias=True
        )

    def _pool(self, outputs: Any) -> Tensor:
        """The backbone's outputs as a tensor of shape (B, d)."""
        if isinstance(outputs, (list, tuple)):
            try:
                outputs = outputs[self.level]
            except IndexError:
                raise ValueError(
                    f'FrozenEmbedder: the backbone has {len(outputs)} outputs, '
                    f'there is no level {self.level}'
                ) from None
        if not isinstance(outputs, Tensor) or outputs.dim() not in (2, 3, 4):
            what = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(
                'FrozenEmbedder: the backbone must give (B, C), (B, tokens, C) or (B, C, H, W), '
                f'got {what}'
            )
        if outputs.dim() == 2:
            return outputs
        if outputs.dim() == 3:
            return outputs[:, 0] if self.pool == 'cls' else outputs.mean(1)
        if self.pool == 'cls':
            raise ValueError("FrozenEmbedder: pool='cls' needs tokens (B, T, C), not a feature map")
        return outputs.mean((2, 3))


def _build(cfg: dict[str, Any]) -> nn.Module:
    """Build and initialise the backbone without touching the caller's random state or log."""
    if 'type' not in cfg:
        raise ValueError(f'FrozenEmbedder: the backbone config names no type: {cfg}')
    # A model must draw the same random numbers with an embedder beside it and without, and a
    # backbone without weights must be the same one wherever it is built.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = MODELS.build(cfg)
        if isinstance(backbone, BaseModule):
            # mmengine would log every parameter of it.
            backbone._dump_init_info = lambda *args, **kwargs: None
            backbone.init_weights()
            del backbone._dump_init_info
    return backbone


def _plain(value: Any) -> Any:
    """A config as dicts, lists and scalars (ConfigDict and tuples are neither to JSON)."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(
        f'FrozenEmbedder: the backbone config holds {value!r}, which a plan file cannot keep; '
        'use names, numbers, lists and dicts'
    )
