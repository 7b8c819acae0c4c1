"""The detector's own features as what tells an image's domain: no second network.

Axis letters: B images, D domains, d channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet_moe.moe.routing import own_places


class DomainFeatures(nn.Module):
    r"""Prototypes of the domains among the pooled features of one of the detector's own layers.

    An image's feature z is the mean of the layer's output over the image's own places (no
    padding), divided by its length. A domain's prototype :math:`\mu_i` is the mean z of its
    training images, again of length 1, and the posterior over domains is
    :math:`p_i \propto \exp(\kappa\, z \cdot \mu_i)`, a softmax of cosine similarities at the
    temperature :math:`1 / \kappa`. Both are buffers, so that checkpoints and EMA copies have them;
    they are zero until measured, which is when training ends (``DomainPrototypeHook``) or later
    (``tools/analysis_tools/test_modes.py``): before, features still move.

    Args:
        domains: The D domains, in the order of the label space.
        layer: Full name of the layer whose output is pooled.
        dimension: d.

    Attributes:
        mean: Prototypes, has shape (D, d); a row of zeros for a domain that was not measured.
        concentration: kappa; 0 before anything was measured.
    """

    mean: Tensor
    concentration: Tensor

    def __init__(self, domains: Sequence[str], layer: str, dimension: int) -> None:
        super().__init__()
        self.domains = tuple(domains)
        self.layer = layer
        self.register_buffer('mean', torch.zeros(len(self.domains), dimension))
        self.register_buffer('concentration', torch.zeros(()))

    @property
    def measured(self) -> bool:
        """Whether there are prototypes."""
        return bool(self.concentration > 0)

    def prototypes(self) -> tuple[dict[str, Tensor], float]:
        """Domain -> prototype of shape (d,), of those that were measured, and the concentration.

        Raises:
            ValueError: Nothing was measured.
        """
        if not self.measured:
            raise ValueError(
                f'the domains have no prototypes among the features of {self.layer!r} yet: train '
                "with dict(type='DomainPrototypeHook'), or measure them on the checkpoint with "
                'tools/analysis_tools/test_modes.py --guess features --save FILE'
            )
        rows = {name: row for name, row in zip(self.domains, self.mean, strict=True) if row.any()}
        return rows, float(self.concentration)

    @torch.no_grad()
    def set_prototypes(self, prototypes: Mapping[str, Any]) -> None:
        """Take what :func:`mmdet_moe.planning.affinity.dataset_prototypes` found.

        Domains that are not in it keep what they have, and where some do, so does the
        concentration: a newcomer alone says nothing about how far domains lie apart.

        Raises:
            ValueError: A domain that is not among :attr:`domains`, or another d.
        """
        unknown = [name for name in prototypes['mean'] if name not in self.domains]
        if unknown:
            raise ValueError(f'no domain {unknown[0]!r}; there are {list(self.domains)}')
        if prototypes['dimension'] != self.mean.shape[1]:
            raise ValueError(
                f'prototypes of {prototypes["dimension"]} numbers; the features of {self.layer!r} '
                f'have {self.mean.shape[1]}'
            )
        others = [i for i, name in enumerate(self.domains) if name not in prototypes['mean']]
        for name, mean in prototypes['mean'].items():
            self.mean[self.domains.index(name)] = self.mean.new_tensor(mean)
        if not (self.measured and self.mean[others].any()):
            self.concentration.fill_(prototypes['concentration'])

    def extra_repr(self) -> str:
        return f'{len(self.domains)} domains, {self.mean.shape[1]} features of {self.layer}'


def pool_features(output: Any, extents: Sequence[tuple[float, float]] | None = None) -> Tensor:
    """Unit mean features of images, in float32 and without gradient.

    Args:
        output: A layer's output, (B, C, H, W) or tokens (B, T, C); of several the last.
        extents: The shares of height and width that each image has of the batch's maps; None: all.

    Returns:
        Has shape (B, C), rows of length 1.

    Raises:
        ValueError: The output is neither.
    """
    while isinstance(output, (tuple, list)):
        output = output[-1]
    if not isinstance(output, Tensor) or output.dim() not in (3, 4):
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f'a feature layer must give (B, C, H, W) or (B, T, C), got {what}')
    output = output.detach()
    if output.dim() == 3:
        pooled = output.float().mean(1)
    elif extents is None:
        pooled = output.float().mean((2, 3))
    else:
        pooled = torch.cat([part.float().mean((2, 3)) for part in own_places(output, extents)])
    return F.normalize(pooled, dim=1)


def last_unrouted_layer(model: nn.Module, moe_names: Sequence[str]) -> str:
    """The backbone, or its last stage before the first MoE layer in it.

    Args:
        model: A detector with a ``backbone``.
        moe_names: Full names of its MoE layers.

    Raises:
        ValueError: The MoE layers begin with the backbone's first module.
    """
    routed = [name for name in moe_names if name.startswith('backbone.')]
    if not routed:
        return 'backbone'
    last = None
    for name, child in model.backbone.named_children():
        inner = list(child.named_children()) if isinstance(child, nn.ModuleList) else []
        for full, module in [(f'backbone.{name}.{i}', x) for i, x in inner] or [
            (f'backbone.{name}', child)
        ]:
            if any(r == full or r.startswith(f'{full}.') for r in routed):
                if last is None:
                    raise ValueError(
                        f'there is no layer before {full!r}, which has experts, whose features '
                        'could tell the domain; use the embedder'
                    )
                return last
            if any(True for _ in module.parameters()):
                last = full
    raise ValueError(f'MoE layers {routed} are not in the backbone')
