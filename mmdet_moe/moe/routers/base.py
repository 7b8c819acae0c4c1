"""What a router is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mmdet_moe.moe.routing import Routing, RoutingContext
from mmdet_moe.moe.soft import SlotRouting

if TYPE_CHECKING:
    from mmdet_moe.moe.layer import MoELayer


class Router(nn.Module):
    """Maps items to a :class:`~mmdet_moe.moe.routing.Routing`.

    A new router is one file: subclass this, decorate with ``@ROUTERS.register``, implement
    :meth:`forward` (and :meth:`reset_parameters` if it has parameters), import it in
    ``routers/__init__.py``.

    Args:
        num_experts: E.
    """

    #: Whether :meth:`forward` wants item features (T, d). Where False, none are computed.
    needs_features: bool = True
    #: Whether these are the items themselves, maps (T, C, H, W), and not their means over places.
    needs_maps: bool = False
    #: Whether it asks for the embeddings of images whose domain is told, too.
    needs_embeddings: bool = False
    #: Whether it learns; balance losses are refused where it does not.
    learned: bool = True
    #: Whether it selects experts for items; balance losses are refused where it does not.
    selects: bool = True
    #: Whether its routings come with probabilities; losses of them are refused where not.
    has_probabilities: bool = True
    #: The granularity a layer takes when its config names none; None leaves it to the target.
    granularity: str | None = None
    #: The granularities it can do; None: any.
    granularities: Sequence[str] | None = None

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f'{type(self).__name__}: num_experts must be >= 1, got {num_experts}')
        self.num_experts = num_experts

    @property
    def keeps_dense_function(self) -> bool:
        """Whether weights sum to 1 and no item is dropped, so that experts upcycled from one dense
        module compute what that module did."""
        return False

    @property
    def extra_experts(self) -> Sequence[nn.Module] | nn.ModuleList:
        """Experts of the router's own, numbered after the layer's E. A dense checkpoint, upcycling
        and ``num_experts`` know nothing of them; their weights are the router's."""
        return ()

    def attach(self, layer: MoELayer) -> None:
        """Learn of the layer this router is in, once it is complete; refuse one that does not suit.

        A router with running state of its own (buffers that move once per forward) has a method
        ``settle(state)``, which :meth:`RoutingState.collect` calls.
        """

    def forward(self, items: Tensor | None, context: RoutingContext) -> Routing | SlotRouting:
        """Route.

        Args:
            items: (T, d) features, (T, C, H, W) maps where :attr:`needs_maps`, or None where
                :attr:`needs_features` is False.
            context: What else there is to know.
        """
        raise NotImplementedError

    def weigh(self, logits: Tensor, experts: Tensor) -> Tensor:
        """The combine weights this router's rule gives to a choice that was made elsewhere; here
        the softmax over the chosen. :func:`~mmdet_moe.moe.forced_routing` asks.

        Args:
            logits: (T, E) as the routing has them.
            experts: (T, n) long, n different experts of each item.

        Returns:
            (T, n); 0 where an item is not to go.
        """
        return logits.gather(1, experts).softmax(1)

    def reset_parameters(self) -> None:
        """Initialise the parameters. Also called after the model's own ``init_weights``, which
        initialises whatever it finds."""

    def check_datasets(self, domains: Sequence[str], held_out: bool = False) -> None:
        """Refuse data this router was not made for; anything goes here."""
