"""The loss of GShard and Switch Transformer: share of the items times mean gate."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdet_moe.moe.balance.base import SummedLoss, probabilities_of, shares
from mmdet_moe.moe.registry import BALANCE
from mmdet_moe.moe.routing import Routing, RoutingContext, to_device

CHOICES = ('first', 'all')
GROUPS = ('batch', 'image')


def switch_loss(fractions: Tensor, mean_gates: Tensor) -> Tensor:
    r"""1 at uniform use, E at full collapse.

    .. math:: L = E \sum_e f_e P_e

    The gradient flows through P alone; f counts.

    Args:
        fractions: f, (E,) share of the choices that went to each expert, sum 1.
        mean_gates: P, (E,) mean gate over the items.

    Source: Fedus et al. 2021 (Switch Transformer, arXiv 2101.03961), eq. 4-6; Lepikhin et al. 2020
    (GShard, arXiv 2006.16668), section 2.2.
    """
    return fractions.numel() * (fractions.detach() * mean_gates).sum()


@BALANCE.register
class SwitchLoss(SummedLoss):
    r""":func:`switch_loss` of the router's gates.

    With ``group='image'`` it is taken of the N tokens of each image and then averaged over the B
    images, as SF-MoE has it:

    .. math:: L = \frac{1}{B} \sum_b E \sum_e f_{be} P_{be}
        = E^2 \, \mathrm{mean}_{b,e}\, f_{be} P_{be}

    Args:
        weight: Factor of the loss.
        choices: What f counts. 'first': each item's best expert, before any item is dropped
            (Switch; GShard too, for its top-2). 'all': every pair that is really computed.
        group: 'batch', all items of a forward, or 'image'; that one counts first choices only.

    Source: see :func:`switch_loss`; of each image: Li et al. 2022 (SF-MoE, arXiv 2206.04046 v2),
    code.
    """

    name = 'switch'
    needs_probabilities = True

    def __init__(self, weight: float = 0.01, choices: str = 'first', group: str = 'batch') -> None:
        super().__init__(weight)
        if choices not in CHOICES:
            raise ValueError(f'SwitchLoss: choices must be one of {CHOICES}, got {choices!r}')
        if group not in GROUPS:
            raise ValueError(f'SwitchLoss: group must be one of {GROUPS}, got {group!r}')
        if group == 'image' and choices == 'all':
            raise ValueError("SwitchLoss: group='image' goes with choices='first'")
        self.choices = choices
        self.group = group

    def sums(self, routing: Routing, context: RoutingContext) -> Tensor:
        gates = probabilities_of(self, routing, context)
        if self.choices == 'first':
            # What the selection was made from.
            known = (routing.noisy_logits, routing.logits, gates)
            scores = next(values for values in known if values is not None)
            experts = torch.arange(gates.shape[1], device=gates.device)
            first = (scores.argmax(1, keepdim=True) == experts).to(gates.dtype)
            if self.group == 'image':
                return _image_sums(first, gates, context.num_images)
            chosen = first.sum(0)
        else:
            chosen = to_device(torch.tensor(routing.counts), gates.device)
        items = gates.new_full((1,), gates.shape[0])
        return torch.cat([chosen.to(gates.dtype), gates.sum(0), items])

    def value(self, sums: Tensor) -> Tensor:
        if self.group == 'image':
            return sums[0] / sums[1].clamp(min=1.0)
        chosen, gates = sums[:-1].unflatten(0, (2, -1))
        return switch_loss(shares(chosen), gates / sums[-1].clamp(min=1.0))

    def extra_repr(self) -> str:
        return f'weight={self.weight}, choices={self.choices}, group={self.group}'


def _image_sums(first: Tensor, gates: Tensor, images: int) -> Tensor:
    """(2,) sum of :func:`switch_loss` over the images, and their number; zeros for no items."""
    if not gates.numel():
        return gates.sum() * gates.new_zeros(2)
    f, mean_gates = (x.view(images, -1, gates.shape[1]).mean(1) for x in (first, gates))
    return torch.stack([gates.shape[1] * (f * mean_gates).sum(), gates.new_tensor(images)])
