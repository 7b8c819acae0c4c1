"""Take the decision out of the routers' hands for a while: what is each expert worth?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmdet_moe.moe.layer import MoELayer, moe_layers
from mmdet_moe.moe.routing import Routing
from mmdet_moe.moe.soft import SlotRouting

AnyRouting = Routing | SlotRouting


@contextmanager
def forced_routing(
    model: nn.Module,
    *,
    expert: int | None = None,
    equal: bool = False,
    k: int | None = None,
    layers: Iterable[str] | None = None,
) -> Iterator[None]:
    r"""Within the context, MoE layers combine their E experts in a way that is told.

    ======== ===========================================================================
    expert=e every item to expert e alone, weight 1
    equal    every item to all E experts, weight 1/E each
    k=n      every item to the n experts of largest logit, weights
             :math:`e^{\ell_{te}} / \sum_{e' \text{ kept}} e^{\ell_{te'}}` (n may exceed the
             router's own k); of a router with weights but no logits, the n largest of its
             weights, scaled to the sum they had
    ======== ===========================================================================

    Routers run as ever and their balance losses and logits stay; only who takes which item is
    replaced. With granularity 'token' or 'patch' the items are those, with 'image' whole images.
    Expert numbers and E do not count shared experts, nor those of the router's own but for
    ``k``, where a router chooses among them too.

    Args:
        model: Anything that has MoE layers.
        expert: e.
        equal: See above.
        k: n.
        layers: Names of the layers, as :func:`~mmdet_moe.moe.moe_layers` has them; None: all.

    Raises:
        ValueError: Not exactly one of the three is asked for, no layer, an unknown layer, an expert
            or a number of experts that a layer has not; in the forward, for ``k`` of a router that
            gives no logits and fewer than n weights.

    Source: the ablations of arXiv 2204.10598 (single experts, equal weights, k = 1..E).

    Example:
        >>> with forced_routing(model, expert=0):
        ...     metrics = runner.test()
    """
    asked = [expert is not None, equal, k is not None]
    if sum(asked) != 1:
        raise ValueError('forced_routing: give exactly one of expert=e, equal=True and k=n')
    found = moe_layers(model)
    names = list(found) if layers is None else [layers] if isinstance(layers, str) else list(layers)
    unknown = [name for name in names if name not in found]
    if unknown or not names:
        raise ValueError(
            f'forced_routing: no MoE layer is called {unknown or "anything"}; there are '
            f'{list(found)}'
        )
    before = {name: found[name].forced for name in names}
    rules = {name: _rule(name, found[name], expert, k) for name in names}
    try:
        for name in names:
            found[name].forced = rules[name]
        yield
    finally:
        for name in names:
            found[name].forced = before[name]


def _rule(
    name: str, layer: MoELayer, expert: int | None, k: int | None
) -> Callable[[AnyRouting], Routing]:
    experts = layer.num_experts
    if expert is not None:
        if not 0 <= expert < experts:
            raise ValueError(
                f'forced_routing: MoE layer {name!r} has experts 0 to {experts - 1}, not {expert}'
            )
        return lambda routing: _to_one(routing, expert)
    if k is not None:
        if not 1 <= k <= experts:
            raise ValueError(
                f'forced_routing: k must be 1 to {experts} for MoE layer {name!r}, got {k}'
            )
        return lambda routing: _to_best(name, routing, k)
    return lambda routing: _to_all(routing, experts)


def _to_one(routing: AnyRouting, expert: int) -> Routing:
    return _keep(routing, Routing.single(expert, routing.num_items, routing.num_experts))


def _to_all(routing: AnyRouting, experts: int) -> Routing:
    like = _device_of(routing)
    weights = torch.full((routing.num_items, experts), 1 / experts, device=like)
    indices = torch.arange(experts, device=like).expand(routing.num_items, experts)
    return _keep(routing, Routing.from_topk(weights, indices, routing.num_experts))


def _to_best(name: str, routing: AnyRouting, k: int) -> Routing:
    if routing.logits is not None:
        best, indices = routing.logits.topk(k, dim=1)
        weights = best.softmax(1)
    elif isinstance(routing, Routing):
        dense = routing.to_dense()
        best, indices = dense.topk(k, dim=1)
        if not bool((best > 0).all()):
            raise ValueError(
                f'forced_routing: the router of MoE layer {name!r} gives no logits, and some item '
                f'has fewer than k={k} weights'
            )
        weights = best * (dense.sum(1, keepdim=True) / best.sum(1, keepdim=True))
    else:
        raise ValueError(
            f'forced_routing: the router of MoE layer {name!r} gives neither logits nor a choice '
            f'of experts (Soft MoE), so there is no best k={k}'
        )
    return _keep(routing, Routing.from_topk(weights, indices, routing.num_experts))


def _keep(routing: AnyRouting, forced: Routing) -> Routing:
    """The forced choice with what the router had to say besides."""
    forced.logits, forced.probabilities = routing.logits, routing.probabilities
    forced.noisy_logits, forced.noise_std = routing.noisy_logits, routing.noise_std
    forced.losses, forced.stats = routing.losses, routing.stats
    return forced


def _device_of(routing: AnyRouting) -> torch.device | None:
    known: tuple[Tensor | None, ...] = (routing.logits, getattr(routing, 'items', None))
    return next((tensor.device for tensor in known if tensor is not None), None)
