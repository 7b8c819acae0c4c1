"""A learned router that starts as the plan and may leave it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mmdet_moe.moe.registry import ROUTERS
from mmdet_moe.moe.routers.gated import DETACHED, SelectingRouter, chosen_entries
from mmdet_moe.moe.routers.plan import PlanRouter
from mmdet_moe.moe.routing import Routing, RoutingContext, to_device

if TYPE_CHECKING:
    from mmdet_moe.planning import ExpertPlan

DOMAINS = ('train', 'always', 'never')


@ROUTERS.register
class PlanPriorRouter(SelectingRouter):
    r"""Bayes' rule with the plan as the prior over experts and the gate as the evidence.

    .. math::
        q_{be} &= \sum_i \pi_{bi} W_{ie}, \qquad
        \tilde q = (1 - s)\, q + s / E \\
        \ell_{te} &= \ln \tilde q_{b(t)\, e} + (W_g x_t)_e, \qquad
        p = \mathrm{softmax}(\ell) \propto \tilde q \odot e^{W_g x}

    W are the plan's weights, :math:`\pi_b` says which dataset image b is of: all on its domain
    where that is told, else the posterior :math:`\pi_i \propto \exp(\kappa\, z \cdot \mu_i)` of its
    embedding z under the plan's prototypes, as ``PlanRouter`` with ``unknown='mixture'``. So no
    domain is needed at test.

    * The gate starts at zero: at step 0 p is the plan's row, smoothed. The k best experts of a row
      of k experts are the plan's, with the plan's weights up to s.
    * The smoothing s is what lets it leave: an expert outside the plan is :math:`\ln(E/s)` logits
      behind one of weight 1 (5.7 for s = 0.01 and E = 3), a finite distance
      that the data can overcome; s = 0 would forbid it.

    With ``renormalize`` (the default) the k weights sum to 1; with k = 1 the weight is
    :math:`p / \mathrm{const}(p)`, 1 in value, while the gate gets the gradient of :math:`\ln p`.

    Args:
        in_channels: d.
        plan: As ``PlanRouter``'s. It needs prototypes unless ``domains='always'``.
        num_experts: To check against the plan's; by default the plan's.
        k: Experts per item; None: the largest number of experts that the plan gives a dataset.
        smoothing: s.
        domains: When a told domain is used: in 'train'ing only (so that testing does not depend on
            whether it was told), 'always', or 'never' (the posterior in training too).
        renormalize: See above.
        options: Of :class:`~mmdet_moe.moe.routers.gated.SelectingRouter` and ``GatedRouter``; the
            gate is linear or conv.

    Source: the plan: GEM, arXiv 2604.18842; the posterior: DEMix, arXiv 2108.05036, section 5.1.
    """

    def __init__(
        self,
        in_channels: int,
        plan: str | Mapping[str, Any] | ExpertPlan,
        num_experts: int | None = None,
        k: int | None = None,
        *,
        smoothing: float = 0.01,
        domains: str = 'train',
        renormalize: bool | str | None = None,
        **options: Any,
    ) -> None:
        if domains not in DOMAINS:
            raise ValueError(f'PlanPriorRouter: domains must be one of {DOMAINS}, got {domains!r}')
        if not 0 < smoothing < 1:
            raise ValueError(f'PlanPriorRouter: smoothing must be in (0, 1), got {smoothing}')
        if options.get('kind') == 'cosine':
            raise ValueError('PlanPriorRouter: the gate must be linear or conv, to start at zero')
        table = PlanRouter(plan, unknown='mixture', num_experts=num_experts)
        if domains != 'always' and not table.has_prototypes:
            raise ValueError(
                f'PlanPriorRouter: {table.source} has no prototypes, so images without a domain '
                f"cannot be routed; make them with the planner, or give domains='always'"
            )
        if k is None:
            k = max(len(table.experts_of(name)) for name in table.datasets)
        renormalize = True if renormalize is None else renormalize
        super().__init__(in_channels, table.num_experts, k, renormalize=renormalize, **options)
        self.plan = table
        self.needs_embeddings = domains != 'always'
        self.smoothing = smoothing
        self.domains = domains
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A gate of zeros: the plan decides."""
        super().reset_parameters()
        nn.init.zeros_(self.gate)

    def check_datasets(self, domains: Sequence[str], held_out: bool = False) -> None:
        self.plan.check_datasets(domains, held_out)

    def prior(self, context: RoutingContext) -> Tensor:
        """(B, E) the smoothed plan's probabilities of each image, float64 on the CPU."""
        told = self.domains == 'always' or (self.domains == 'train' and context.training)
        q = self.plan.image_weights(context) if told else self.plan.posterior_weights(context)
        return (1 - self.smoothing) * q + self.smoothing / self.num_experts

    def route(self, x: Tensor, logits: Tensor, context: RoutingContext) -> Routing:
        prior = to_device(self.prior(context).log(), logits.device, logits.dtype)
        if context.items_per_image != 1:
            prior = prior.repeat_interleave(context.items_per_image, dim=0)
        logits = context.constrain(logits + prior)
        p = logits.softmax(1)
        chosen, indices = logits.topk(self.k, dim=1)
        if self.renormalize is True and self.k > 1:
            weights = chosen.softmax(1)
        else:
            weights = chosen_entries(p, indices, DETACHED if self.renormalize else False)
        return self.assign(weights, indices, context, logits=logits, probabilities=p)
