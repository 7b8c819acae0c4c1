"""What learned routers have in common: gate, precision, jitter, z-loss, top-k and capacity.

Axes: T items, E experts, k selected per item, d channels.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdet_moe.moe.routers.base import Router
from mmdet_moe.moe.routing import Routing, RoutingContext, group_starts, on_host, own_places

if TYPE_CHECKING:
    from mmdet_moe.moe.layer import MoELayer

KINDS = ('linear', 'cosine', 'conv')
ACTIVATIONS = {'relu': F.relu}
#: Whose items an expert's capacity is a share of.
GROUPS = ('batch', 'image')
CAPACITY_RULES = ('topk', 'gshard')
#: What an expert takes of a group at least, in GShard's rule.
GSHARD_MIN_CAPACITY = 4
#: As ``renormalize``: the sum that the weights are divided by is a constant to the gradient.
DETACHED = 'detached'


class GatedRouter(Router):
    r"""Base of routers with a gate: subclass it and implement :meth:`route`.

    .. math::
        \ell &= W_g x \;(+\; b_g) && \text{(linear)} \\
        \ell_e &= \tau \cos(W x + b, v_e), \quad \tau = \exp(\min(t, \ln 100))
            && \text{(cosine)} \\
        \ell &= W_g\, \mathrm{mean}_{hw}\, a(K * x) \;(+\; b_g) && \text{(conv)}

    With items that are maps, x of the linear and the cosine gate is their mean over places, so that
    'linear' is the CNN paper's GAP-FC. 'conv' is its Conv-GAP-FC and takes the maps themselves: K
    is a 3x3 convolution to ``projection`` channels, or two with a ReLU between, a the identity or
    an activation. What stands behind the mean, (T, projection), is what a learned noise gate sees.

    Everything from the gate to the weights is computed in float32 (float64 for float64 items),
    under autocast too: in bfloat16 two close logits are one.

    Args:
        in_channels: d.
        num_experts: E.
        kind: 'linear', 'cosine' or 'conv'.
        projection: Width the cosine gate projects to; channels of the conv gate's convolutions.
        bias: Whether the linear and the conv gate have b_g (zero at first).
        convs: Convolutions of the conv gate, 1 or 2.
        activation: a, after the last one: None or 'relu'.
        temperature: Initial t of the cosine gate; tau starts at exp(t). The default is ln 2, so
            that tau starts at 2.
        jitter: In training, each number the gate sees is multiplied by a uniform draw from
            [1 - jitter, 1 + jitter]; the experts see the items as they are.
        z_loss: Factor of :func:`router_z_loss` (1e-3 in the paper) of the gate's logits, in the log
            as ``loss_moe_router_z``.

    Raises:
        ValueError: At construction for impossible options; in the forward for items of another
            width than the gate's.

    Source: jitter: Fedus et al. 2022 (Switch Transformer, arXiv 2101.03961), section 2.4 and
    appendix; float32 router: the same, section 2.4; cosine gate: Chi et al. 2022 (X-MoE, arXiv
    2204.09179), section 3; GAP-FC and Conv-GAP-FC: Pavlitska et al. (arXiv 2204.10598); its two
    convolutions: the same group's PatchConvMoE.
    """

    #: Whose items compete for an expert's capacity, where it has one: of :data:`GROUPS`.
    group: str | None = None

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        *,
        kind: str = 'linear',
        projection: int = 256,
        temperature: float = math.log(2.0),
        bias: bool = False,
        convs: int = 1,
        activation: str | None = None,
        jitter: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__(num_experts)
        if kind not in KINDS:
            raise self.refusal(f'kind must be one of {KINDS}, got {kind!r}')
        if bias and kind == 'cosine':
            raise self.refusal(
                'bias is for the linear and the conv gate, the cosine one has its own'
            )
        if convs not in (1, 2):
            raise self.refusal(f'convs must be 1 or 2, got {convs!r}')
        if activation is not None and activation not in ACTIVATIONS:
            raise self.refusal(
                f'activation must be None or one of {tuple(ACTIVATIONS)}, got {activation!r}'
            )
        if kind != 'conv' and (convs != 1 or activation is not None):
            raise self.refusal(f"convs and activation are the conv gate's, kind is {kind!r}")
        if not 0 <= jitter < 1:
            raise self.refusal(f'jitter must be in [0, 1), got {jitter}')
        if not (math.isfinite(z_loss) and z_loss >= 0):
            raise self.refusal(f'z_loss must be >= 0, got {z_loss}')
        self.in_channels = in_channels
        self.kind = kind
        self.needs_maps = kind == 'conv'
        #: d of what :meth:`route` gets.
        self.gate_channels = projection if kind == 'conv' else in_channels
        self.num_convs = convs
        self.activation = activation
        self.jitter = jitter
        self.z_loss = z_loss
        self.initial_temperature = temperature
        self.bias: nn.Parameter | None = nn.Parameter(torch.empty(num_experts)) if bias else None
        self.make_gate(projection)

    def attach(self, layer: MoELayer) -> None:
        """Refuse items that compete within their image where each is a whole image."""
        super().attach(layer)
        if self.group == 'image' and layer.granularity == 'image':
            raise self.refusal(
                f"group='image' needs tokens as items, those of {layer.name!r} are whole images; "
                f"group='batch'"
            )

    def refusal(self, message: str) -> ValueError:
        """An error that names the class."""
        return ValueError(f'{type(self).__name__}: {message}')

    def check_capacity(self, training: float | None, test: float | None, prioritised: bool) -> None:
        """Refuse impossible capacity factors, and a priority where nothing is dropped."""
        for name, factor in (('capacity_factor', training), ('test_capacity_factor', test)):
            if factor is not None and not (math.isfinite(factor) and factor > 0):
                raise self.refusal(f'{name} must be > 0 or None, got {factor}')
        if prioritised and training is None and test is None:
            raise self.refusal('prioritised drops by priority, but there is no capacity_factor')

    def make_gate(self, projection: int) -> None:
        """Create the gate's parameters; :meth:`reset_parameters` fills them."""
        if self.kind == 'cosine':
            self.project = nn.Linear(self.in_channels, projection)
            self.expert_embeddings = nn.Parameter(torch.empty(self.num_experts, projection))
            self.temperature = nn.Parameter(torch.empty(()))
            return
        self.gate = nn.Parameter(torch.empty(self.num_experts, self.gate_channels))
        if self.kind == 'conv':
            widths = [self.in_channels, *[projection] * self.num_convs]
            self.convs = nn.ModuleList(
                nn.Conv2d(taken, given, 3, padding=1) for taken, given in itertools.pairwise(widths)
            )

    def reset_parameters(self) -> None:
        """A small normal gate: nearly uniform at first."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.kind == 'cosine':
            self.project.reset_parameters()
            nn.init.normal_(self.expert_embeddings, std=0.01)
            nn.init.constant_(self.temperature, self.initial_temperature)
            return
        nn.init.normal_(self.gate, std=0.01)
        if self.kind == 'conv':
            for conv in self.convs:
                conv.reset_parameters()  # type: ignore[operator]

    def pool(self, maps: Tensor) -> Tensor:
        """(T, projection) the conv gate's features of (T, C, H, W) maps."""
        if not maps.numel():  # no place to take a mean over
            return maps.new_zeros(maps.shape[0], self.gate_channels)
        x = maps
        for i, conv in enumerate(self.convs):
            assert isinstance(conv, nn.Conv2d) and conv.bias is not None
            weight, bias = conv.weight.to(x.dtype), conv.bias.to(x.dtype)
            if self.num_convs == 1 and self.activation is None:
                return mean_of_conv(x, weight, bias)
            x = F.relu(x) if i else x
            x = F.conv2d(x, weight, bias, padding=1)
        if self.activation is not None:
            x = ACTIVATIONS[self.activation](x)
        return x.mean((2, 3))

    def logits(self, x: Tensor) -> Tensor:
        """(T, E) scores of (T, gate_channels) features."""
        if self.kind != 'cosine':
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.gate.to(x.dtype), bias)
        projected = F.linear(x, self.project.weight.to(x.dtype), self.project.bias.to(x.dtype))
        cosine = F.normalize(projected, dim=1) @ F.normalize(self.expert_embeddings.to(x.dtype)).t()
        return cosine * self.temperature.to(x.dtype).clamp(max=math.log(100.0)).exp()

    def forward(self, items: Tensor | None, context: RoutingContext) -> Routing:
        assert items is not None
        if self.needs_maps and items.ndim != 4:
            raise ValueError(
                f'the conv gate of {context.layer!r} takes maps (B, C, H, W), the items have shape '
                f"{tuple(items.shape)}; use kind='linear'"
            )
        channels = items.shape[1 if self.needs_maps else -1]
        if channels != self.in_channels:
            raise ValueError(
                f'the router of {context.layer!r} was made for {self.in_channels} channels and '
                f'got {channels}'
            )
        with torch.autocast(items.device.type, enabled=False):
            x = items if items.dtype == torch.float64 else items.float()
            if context.training and self.jitter:
                x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
            if self.needs_maps:
                parts = [x] if context.extents is None else own_places(x, context.extents)
                x = torch.cat([self.pool(part) for part in parts])
            logits = self.complete(self.logits(x), context)
            routing = self.route(x, logits, context)
            if context.training and self.z_loss:
                # Of the raw logits: one that a constraint has put to -inf is none of the gate's.
                routing.losses['router_z'] = self.z_loss * router_z_loss(logits)
        return routing

    def complete(self, logits: Tensor, context: RoutingContext) -> Tensor:
        """The gate's (T, E) logits with what else belongs to them."""
        return logits

    def route(self, x: Tensor, logits: Tensor, context: RoutingContext) -> Routing:
        """Select. Call ``context.constrain(logits)`` first, and give the routing the result.

        Args:
            x: (T, gate_channels) what the gate scored, float32 or float64.
            logits: (T, E) as :meth:`logits` and :meth:`complete` gave them.
            context: What else there is to know.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f'{self.in_channels} -> {self.num_experts}, kind={self.kind}'


class SelectingRouter(GatedRouter):
    r"""Base of gated routers that give each item k experts, within a capacity if one is set.

    With a capacity factor c an expert takes at most C of each group of n items,

    .. math:: C = \lceil c\,n k / E \rceil \;\text{(topk)}, \qquad
        C = \max(\min(n, \lfloor c\,n / E \rfloor), 4) \;\text{(gshard)};

    what is over is dropped (:func:`drop_over_capacity`), and an item all of whose choices are
    dropped gives zeros. A group is all items of a call, or those of one image: then what an image
    becomes does not depend on the rest of its batch. Without a factor (the default) nothing is
    dropped.

    Args:
        in_channels: d.
        num_experts: E.
        k: Experts per item.
        renormalize: Whether the k weights are made to sum to 1. None means k > 1: with k = 1 the
            weight would be 1 whatever the router says, and no gradient would reach it but that of
            the balance losses.
        capacity_factor: c in training; None: dropless.
        test_capacity_factor: c in evaluation; None: dropless.
        prioritised: Over the capacity, keep the items whose first choice has the largest
            probability (batch-prioritised routing) and not those that come first.
        group: What the capacity is of: 'batch', all items of a call, or 'image'.
        capacity_rule: 'topk' or 'gshard', see above.
        options: Of :class:`GatedRouter`.

    Source: capacity: Lepikhin et al. 2021 (GShard, arXiv 2006.16668), algorithm 1; its rule with
    factors and a minimum: Li et al. 2022 (SF-MoE, arXiv 2206.04046 v2), code; priority: Riquelme et
    al. 2021 (V-MoE, arXiv 2106.05974), section 4.1.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        k: int = 2,
        *,
        renormalize: bool | str | None = None,
        capacity_factor: float | None = None,
        test_capacity_factor: float | None = None,
        prioritised: bool = False,
        group: str = 'batch',
        capacity_rule: str = 'topk',
        **options: Any,
    ) -> None:
        super().__init__(in_channels, num_experts, **options)
        if not 1 <= k <= num_experts:
            raise self.refusal(f'k must be 1 to {num_experts} experts, got {k}')
        self.check_capacity(capacity_factor, test_capacity_factor, prioritised)
        if isinstance(renormalize, str) and renormalize != DETACHED:
            raise self.refusal(f'renormalize must be a bool or {DETACHED!r}, got {renormalize!r}')
        if group not in GROUPS:
            raise self.refusal(f'group must be one of {GROUPS}, got {group!r}')
        if capacity_rule not in CAPACITY_RULES:
            raise self.refusal(
                f'capacity_rule must be one of {CAPACITY_RULES}, got {capacity_rule!r}'
            )
        self.k = k
        self.renormalize: bool | str = k > 1 if renormalize is None else renormalize
        self.group = group
        self.capacity_rule = capacity_rule
        self.capacity_factor = capacity_factor
        self.test_capacity_factor = test_capacity_factor
        self.prioritised = prioritised

    @property
    def keeps_dense_function(self) -> bool:
        dropless = self.capacity_factor is None and self.test_capacity_factor is None
        return bool(self.renormalize) and dropless

    def capacity(self, num_items: int, training: bool) -> int | None:
        """Items of a group of ``num_items`` that an expert may take, or None for any number."""
        factor = self.capacity_factor if training else self.test_capacity_factor
        if factor is None:
            return None
        if self.capacity_rule == 'gshard':
            return gshard_capacity(num_items, self.num_experts, factor)
        return expert_capacity(num_items, self.num_experts, self.k, factor)

    def weigh(self, logits: Tensor, experts: Tensor) -> Tensor:
        """The softmax over the chosen, without ``renormalize`` their entries of the full one."""
        if self.renormalize is True:
            return super().weigh(logits, experts)
        return chosen_entries(logits.softmax(1), experts, self.renormalize)

    def assign(
        self,
        weights: Tensor,
        indices: Tensor,
        context: RoutingContext,
        *,
        dropping: bool = False,
        **record: Any,
    ) -> Routing:
        """The routing of a choice, after the capacity.

        Args:
            weights: (T, k) combine weights, best choice first.
            indices: (T, k) the experts.
            context: Tells training from evaluation.
            dropping: Whether ``indices`` has negative entries already.
            record: Further arguments of ``Routing.from_topk``; ``logits`` and ``probabilities``
                among them.
        """
        if context.may_close:
            # With fewer experts open than k, the choice has closed ones in it, with weight 0.
            closed = record['logits'].gather(1, indices.clamp(min=0)).isneginf()
            if not on_host(closed) or bool(closed.any()):
                indices = indices.masked_fill(closed, -1)
                dropping = True
        per_group = context.num_items
        if self.group == 'image':
            per_group //= max(context.num_images, 1)
        capacity = self.capacity(per_group, context.training)
        if capacity is not None:
            priority = None
            if self.prioritised:
                # The gate's own word: renormalised weights of one choice are all 1.
                gates = record['probabilities'].detach()
                priority = gates.gather(1, indices[:, :1]).squeeze(1)
            indices = drop_over_capacity(indices, capacity, self.num_experts, priority, per_group)
            dropping = True
        return Routing.from_topk(weights, indices, self.num_experts, dropping=dropping, **record)

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f'k={self.k}', f'renormalize={self.renormalize}']
        if self.capacity_factor is not None or self.test_capacity_factor is not None:
            parts.append(f'capacity={self.capacity_factor}/{self.test_capacity_factor}')
            parts.append(f'of each {self.group} by {self.capacity_rule}')
        return ', '.join(parts)


# Pure functions


def mean_of_conv(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    r"""The mean over places of a 3x3 convolution with padding 1, without the convolution.

    .. math:: \frac{1}{HW} \sum_{hw} (K * x)_{hw} = b + \sum_{dy, dx} K_{dy, dx}
        \Big(\frac{1}{HW} \sum_{hw} x_{h + dy, w + dx}\Big)

    Nine means of a map, all of it but for a border row or column, in the place of 9·C·P products
    at each of its places: next to the experts the gate then costs nothing.

    Args:
        maps: (T, C, H, W).
        weight: (P, C, 3, 3).
        bias: (P,).

    Returns:
        (T, P).
    """
    columns = [maps[..., :-1].sum(3), maps.sum(3), maps[..., 1:].sum(3)]
    rows = [[c[..., :-1].sum(2), c.sum(2), c[..., 1:].sum(2)] for c in columns]
    sums = torch.stack([torch.stack(r, dim=-1) for r in rows], dim=-1)  # (T, C, 3, 3)
    means = sums / maps.shape[2:].numel()
    return F.linear(means.flatten(1), weight.flatten(1), bias)


def chosen_entries(values: Tensor, experts: Tensor, renormalize: bool | str) -> Tensor:
    """(T, n) of (T, E) values those of the chosen experts, scaled to sum to 1 with
    ``renormalize``; 'detached': by a number that has no gradient."""
    weights = values.gather(1, experts)
    if renormalize == DETACHED:
        return weights / weights.detach().sum(1, keepdim=True).clamp(min=1e-30)
    return weights / (weights.sum(1, keepdim=True) + 1e-9) if renormalize else weights


def router_z_loss(logits: Tensor) -> Tensor:
    r"""Mean over items of the squared log-sum-exp of their logits; 0 for no items.

    .. math:: L_z = \frac{1}{T} \sum_t \Big(\ln \sum_e e^{\ell_{te}}\Big)^2

    Args:
        logits: (T, E).

    Source: Zoph et al. 2022 (ST-MoE, arXiv 2202.08906), eq. 5.
    """
    return logits.logsumexp(1).square().sum() / max(logits.shape[0], 1)


def expert_capacity(num_items: int, num_experts: int, k: int, factor: float) -> int:
    """ceil(factor · T · k / E), at most T: what one expert may take of T items.

    The tiny part taken off before rounding keeps 1.1 · 10 from becoming 12.
    """
    return min(num_items, math.ceil(factor * num_items * k / num_experts - 1e-9))


def gshard_capacity(num_items: int, num_experts: int, factor: float) -> int:
    """max(min(T, floor(factor · T / E)), 4): the choices per item do not count.

    Example:
        >>> gshard_capacity(197, 6, 1.25), gshard_capacity(197, 6, 2.0), gshard_capacity(10, 6, 1.0)
        (41, 65, 4)
    """
    share = math.floor(factor * num_items / num_experts + 1e-9)
    return max(min(num_items, share), GSHARD_MIN_CAPACITY)


def drop_over_capacity(
    indices: Tensor,
    capacity: int | Tensor,
    num_experts: int,
    priority: Tensor | None = None,
    per_group: int | None = None,
) -> Tensor:
    """Put -1 for every choice that comes to an expert after it is full.

    Experts are filled with all first choices before any second one, and within these by priority,
    equal priorities and no priority by position.

    Args:
        indices: (T, k) the experts of each item, best first; a negative one is dropped already and
            takes no place.
        capacity: Items an expert takes: one number, or (E,) of them.
        num_experts: E.
        priority: (T,) larger is served earlier; None: in order of position.
        per_group: n: the first n items, the next n and so on have the capacity for themselves;
            None: all items are one group.

    Returns:
        (T, k) like ``indices``.

    Example:
        >>> drop_over_capacity(torch.tensor([[0, 1], [0, 1], [1, 0]]), 2, 2)
        tensor([[ 0,  1],
                [ 0, -1],
                [ 1, -1]])
    """
    num_items, k = indices.shape
    if per_group and per_group < num_items:
        # As if every group had experts of its own.
        groups = num_items // per_group
        first = torch.arange(groups, device=indices.device) * num_experts
        own = indices + first.repeat_interleave(per_group)[:, None]
        if isinstance(capacity, Tensor):
            capacity = capacity.repeat(groups)
        own = torch.where(indices < 0, -1, own)
        kept = drop_over_capacity(own, capacity, groups * num_experts, priority)
        return torch.where(kept < 0, -1, indices)
    order = None if priority is None else priority.argsort(descending=True, stable=True)
    ranked = indices if order is None else indices[order]
    queue = ranked.t().reshape(-1)  # first choices, then second ones
    # Dropped ones are group 0, expert e is group e + 1.
    group, by_expert = (queue.clamp(min=-1) + 1).sort(stable=True)
    starts = group_starts(group, num_experts + 1)
    place = torch.empty_like(queue)
    place[by_expert] = torch.arange(queue.numel(), device=queue.device) - starts[group]
    if isinstance(capacity, Tensor):
        capacity = capacity.index_select(0, queue.clamp(min=0))
    kept = torch.where(place < capacity, queue, -1).view(k, num_items).t()
    if order is None:
        return kept
    out = torch.empty_like(indices)
    out[order] = kept
    return out


__all__ = [
    'GatedRouter',
    'SelectingRouter',
    'chosen_entries',
    'drop_over_capacity',
    'expert_capacity',
    'mean_of_conv',
    'router_z_loss',
]
