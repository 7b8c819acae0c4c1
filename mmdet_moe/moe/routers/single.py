"""No choice: one expert for everything."""

from __future__ import annotations

from torch import Tensor

from mmdet_moe.moe.registry import ROUTERS
from mmdet_moe.moe.routers.base import Router
from mmdet_moe.moe.routing import Routing, RoutingContext


@ROUTERS.register
class SingleRouter(Router):
    """Every item to one expert with weight 1: what a layer of one adapter has for a router.

    Args:
        num_experts: E.
        expert: Which.

    Raises:
        ValueError: If there is no such expert.
    """

    needs_features = False
    learned = False

    def __init__(self, num_experts: int = 1, expert: int = 0) -> None:
        super().__init__(num_experts)
        if not 0 <= expert < num_experts:
            raise ValueError(f'SingleRouter: expert {expert} is not one of {num_experts}')
        self.expert = expert

    @property
    def keeps_dense_function(self) -> bool:
        return True

    def forward(self, items: Tensor | None, context: RoutingContext) -> Routing:
        return Routing.single(self.expert, context.num_items, self.num_experts)
