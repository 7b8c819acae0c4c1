"""A MoE layer for modules that give sigmoid logits: it mixes probabilities, and gives logits.

Axes: T items, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmdet_moe.moe.layer import MoELayer

#: Probabilities below are clamped: logits stay within ±70, and gradients are finite.
TINY = 1e-30
#: What rounding may leave of 1 - 1 in a sum of float32 weights.
ROUNDING = 1e-5


class ProbabilityMoELayer(MoELayer):
    r"""Experts that give logits, mixed as probabilities; what comes out are logits again.

    .. math:: p_t = \sum_e w_{te}\, \sigma(f_e(x_t)), \qquad y_t = \ln p_t - \ln (1 - p_t)

    so that a sigmoid after the layer gives the mixture :math:`p_t`, and losses and post-processing
    that ask for logits need not know. An item that no expert took has probability 0.

    The mixing is done in float32 (float64 for float64 logits) under autocast too, and
    :math:`1 - p` is summed up like p and never subtracted from 1, so that sure scores keep their
    digits (:func:`mixed_logits`): experts that are copies of one module give what it gave.

    Args:
        As :class:`~mmdet_moe.moe.layer.MoELayer`; experts give one tensor of logits. Within the
            layer a hook makes :math:`\sigma(f)` and :math:`\sigma(-f)` of it.

    Raises:
        ValueError: If the experts' outputs are added to something, which logits of a mixture
            cannot be.

    Source: Pavlitska et al. (arXiv 2204.10598), class experts of RetinaNet.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.residual or options.get('bypass') is not None:
            raise ValueError(
                f'MoE layer {self.name!r} mixes probabilities: a {self.dense_type} that adds its '
                f"output to something else can only be mixed as it is (mix='logit')"
            )
        for expert in self._copies():
            expert.register_forward_hook(_both_probabilities)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the base class."""
        return mixed_logits(*super().forward(x, *args, **kwargs))


def mixed_logits(p: Tensor, q: Tensor) -> Tensor:
    r"""The logit of a mixture :math:`p = \sum_e w_e \sigma(z_e)`, from p and its complement.

    With :math:`q = \sum_e w_e \sigma(-z_e)` the weights sum to :math:`p + q`, so that

    .. math:: 1 - p = q + \big(1 - (p + q)\big),

    where the second term is 0 for weights that sum to 1. It is then left out, for what rounding
    makes of it is more than the q of a sure score.

    Args:
        p: Any shape.
        q: Of the same shape.

    Returns:
        Of the same shape, within ±70 for any input; gradients are finite.
    """
    missing = 1 - (p + q)
    missing = missing.masked_fill(missing.abs() < ROUNDING, 0.0)
    return p.clamp(min=TINY).log() - (q + missing).clamp(min=TINY).log()


def _both_probabilities(
    expert: nn.Module, inputs: tuple[Any, ...], logits: Tensor
) -> tuple[Tensor, Tensor]:
    """An expert's logits as probabilities of yes and no, each with all its digits."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits.sigmoid(), (-logits).sigmoid()
