from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mmdet_moe.moe import ProbabilityMoELayer, Target, describe_target, register_target
from mmdet_moe.registry import MODELS

from .multi_domain_retina_head import MultiDomainRetinaHead

#: What class experts may be mixed as.
MIXES = ('probability', 'logit')
#: Where mmdet's RetinaHead has the parts of the subnets.
PLACES = dict(
    cls_convs='cls_subnet.convs',
    reg_convs='reg_subnet.convs',
    retina_cls='cls_subnet.output',
    retina_reg='reg_subnet.output',
)


class RetinaSubnet(nn.Module):
    """One of RetinaNet's two subnets: the stacked convolutions and the output convolution.

    Args:
        convs: The stacked convolutions; none is allowed.
        output: The output convolution.
    """

    def __init__(self, convs: nn.ModuleList, output: nn.Conv2d) -> None:
        super().__init__()
        self.convs = convs
        self.output = output

    @property
    def in_channels(self) -> int:
        """Channels of the features."""
        return (self.convs[0] if len(self.convs) else self.output).in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Features of a level, has shape (B, C, H, W), to (B, A * n, H, W)."""
        for conv in self.convs:
            x = conv(x)
        return self.output(x)


@MODELS.register_module()
class MoERetinaHead(MultiDomainRetinaHead):
    """RetinaNet's head whose class and box subnets are one module each, so that both can be
    experts: ``bbox_head.cls_subnet`` and ``bbox_head.reg_subnet``.

    A learned router decides for each image and level, for the head calls its subnets level by
    level; a balance loss is one over all levels together. Without experts it is
    :class:`MultiDomainRetinaHead`. Checkpoints of that and of mmdet's ``RetinaHead`` load.

    Args:
        mix: What class experts are mixed as. ``'probability'``: after the sigmoid, and the head
            gives the mixture's logit, so that mmdet's loss and post-processing stay. ``'logit'``:
            as they are. Box experts mix their deltas. Concerns experts of what gives the class
            scores, ``cls_subnet`` or ``cls_subnet.output``.
        *args: As :class:`MultiDomainRetinaHead`.
        **kwargs: As :class:`MultiDomainRetinaHead`.

    Source: Pavlitska et al. (arXiv 2204.10598), RetinaNet experiments.
    """

    places = PLACES

    def __init__(self, *args: Any, mix: str = 'probability', **kwargs: Any) -> None:
        if mix not in MIXES:
            raise ValueError(f'MoERetinaHead: mix must be one of {MIXES}, got {mix!r}')
        super().__init__(*args, **kwargs)
        self.mix = mix
        if mix == 'probability':
            if not self.use_sigmoid_cls:
                raise ValueError(
                    "MoERetinaHead: mix='probability' mixes sigmoid scores, but loss_cls has "
                    "use_sigmoid=False; use mix='logit'"
                )
            for module in (self.cls_subnet, self.cls_subnet.output):
                module.gives_sigmoid_logits = True

    def _init_layers(self) -> None:
        """The base's layers, so that construction draws the same random numbers, regrouped."""
        super()._init_layers()
        self.cls_subnet = RetinaSubnet(self.cls_convs, self.retina_cls)
        self.reg_subnet = RetinaSubnet(self.reg_convs, self.retina_reg)
        for name in PLACES:
            del self._modules[name]

    def forward_single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and box deltas of one level.

        Args:
            x: Features, has shape (B, C, H, W).

        Returns:
            Logits, has shape (B, A * num_classes, H, W), and deltas, (B, A * 4, H, W).
        """
        return self.cls_subnet(x), self.reg_subnet(x)

    def init_weights(self) -> None:
        """mmdet's, which knows ``retina_cls`` by name and goes through the layers in its order."""
        with self._layout_of_retina_head():
            super().init_weights()

    @contextmanager
    def _layout_of_retina_head(self) -> Iterator[None]:
        parts = {name: self.get_submodule(place) for name, place in PLACES.items()}
        subnets = {name: self._modules.pop(name) for name in ('cls_subnet', 'reg_subnet')}
        self._modules.update(parts)
        try:
            yield
        finally:
            for name in parts:
                del self._modules[name]
            self._modules.update(subnets)

    def rename_dense_keys(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Replace mmdet's names of the subnets' parts in a state dict by this head's, in place.

        Args:
            state_dict: A checkpoint's weights.
            prefix: Name of the head in it, with a dot.
        """
        for name, place in PLACES.items():
            known = f'{prefix}{name}.'
            for key in [key for key in state_dict if key.startswith(known)]:
                state_dict[f'{prefix}{place}.{key[len(known) :]}'] = state_dict.pop(key)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.rename_dense_keys(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def class_rows(self) -> dict[str, tuple[str | None, ...]]:
        """``cls_subnet.output`` has a row per anchor and class."""
        return self.rows_of(r'cls_subnet\.output', self.cls_out_channels)


@register_target(lambda module: isinstance(module, RetinaSubnet))
def retina_subnet(module: RetinaSubnet) -> Target:
    """A subnet of RetinaNet's head on (B, C, H, W)."""
    return Target(module, in_channels=module.in_channels, channel_dim=1, granularities=('image',))


@register_target(lambda module: getattr(module, 'gives_sigmoid_logits', False))
def sigmoid_logits(module: nn.Module) -> Target:
    """A module as ever, but that its experts are mixed after the sigmoid."""
    module.gives_sigmoid_logits = False  # what remains is an ordinary module
    target = describe_target(module)
    return replace(target, layer=ProbabilityMoELayer, granularities=('image',))
