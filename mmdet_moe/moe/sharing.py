"""One router for several layers: who decides, who follows, and how a recomputation finds it again.

The layers of one spec with ``share_router`` hold one router. The first of them (in the order of the
model) owns it, parameters and balance losses included; the others refer to it, so that there is one
set of parameters in the state dict, the optimiser and DDP, and copies of the model share theirs.

* 'call': the n-th call of a layer in a forward follows the decision that was taken at the n-th call
  of whichever layer came first. Two subnets of a head that run level by level go together.
* 'image': one decision per forward, taken on the input images (:attr:`RoutingState.images`).

Who decides accounts for the losses, once; every layer counts its own items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from mmdet_moe.moe.routing import Routing, RoutingContext, own_places
from mmdet_moe.moe.state import RoutingState

if TYPE_CHECKING:
    from mmdet_moe.moe.layer import MoELayer

SHARES = ('call', 'image')


@dataclass(frozen=True)
class _Call:
    """One call of a layer in the first pass of a forward."""

    shape: tuple[int, ...]
    with_grad: bool
    #: The decision it follows; None where it took one itself.
    follows: int | None


def shared_routing(
    layer: MoELayer,
    shape: tuple[int, ...],
    context: RoutingContext,
    decide: Callable[[], Routing],
) -> tuple[Routing, bool]:
    """The decision a layer goes by, and whether it took it itself.

    A recomputation under activation checkpointing repeats a decision that was taken in this layer,
    and follows the same one again where it followed. It knows the call by the shape of its input.

    Args:
        layer: A layer that shares its router.
        shape: Of its input.
        context: Of this call.
        decide: Runs the router.

    Raises:
        ValueError: The decision is about another number of items.
        RuntimeError: Reentrant checkpointing, which runs layers without gradients first: the router
            would not hear of the layers that follow. Or several calls with inputs of one shape,
            which a recomputation cannot tell apart.
    """
    state = context.state
    decisions = _decisions(layer, state)
    calls: list[_Call] = state.cached((layer, 'calls'), list)
    if context.recompute:
        call = _same_call(layer, calls, shape)
        return (decide(), True) if call.follows is None else (decisions[call.follows], False)
    number = len(calls) if layer.share == 'call' else 0
    decides = number not in decisions
    calls.append(_Call(shape, torch.is_grad_enabled(), None if decides else number))
    if decides:
        decisions[number] = decide()
    routing = decisions[number]
    if routing.num_items != context.num_items:
        raise ValueError(
            f'MoE layer {layer.name!r} shares its router, which decided about {routing.num_items} '
            f'items, and has {context.num_items}: layers that share need the same items'
        )
    return routing, decides


def image_features(state: RoutingState, size: int, maps: bool, name: str) -> Tensor:
    """What a router on the input images sees: (B, 3, h, w) with h, w <= ``size``, or its means; of
    each image without the padding of the batch.

    Raises:
        RuntimeError: If this forward came without images.
    """
    images = state.images
    if images is None:
        raise RuntimeError(
            f"MoE layer {name!r}: share_router='image' decides on the input images: call "
            f'RoutingState.begin(..., images=inputs)'
        )
    height, width = images.shape[-2:]
    parts = [images] if state.extents is None else own_places(images, state.extents)
    if not maps:
        return torch.cat([part.mean((2, 3)) for part in parts])
    sides = (min(height, size), min(width, size))
    return torch.cat([F.adaptive_avg_pool2d(part, sides) for part in parts])


def let_go_of_graphs(layer: MoELayer, state: RoutingState) -> None:
    """Keep the decisions for a recomputation without what they were computed from.

    The weights still ask for a gradient: a checkpoint compares what the two passes save.
    """
    decisions = _decisions(layer, state)
    for number, routing in decisions.items():
        if not (isinstance(routing, Routing) and routing.weights is not None):
            continue
        if routing.weights.grad_fn is not None:
            weights = routing.weights.detach().requires_grad_()
            decisions[number] = replace(
                routing, weights=weights, logits=None, noisy_logits=None, probabilities=None,
                noise_std=None, losses={}, _moved=None,
            )  # fmt: skip


def _decisions(layer: MoELayer, state: RoutingState) -> dict[int, Routing]:
    return state.cached((layer.router, 'decisions'), dict)


def _same_call(layer: MoELayer, calls: list[_Call], shape: tuple[int, ...]) -> _Call:
    found = [call for call in calls if call.shape == shape]
    if any(not call.with_grad for call in found):
        raise RuntimeError(
            f'MoE layer {layer.name!r} shares its router and is under reentrant activation '
            f'checkpointing, in which the router would not hear of the layers that follow it: use '
            f'checkpoint(..., use_reentrant=False), or checkpoint other modules (with_cp=True and '
            f'activation_checkpointing of mmdet and mmengine are reentrant)'
        )
    if len({call.follows for call in found}) != 1:
        raise RuntimeError(
            f'MoE layer {layer.name!r} shares its router and was called {len(found)} times with '
            f'inputs of shape {shape}: activation checkpointing cannot tell which call it repeats'
        )
    return found[0]
