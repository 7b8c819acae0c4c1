"""The static plan: which experts serve an image was decided before training."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmdet_moe.moe.registry import ROUTERS
from mmdet_moe.moe.routers.base import Router
from mmdet_moe.moe.routing import Routing, RoutingContext

if TYPE_CHECKING:
    from mmdet_moe.moe.state import RoutingState
    from mmdet_moe.planning import ExpertPlan

UNKNOWN = ('nearest', 'mixture', 'error')


@ROUTERS.register
class PlanRouter(Router):
    r"""Route every image to the experts of its dataset, with the plan's weights.

    No gate is computed and nothing is learned. A batch whose images share one expert is that
    expert's plain call. An image whose domain is unknown (None, or not in the plan) is routed by
    its embedding z, computed by the model's frozen embedder, against the plan's prototypes
    :math:`\mu_i` (the datasets' mean embeddings; both of length 1):

    * ``nearest``: as an image of dataset :math:`\arg\max_i z \cdot \mu_i`;
    * ``mixture``: with weights :math:`\sum_i p_i W_{ie}`, where
      :math:`p_i \propto \exp(\kappa\, z \cdot \mu_i)` is the posterior over datasets, kappa the
      plan's concentration (as DEMix does, arXiv 2108.05036, section 5.1);
    * ``error``: refuse.

    The weights (B, E) are computed once per forward for all layers with the same plan.

    Args:
        plan: Path of a plan file, its content as a dict, an ``ExpertPlan``, or a map made by hand,
            ``dict(bccd='e0', cheetah=dict(e0=0.5, e1=0.5))``.
        unknown: What to do with an unknown domain.
        num_experts: To check against the plan's; by default the plan's.

    Source: GEM, arXiv 2604.18842.
    """

    needs_features = False
    learned = False
    granularity = 'image'

    def __init__(
        self,
        plan: str | Mapping[str, Any] | ExpertPlan,
        unknown: str = 'nearest',
        num_experts: int | None = None,
    ) -> None:
        if unknown not in UNKNOWN:
            raise ValueError(f'PlanRouter: unknown must be one of {UNKNOWN}, got {unknown!r}')
        loaded = load_plan(plan)
        if num_experts is not None and num_experts != len(loaded.experts):
            raise ValueError(
                f'PlanRouter: the layer has {num_experts} experts, the plan {len(loaded.experts)} '
                f'({", ".join(loaded.experts)})'
            )
        super().__init__(len(loaded.experts))
        self.unknown = unknown
        self.source = plan if isinstance(plan, str) else 'the plan'
        self.datasets: tuple[str, ...] = tuple(loaded.datasets)
        self.experts: tuple[str, ...] = tuple(loaded.experts)
        weights = np.asarray(loaded.weights_matrix(), dtype=np.float64)
        # A plan's rows sum to 1 within 1e-6; the dense function is kept to 1e-10.
        weights = weights / weights.sum(axis=1, keepdims=True)
        # Plain tensors and not buffers: the plan is the config's, not the checkpoint's.
        self._weights = torch.from_numpy(weights)
        self._row = {name: i for i, name in enumerate(self.datasets)}
        self._means: Tensor | None = None
        self._concentration = 1.0
        if loaded.prototypes is not None:
            self._means, self._concentration = self._read_prototypes(loaded.prototypes)
        content = [self.datasets, weights.tolist(), unknown]
        content.append(None if self._means is None else self._means.tolist())
        content.append(self._concentration)
        self._key = 'plan:' + hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _read_prototypes(self, prototypes: Mapping[str, Any]) -> tuple[Tensor, float]:
        mean = prototypes['mean']
        missing = [name for name in self.datasets if name not in mean]
        if missing:
            raise ValueError(f'{self.source}: no prototype for {missing}')
        means = torch.tensor([list(mean[name]) for name in self.datasets], dtype=torch.float32)
        concentration = float(prototypes.get('concentration', 1.0))
        if not math.isfinite(concentration) or concentration <= 0:
            raise ValueError(f'{self.source}: concentration must be > 0, got {concentration}')
        return means, concentration

    @property
    def keeps_dense_function(self) -> bool:
        return True

    @property
    def has_prototypes(self) -> bool:
        """Whether images without a domain can be routed."""
        return self._means is not None

    def check_datasets(self, domains: Sequence[str], held_out: bool = False) -> None:
        """Refuse data whose domains are not the plan's datasets.

        Args:
            domains: The data's domains.
            held_out: Let the data have domains that the plan has not.

        Raises:
            ValueError: One error that lists both sides.
        """
        ours, theirs = set(self.datasets), set(domains)
        if ours == theirs or (held_out and ours < theirs):
            return
        parts = [f'the plan ({self.source}) and the data do not have the same datasets']
        if theirs - ours:
            parts.append(f'only in the data: {sorted(theirs - ours)}')
        if ours - theirs:
            parts.append(f'only in the plan: {sorted(ours - theirs)}')
        parts.append(f'plan: {sorted(ours)}; data: {sorted(theirs)}')
        raise ValueError('; '.join(parts))

    def experts_of(self, dataset: str) -> list[int]:
        """Numbers of the experts that serve ``dataset``."""
        return self._weights[self._row[dataset]].nonzero().flatten().tolist()

    def assignment(self) -> dict[str, dict[str, float]]:
        """Dataset -> expert -> combine weight, by name, as the plan file has it."""
        return {
            name: {self.experts[e]: float(self._weights[row, e]) for e in self.experts_of(name)}
            for name, row in self._row.items()
        }

    def image_weights(self, context: RoutingContext) -> Tensor:
        """(B, E) weights of the batch's images, on the CPU, computed once per forward."""
        state, images = context.state, context.num_images
        return state.cached(
            (self._key, images), lambda: self._image_weights(state.domains, images, context)
        )

    def posterior_weights(self, context: RoutingContext) -> Tensor:
        """(B, E) weights of the batch's images by their embeddings alone, on the CPU, once per
        forward: what ``unknown`` makes of images whose domain nobody told."""
        state, images = context.state, context.num_images
        return state.cached(
            (self._key, images, 'posterior'), lambda: self._image_weights(None, images, context)
        )

    def told_weights(self, context: RoutingContext) -> tuple[Tensor, Tensor]:
        """What the plan says where the domain is told: (B, E) weights, zeros elsewhere, and (B,)
        whether it is; on the CPU, no embedding is asked for."""
        images = context.num_images
        domains = context.state.domains or (None,) * images
        rows = torch.tensor([-1 if n is None else self._row.get(n, -1) for n in domains]).long()
        known = rows >= 0
        return self._weights[rows.clamp(min=0)] * known[:, None], known

    def _image_weights(
        self, domains: Sequence[str | None] | None, images: int, context: RoutingContext
    ) -> Tensor:
        names: list[str | None] = [None] * images if domains is None else list(domains)
        # -1: a domain the plan does not know.
        rows = torch.tensor([-1 if n is None else self._row.get(n, -1) for n in names]).long()
        known, unknown = rows >= 0, (rows < 0).nonzero().flatten().tolist()
        if not unknown:
            return self._weights[rows]
        where = f'image {unknown[0]} of the batch, domain {names[unknown[0]]!r}'
        if self.unknown == 'error':
            raise ValueError(
                f'{where}: not one of the datasets of {self.source}: {list(self.datasets)} '
                f"(PlanRouter's unknown='error')"
            )
        means, concentration = self._prototypes(context.state)
        if means is None:
            raise ValueError(
                f'{where}: not in {self.source}, which has no prototypes to route it by '
                f'({self.unknown!r}). Known: {list(self.datasets)}'
            )
        z = context.state.embeddings()[unknown].float().cpu()
        if z.shape[1] != means.shape[1]:
            raise ValueError(
                f'the embedder gives {z.shape[1]} numbers, the prototypes of {self.source} have '
                f'{means.shape[1]}: they come from different embedders'
            )
        similarity = torch.nn.functional.normalize(z, dim=1) @ means.t()
        weights = torch.zeros(images, self.num_experts, dtype=self._weights.dtype)
        weights[known] = self._weights[rows[known]]
        if self.unknown == 'nearest':
            weights[unknown] = self._weights[similarity.argmax(1)]
        else:
            posterior = (concentration * similarity.double()).softmax(1)
            weights[unknown] = posterior @ self._weights
        return weights

    def _prototypes(self, state: RoutingState) -> tuple[Tensor | None, float]:
        """(m, d) prototypes of the datasets and the concentration: the state's, else the plan's."""
        if state.prototypes is None:
            return self._means, self._concentration
        means, concentration = state.prototypes
        missing = [name for name in self.datasets if name not in means]
        if missing:
            raise ValueError(f'no prototype was measured for {missing}, datasets of {self.source}')
        return torch.stack([means[name].float().cpu() for name in self.datasets]), concentration

    def forward(self, items: Tensor | None, context: RoutingContext) -> Routing:
        key = (self._key, 'routing', context.num_items, context.items_per_image, context.device)
        return context.state.cached(key, lambda: self._route(context))

    def _route(self, context: RoutingContext) -> Routing:
        weights = self.image_weights(context)
        if context.items_per_image != 1:
            weights = weights.repeat_interleave(context.items_per_image, dim=0)
        return Routing.from_dense(weights)

    def extra_repr(self) -> str:
        return f'{len(self.datasets)} datasets -> {self.num_experts} experts, {self.unknown}'


def load_plan(plan: str | Mapping[str, Any] | ExpertPlan) -> ExpertPlan:
    """An ``ExpertPlan`` from a path, a plan as a dict, a map made by hand, or one itself."""
    from mmdet_moe.planning import ExpertPlan

    if isinstance(plan, ExpertPlan):
        return plan
    if isinstance(plan, Mapping):
        if 'assignment' not in plan:
            return ExpertPlan.from_assignment(plan)
        return ExpertPlan.from_dict(dict(plan))
    return ExpertPlan.load(plan)
