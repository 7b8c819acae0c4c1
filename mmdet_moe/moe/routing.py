"""What a router says: which items go to which experts, and with what weight.

Axes: B images, T items, E experts, k selected per item, d channels, n (item, expert) pairs.

A :class:`Routing` is a list of n pairs grouped by expert. Nothing in it asks for the same number
of experts per item: an item without a pair was dropped, an item with several is mixed, so top-k,
expert choice, capacity limits, ReLU routing and the static plan all are the same kind of object.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mmdet_moe.moe.state import RoutingState


@dataclass
class Routing:
    """The assignment of T items to E experts.

    Use a constructor: :meth:`from_topk`, :meth:`from_dense`, :meth:`from_pairs`, :meth:`single`.

    Attributes:
        num_items: T.
        num_experts: E.
        counts: Pairs per expert, on the host (E numbers, sum n).
        items: (n,) item of each pair, grouped by expert, within a group in the router's order. None
            when the whole batch goes to :attr:`expert`.
        weights: (n,) combine weight of each pair; None when every weight is exactly 1.
        expert: The one expert that takes the whole batch with weight 1, or None.
        inverse: (T·k,) where every item has exactly k pairs: the place in the grouped order of the
            j-th pair of item t, at t·k + j. Results then come back by a gather; a scatter-add is
            slow on the CPU and not deterministic on the GPU.
        in_order: Every item has one pair, and the items are already in the order of their experts.
        logits: (T, E) what the router scored, without noise; balance losses read it.
        noisy_logits: (T, E) what the selection was made from, where there was noise.
        noise_std: Standard deviation of that noise, (T, E) or broadcastable to it.
        probabilities: (T, E) differentiable gates before the selection; None without a gate.
        k: Experts per item where that number is fixed.
        losses: The router's own auxiliary losses, scalars, keys without prefix.
        stats: The router's own statistics, detached.
    """

    num_items: int
    num_experts: int
    counts: list[int]
    items: Tensor | None = None
    weights: Tensor | None = None
    expert: int | None = None
    inverse: Tensor | None = None
    in_order: bool = False
    logits: Tensor | None = None
    noisy_logits: Tensor | None = None
    noise_std: Tensor | float | None = None
    probabilities: Tensor | None = None
    k: int | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    _moved: Routing | None = field(default=None, repr=False)

    @classmethod
    def single(
        cls,
        expert: int,
        num_items: int,
        num_experts: int,
        *,
        losses: dict[str, Tensor] | None = None,
        stats: dict[str, Tensor] | None = None,
    ) -> Routing:
        """The whole batch to one expert with weight 1: no gather, no copy, no multiplication."""
        if not 0 <= expert < num_experts:
            raise ValueError(f'expert {expert} is not one of the {num_experts} experts')
        counts = [0] * num_experts
        counts[expert] = num_items
        return cls(
            num_items=num_items,
            num_experts=num_experts,
            counts=counts,
            expert=expert,
            in_order=True,
            losses=losses or {},
            stats=stats or {},
        )

    @classmethod
    def from_pairs(
        cls,
        items: Tensor,
        experts: Tensor,
        weights: Tensor | None,
        num_items: int,
        num_experts: int,
        *,
        uniform: int | None = None,
        logits: Tensor | None = None,
        noisy_logits: Tensor | None = None,
        noise_std: Tensor | float | None = None,
        probabilities: Tensor | None = None,
        k: int | None = None,
        losses: dict[str, Tensor] | None = None,
        stats: dict[str, Tensor] | None = None,
    ) -> Routing:
        """Any list of pairs, in any order; the most general constructor.

        Args:
            items: (n,) long, the item of each pair, in ``[0, T)``.
            experts: (n,) long, its expert; a negative one drops the pair.
            weights: (n,) combine weights, or None for all ones.
            num_items: T.
            num_experts: E.
            uniform: Promise that the pairs are k for item 0, k for item 1 and so on, none dropped.
            logits, noisy_logits, noise_std, probabilities, k, losses, stats: See the class.

        Raises:
            ValueError: If the lengths differ or an expert does not exist.
        """
        pairs = items.numel()
        if experts.numel() != pairs or (weights is not None and weights.numel() != pairs):
            raise ValueError(
                f'{pairs} items, {experts.numel()} experts and '
                f'{None if weights is None else weights.numel()} weights do not make pairs'
            )
        ranked, order = experts.sort(stable=True)
        # The one wait for the device: the experts must know how many items each of them gets.
        ends = group_starts(ranked, num_experts).tolist()
        if ends[-1] < pairs:
            raise ValueError(
                f'the router chose expert {int(ranked[-1])}, there are {num_experts} experts'
            )
        dropped, counts = ends[0], [b - a for a, b in zip(ends, ends[1:], strict=False)]
        if dropped:
            order = order[dropped:]
        inverse, in_order = None, False
        if uniform is not None:
            if dropped or pairs != uniform * num_items:
                raise ValueError(f'{pairs} pairs ({dropped} dropped) are not {uniform} per item')
            inverse = torch.empty_like(order)
            inverse[order] = torch.arange(pairs, device=order.device)
            if uniform == 1 and on_host(order):
                in_order = bool((order[1:] > order[:-1]).all())
        items = items.index_select(0, order)
        return cls(
            num_items=num_items,
            num_experts=num_experts,
            counts=counts,
            items=items,
            weights=None if weights is None else weights.index_select(0, order),
            inverse=inverse,
            in_order=in_order,
            logits=logits,
            noisy_logits=noisy_logits,
            noise_std=noise_std,
            probabilities=probabilities,
            k=uniform if k is None else k,
            losses=losses or {},
            stats=stats or {},
        )

    @classmethod
    def from_topk(
        cls,
        weights: Tensor | None,
        indices: Tensor,
        num_experts: int,
        logits: Tensor | None = None,
        losses: dict[str, Tensor] | None = None,
        stats: dict[str, Tensor] | None = None,
        *,
        dropping: bool = False,
        noisy_logits: Tensor | None = None,
        noise_std: Tensor | float | None = None,
        probabilities: Tensor | None = None,
    ) -> Routing:
        """k experts per item.

        Args:
            weights: (T, k) combine weights, or None for all ones.
            indices: (T, k) long, the experts; with ``dropping`` a negative one drops that pair.
            num_experts: E.
            dropping: Whether ``indices`` may hold negative entries.
            logits, noisy_logits, noise_std, probabilities, losses, stats: See the class.
        """
        if indices.ndim != 2 or (weights is not None and weights.shape != indices.shape):
            raise ValueError(
                f'indices and weights must both have shape (T, k), got {tuple(indices.shape)} and '
                f'{None if weights is None else tuple(weights.shape)}'
            )
        num_items, k = indices.shape
        items = torch.arange(num_items, device=indices.device)
        if k > 1:
            items = items.repeat_interleave(k)
        return cls.from_pairs(
            items,
            indices.reshape(-1),
            None if weights is None else weights.reshape(-1),
            num_items,
            num_experts,
            uniform=None if dropping else k,
            logits=logits,
            noisy_logits=noisy_logits,
            noise_std=noise_std,
            probabilities=probabilities,
            k=k,
            losses=losses,
            stats=stats,
        )

    @classmethod
    def from_dense(
        cls,
        weights: Tensor,
        logits: Tensor | None = None,
        losses: dict[str, Tensor] | None = None,
        stats: dict[str, Tensor] | None = None,
        *,
        probabilities: Tensor | None = None,
    ) -> Routing:
        """The non-zero entries of (T, E) weights: any number of experts per item, none included.

        On the CPU a batch that goes to one expert with weight 1 becomes :meth:`single`.
        """
        if weights.ndim != 2:
            raise ValueError(f'dense weights must have shape (T, E), got {tuple(weights.shape)}')
        num_items, num_experts = weights.shape
        chosen = weights.detach() != 0
        record: dict[str, Any] = dict(
            logits=logits, probabilities=probabilities, losses=losses or {}, stats=stats or {}
        )
        if not on_host(weights):
            return cls._from_dense_on_device(weights, chosen, record)
        unit = not weights.requires_grad and bool((weights[chosen] == 1).all())
        uniform = None
        if num_items:
            per_item = chosen.sum(1)
            if bool((per_item == per_item[0]).all()):
                uniform = int(per_item[0]) or None
        if unit and uniform == 1 and bool(chosen[:, chosen[0]].all()):
            routing = cls.single(int(chosen[0].nonzero()), num_items, num_experts)
            return replace(routing, **record)
        items, experts = chosen.nonzero(as_tuple=True)
        values = None if unit else weights[items, experts]
        return cls.from_pairs(
            items, experts, values, num_items, num_experts, uniform=uniform, **record
        )

    @classmethod
    def _from_dense_on_device(
        cls, weights: Tensor, chosen: Tensor, record: dict[str, Any]
    ) -> Routing:
        """:meth:`from_dense` with one wait for the device: what ``nonzero`` would wait for, the
        number of pairs, comes with the counts, and the pairs by a sort."""
        num_items, num_experts = chosen.shape
        if not num_items:
            return cls(num_items, num_experts, [0] * num_experts, chosen.new_empty(0).long(),
                       weights.new_empty(0), **record)  # fmt: skip
        per_item = chosen.sum(1)
        fewest, most, *counts = torch.cat(
            [per_item.amin()[None], per_item.amax()[None], chosen.sum(0)]
        ).tolist()
        pairs = sum(counts)
        # Experts first, then items, the chosen ones in front.
        places = chosen.t().reshape(-1).logical_not().byte().argsort(stable=True)[:pairs]
        items = places % num_items
        inverse = items.argsort(stable=True) if fewest == most and most else None
        return cls(
            num_items=num_items,
            num_experts=num_experts,
            counts=counts,
            items=items,
            weights=weights.t().reshape(-1).index_select(0, places),
            inverse=inverse,
            k=most if inverse is not None else None,
            **record,
        )

    def on(self, device: torch.device) -> Routing:
        """This routing with its pairs on ``device``; one made on the host (the plan's) is moved
        once for all layers that share it."""
        if self.items is None or self.items.device == device:
            return self
        if self._moved is None or self._moved.items.device != device:  # type: ignore[union-attr]
            self._moved = replace(
                self,
                items=to_device(self.items, device),
                weights=None if self.weights is None else to_device(self.weights, device),
                inverse=None if self.inverse is None else to_device(self.inverse, device),
            )
        return self._moved

    def to_dense(self) -> Tensor:
        """(T, E) combine weights, 0 where an item does not go; the inverse of :meth:`from_dense`.

        Without gradient, float32 where every weight is 1.
        """
        if self.items is None:
            dense = torch.zeros(self.num_items, self.num_experts)
            if self.expert is not None:
                dense[:, self.expert] = 1.0
            return dense
        device = self.items.device
        counts = torch.tensor(self.counts, device=device)
        experts = torch.arange(self.num_experts, device=device).repeat_interleave(
            counts, output_size=self.items.numel()
        )
        weights = self.weights
        weights = torch.ones(self.items.numel(), device=device) if weights is None else weights
        dense = weights.new_zeros(self.num_items, self.num_experts)
        return dense.index_put_((self.items, experts), weights.detach(), accumulate=True)

    def importance(self) -> Tensor:
        """(E,) sum of the combine weights per expert, differentiable where the weights are."""
        if self.weights is None or self.items is None:
            return torch.tensor(self.counts, dtype=torch.float32)
        parts = self.weights.float().split(self.counts)
        return torch.stack([part.sum() for part in parts])


def effective_experts(weights: Tensor) -> Tensor:
    r"""(T,) how many experts each item really has, of its (T, E) combine weights:

    .. math:: \exp\Big(-\sum_e p_{te} \ln p_{te}\Big), \qquad p_t = w_t / \sum_e w_{te}

    k where k experts weigh the same, 1 where one has all, 0 for an item without weight: it was
    dropped, and has none.

    Example:
        >>> effective_experts(torch.tensor([[0.5, 0.5], [0, 0.2], [0, 0]]))
        tensor([2., 1., 0.])
    """
    total = weights.sum(1)
    p = weights / total.clamp(min=1e-30)[:, None]
    return torch.special.entr(p).sum(1).exp() * (total > 0)


def group_starts(ranked: Tensor, groups: int) -> Tensor:
    """(groups + 1,) where the groups 0, 1, ... begin in a sorted list of group numbers, then the
    end of the last one. Unlike ``bincount`` it does not wait for the device.

    Example:
        >>> group_starts(torch.tensor([-1, 0, 0, 2]), 3)
        tensor([1, 3, 3, 4])
    """
    bounds = torch.arange(groups + 1, device=ranked.device, dtype=ranked.dtype)
    return torch.searchsorted(ranked, bounds)


def own_places(maps: Tensor, extents: Sequence[tuple[float, float]]) -> list[Tensor]:
    """Each image's part of (B, C, H, W) maps without the padding: B tensors (1, C, h, w)."""
    height, width = maps.shape[2:]
    return [
        maps[
            i : i + 1,
            :,
            : max(1, math.ceil(h * height - 1e-6)),
            : max(1, math.ceil(w * width - 1e-6)),
        ]
        for i, (h, w) in enumerate(extents)
    ]


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A small tensor from the host on ``device``, without waiting for what the device does."""
    return tensor.to(device=device, dtype=dtype or tensor.dtype, non_blocking=True)


def on_host(tensor: Tensor) -> bool:
    """Whether looking at single values costs no wait for a device."""
    return tensor.device.type == 'cpu'


@dataclass
class RoutingContext:
    """What a router may know besides the features.

    Attributes:
        state: The model's routing state (domains, embeddings).
        num_items: T.
        training: Whether the layer is in training mode (noise, losses, running statistics).
        items_per_image: N when the items are the N tokens of each image, image-major; 1 when the
            items are the images themselves.
        recompute: Activation checkpointing repeats this forward: repeat the routing, count
            nothing, update no buffer.
        device: Where the items are.
        layer: Full name of the layer, for messages.
        balance: The layer's balance losses and constraints.
        extents: Where the items are the maps of images with padding: as the state's.
    """

    state: RoutingState
    num_items: int
    training: bool
    items_per_image: int = 1
    recompute: bool = False
    device: torch.device = field(default_factory=lambda: torch.device('cpu'))
    layer: str = ''
    balance: tuple[Any, ...] = ()
    extents: Sequence[tuple[float, float]] | None = None

    def constrain(self, logits: Tensor) -> Tensor:
        """The (T, E) logits to select from. Routers that learn call this before they select:
        balancing by constraint (blocking overloaded experts) acts here."""
        for loss in self.balance:
            logits = loss.constrain(logits, self)
        return logits

    @property
    def may_close(self) -> bool:
        """Whether a constraint may have put experts' logits to -inf."""
        return self.training and any(loss.closes for loss in self.balance)

    @property
    def num_images(self) -> int:
        """B, by the shape of the layer's input; checked against the state's.

        Raises:
            ValueError: If the items on dimension 0 are not the batch's images.
        """
        expected = self.state.num_images
        if not self.items_per_image:  # no token in any image
            return expected or 0
        images = self.num_items // self.items_per_image
        if expected is not None and images != expected:
            raise ValueError(
                f'MoE layer {self.layer!r} got {images} items on dimension 0, the batch has '
                f'{expected} images. Routing by image needs the image there, which RoI heads and '
                f'windowed attention do not keep: choose another target'
            )
        return images

    @property
    def image_of_item(self) -> Tensor | None:
        """(T,) image of each item, or None when the items are the images (T = B)."""
        images = self.num_images
        if self.items_per_image == 1:
            return None
        return torch.arange(images, device=self.device).repeat_interleave(self.items_per_image)
