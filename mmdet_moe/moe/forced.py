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
    k=n      every item to the n experts of largest logit, with the weights that the router's
             own rule gives them (:meth:`~mmdet_moe.moe.Router.weigh`); of a router without
             logits, the n largest of its weights, scaled to the sum they had
    ======== ===========================================================================

    Where n is the router's own k the routing is left as it is: capacity, noise and all. Other n
    know neither. A router whose number of experts varies from item to item (expert choice, ReMoE)
    has no k of its own: no n of expert choice is the model as routed, and of ReMoE n = E is.

    **Sums of weights.** Renormalised weights sum to 1 for every n, so that n only changes who
    answers. Entries of the full softmax (no ``renormalize``, the default of k = 1; expert choice)
    sum to less, to the more the larger n is, and to 1 at n = E; sigmoids (Sinkhorn of k = 1, BASE)
    to up to n, ReLUs (ReMoE) to anything. There n changes the scale of the layer's output too.
    ``expert`` and ``equal`` always sum to 1: where the router's weights do not, the output has
    another scale than in training, and what that does to a metric says nothing of the experts.

    Routers run as ever and their balance losses and logits stay; only who takes which item is
    replaced. With granularity 'token' or 'patch' the items are those, with 'image' whole images.
    Expert numbers and E do not count shared experts, nor those of the router's own but for
    ``k``, where a router chooses among them too.

    Args:
        model: Anything that has MoE layers.
        expert: e.
        equal: See above.
        k: n.
        layers: Names of the layers, as they call themselves (``layer.name``) in messages and
            records; None: all.

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
    chosen = list(moe_layers(model).values())
    known = [layer.name for layer in chosen]
    if layers is not None:
        names = [layers] if isinstance(layers, str) else list(layers)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f'forced_routing: no MoE layer is called {unknown}; there are {known}')
        chosen = [layer for layer in chosen if layer.name in names]
    if not chosen:
        raise ValueError(f'forced_routing: no layer; there are {known}')
    before = [layer.forced for layer in chosen]
    rules = [_rule(layer, expert, k) for layer in chosen]
    try:
        for layer, rule in zip(chosen, rules, strict=True):
            layer.forced = rule
        yield
    finally:
        for layer, rule_before in zip(chosen, before, strict=True):
            layer.forced = rule_before


def _rule(layer: MoELayer, expert: int | None, k: int | None) -> Callable[[AnyRouting], Routing]:
    name, experts = layer.name, layer.num_experts
    if expert is not None:
        if not 0 <= expert < experts:
            raise ValueError(
                f'forced_routing: MoE layer {name!r} has experts 0 to {experts - 1}, not {expert}'
            )
        return lambda routing: _to_one(routing, expert)
    if k is not None:
        most = experts + len(layer.router.extra_experts)
        if not 1 <= k <= most:
            raise ValueError(
                f'forced_routing: k must be 1 to {most} for MoE layer {name!r}, got {k}'
            )
        return lambda routing: _to_best(layer, routing, k)
    return lambda routing: _to_all(routing, experts)


def _to_one(routing: AnyRouting, expert: int) -> Routing:
    return _keep(routing, Routing.single(expert, routing.num_items, routing.num_experts))


def _to_all(routing: AnyRouting, experts: int) -> Routing:
    like = _device_of(routing)
    weights = torch.full((routing.num_items, experts), 1 / experts, device=like)
    indices = torch.arange(experts, device=like).expand(routing.num_items, experts)
    return _keep(routing, Routing.from_topk(weights, indices, routing.num_experts))


def _to_best(layer: MoELayer, routing: AnyRouting, k: int) -> Routing:
    if not isinstance(routing, Routing):
        raise ValueError(
            f'forced_routing: the router of MoE layer {layer.name!r} gives neither logits nor a '
            f'choice of experts (Soft MoE), so there is no best k={k}'
        )
    if routing.k == k:
        return routing
    if routing.logits is not None:
        experts = routing.logits.topk(k, dim=1).indices
        weights = layer.router.weigh(routing.logits, experts)
        dense = weights.new_zeros(routing.logits.shape).scatter(1, experts, weights)
        return _keep(routing, Routing.from_dense(dense))
    dense = routing.to_dense()
    best, experts = dense.topk(k, dim=1)
    if not bool((best > 0).all()):
        raise ValueError(
            f'forced_routing: the router of MoE layer {layer.name!r} gives no logits, and some '
            f'item has fewer than k={k} weights'
        )
    weights = best * (dense.sum(1, keepdim=True) / best.sum(1, keepdim=True))
    return _keep(routing, Routing.from_topk(weights, experts, routing.num_experts))


def _keep(routing: AnyRouting, forced: Routing) -> Routing:
    """The forced choice with what the router had to say besides."""
    forced.logits, forced.probabilities = routing.logits, routing.probabilities
    forced.noisy_logits, forced.noise_std = routing.noisy_logits, routing.noise_std
    forced.losses, forced.stats = routing.losses, routing.stats
    return forced


def _device_of(routing: AnyRouting) -> torch.device | None:
    known: tuple[Tensor | None, ...] = (routing.logits, getattr(routing, 'items', None))
    return next((tensor.device for tensor in known if tensor is not None), None)
