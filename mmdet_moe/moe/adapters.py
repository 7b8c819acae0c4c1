r"""Mixtures of adapters: a frozen linear layer, and experts of low rank that add to it (MoA).

Axes: T items, E experts, d channels in, d' out, r rank, J Kronecker terms of size s.

.. math:: y_t = W_0 x_t + b + \sum_{e \in \mathrm{router}(x_t)} w_{te}\, \Delta_e x_t

:math:`W_0` is frozen; b, which starts as the pretrained bias, may train. Every adapter starts with
:math:`\Delta_e = 0`, so that the first forward is the pretrained model's bit for bit. Experts may
have different ranks, and an item costs only what its own do.

Source: Lee et al. 2023 (MoA, arXiv 2310.11031), section 3; Hu et al. 2021 (LoRA, arXiv 2106.09685);
He et al. 2022 (KAdaptation, arXiv 2203.16329).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdet_moe.moe.dispatch import add_experts
from mmdet_moe.moe.layer import MoELayer, moe_layers
from mmdet_moe.moe.registry import ADAPTERS
from mmdet_moe.moe.routers import Router
from mmdet_moe.moe.routers.plan import PlanRouter
from mmdet_moe.moe.routers.single import SingleRouter
from mmdet_moe.moe.routing import Routing
from mmdet_moe.moe.soft import SlotRouting, run_slots
from mmdet_moe.moe.state import RoutingState

#: Where adapters stand unless the spec says otherwise: the fused query, key and value projection
#: of every second block of a ViT, the first included (1, 3, ..., 11 counted from 1).
DEFAULT_TARGETS = r'(.*\.)?layers\.\d*[02468]\.attn\.qkv'
#: What KAdaptation's dropout may act on.
DROPOUTS = ('terms', 'weights')


# Adapters


class Adapter(nn.Module):
    """A linear map Delta of low rank.

    A new kind is a subclass with ``@ADAPTERS.register``, :meth:`forward`, :meth:`delta` and
    :meth:`reset_parameters`, which makes Delta 0.

    Args:
        in_features: d.
        out_features: d'.
        rank: r.
    """

    #: Whether the layer's bias trains along unless its spec says otherwise.
    trains_bias = False

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f'{type(self).__name__}: rank must be a number >= 1, got {rank!r}')
        self.in_features, self.out_features, self.rank = in_features, out_features, rank

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """(n, ..., d') of (n, ..., d) items, each times its (n,) weight."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """(d', d) Delta as a matrix, without dropout: what a merge adds to the weight."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """A random first factor, and a second one of zeros."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f'{self.in_features} -> {self.out_features}, rank={self.rank}'


@ADAPTERS.register
class LoRA(Adapter):
    r"""Delta = s B A with A (r, d) ~ N(0, 1/r²) and B (d', r) = 0.

    Args:
        in_features, out_features, rank: See :class:`Adapter`.
        alpha: s = alpha / r; None: s = 1, as in MoA.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, alpha: float | None = None
    ) -> None:
        super().__init__(in_features, out_features, rank)
        self.scaling = 1.0 if alpha is None else alpha / rank
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.A, std=1 / self.rank)
        nn.init.zeros_(self.B)

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        hidden = _weighed(F.linear(x, self.A), weights)
        if self.scaling != 1:
            hidden = hidden * self.scaling
        return F.linear(hidden, self.B)

    def delta(self) -> Tensor:
        return self.scaling * self.B @ self.A


class KroneckerFactors(nn.Module):
    r"""u and v, which all KAdaptation adapters of a network share; :math:`u_j v_j^T` is term j's
    first Kronecker factor, of rank 1.

    Entries are normal with variance :math:`J^{-1/2}`, so that those of :math:`\sum_j u_j v_j^T`
    have variance 1, and Delta moves as fast as LoRA's.

    Args:
        size: s.
        terms: J.
    """

    def __init__(self, size: int = 64, terms: int = 64) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.empty(terms, size))
        self.v = nn.Parameter(torch.empty(terms, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for factor in (self.u, self.v):
            nn.init.normal_(factor, std=factor.shape[0] ** -0.25)


@ADAPTERS.register
class KAdaptation(Adapter):
    r"""Delta as a sum of Kronecker products,

    .. math:: \Delta^T = \mathrm{Dropout}\Big( \sum_{j=1}^{J} (u_j v_j^T) \otimes (L_j R_j) \Big)

    with L (J, d/s, r) ~ N(0, 1/r²), R (J, r, d'/s) = 0 and the network's u, v (J, s). With x as an
    (s, d/s) matrix X and y as (s, d'/s),

    .. math:: Y = \sum_j v_j \big((u_j^T X) L_j R_j\big),

    which is an eighth of the work of :math:`W_0` (d = 768, d' = 2304, r = 8) and never makes Delta.

    **Dropout.** The paper's acts on Delta: a share p of its *entries* is 0 in a step, for all items
    alike. ``dropout_on='weights'`` is that; Delta must be made, once per call, and a step costs
    what a dense expert does. ``'terms'`` (the default) draws one number for each of the J *terms*
    instead: E[Delta] is the same, and so is its noise where terms do not cancel, and nothing is
    made. Neither acts in evaluation.

    Args:
        in_features, out_features, rank: See :class:`Adapter`; s must divide both sizes.
        kronecker: u and v. The adapter refers to them; a layer of the network owns them.
        dropout: p.
        dropout_on: 'terms' or 'weights'.
    """

    trains_bias = True
    kronecker: KroneckerFactors
    L: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        kronecker: KroneckerFactors,
        dropout: float = 0.5,
        dropout_on: str = 'terms',
    ) -> None:
        super().__init__(in_features, out_features, rank)
        if not 0 <= dropout < 1:
            raise ValueError(f'KAdaptation: dropout must be in [0, 1), got {dropout}')
        if dropout_on not in DROPOUTS:
            raise ValueError(
                f'KAdaptation: dropout_on must be one of {DROPOUTS}, got {dropout_on!r}'
            )
        terms, size = kronecker.u.shape
        if in_features % size or out_features % size:
            raise ValueError(
                f'KAdaptation: size={size} must divide the {in_features} input and the '
                f'{out_features} output channels'
            )
        self.dropout, self.dropout_on = dropout, dropout_on
        # Past nn.Module: they are registered once in the network.
        self.__dict__['kronecker'] = kronecker
        self.L = nn.Parameter(torch.empty(terms, in_features // size, rank))
        self.R = nn.Parameter(torch.empty(terms, rank, out_features // size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.L, std=1 / self.rank)
        nn.init.zeros_(self.R)

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        drops = self.training and self.dropout > 0
        if drops and self.dropout_on == 'weights':
            return F.linear(_weighed(x, weights), F.dropout(self.delta(), self.dropout))
        u, v = self.kronecker.u, self.kronecker.v
        terms, size = u.shape
        shape = x.shape
        left: Tensor = self.L
        if drops:
            left = left * F.dropout(u.new_ones(terms), self.dropout)[:, None, None]
        # Size first: two large products and two batched ones, whatever the number of items.
        columns = x.reshape(-1, size, shape[-1] // size).transpose(0, 1)
        rows = columns.shape[1]
        z = (u @ columns.reshape(size, -1)).view(terms, rows, -1)
        hidden = torch.bmm(z, left.to(z.dtype))
        if weights is not None:
            per_row = weights.to(hidden.dtype).repeat_interleave(rows // len(weights))
            hidden = hidden * per_row[:, None]
        t = torch.bmm(hidden, self.R.to(hidden.dtype))
        y = (v.t() @ t.view(terms, -1)).view(size, rows, -1)
        return y.transpose(0, 1).reshape(*shape[:-1], self.out_features)

    def delta(self) -> Tensor:
        u, v = self.kronecker.u, self.kronecker.v
        terms, size = u.shape
        inner = torch.bmm(self.L, self.R)
        outer = (u[:, :, None] * v[:, None, :]).view(terms, -1)
        blocks = (outer.t() @ inner.view(terms, -1)).view(size, size, *inner.shape[1:])
        # [(b, l), (a, k)] of blocks [a, b, k, l].
        return blocks.permute(1, 3, 0, 2).reshape(self.out_features, self.in_features)


def _weighed(x: Tensor, weights: Tensor | None) -> Tensor:
    """(n, ...) times (n,)."""
    if weights is None:
        return x
    return x * weights.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


# The layer


class AdapterLayer(MoELayer):
    """A frozen linear layer with adapters as experts; see the module.

    State dict: ``base.*`` (the linear layer), ``experts.<e>.*`` (the adapters), ``router.*``,
    ``balance.*``, and in one layer of the network ``kronecker.*``. The keys of the linear layer
    itself load too.

    Args:
        base: The linear layer; its parameters are replaced by frozen ones, whoever shares them
            keeps his own flags.
        adapters: E adapters.
        router: A router or its dict.
        state: The model's routing state.
        bias: Whether the base's bias trains.
        kronecker: What this layer owns for all KAdaptation adapters of the network, if it does.
        options: Of :class:`~mmdet_moe.moe.layer.MoELayer`.

    Raises:
        ValueError: If the base has no bias to train, or the router brings experts of its own.
    """

    own_children = (*MoELayer.own_children, 'base', 'kronecker')

    def __init__(
        self,
        base: nn.Linear,
        adapters: Sequence[Adapter],
        router: Router | Mapping[str, Any],
        state: RoutingState | None = None,
        *,
        bias: bool = False,
        kronecker: KroneckerFactors | None = None,
        **options: Any,
    ) -> None:
        super().__init__(adapters, router, state, **options)
        if len(self.router.extra_experts):
            raise ValueError(
                f'MoE layer {self.name!r}: {type(self.router).__name__} brings experts of its '
                f'own, which are no adapters'
            )
        if bias and base.bias is None:
            raise ValueError(f'MoE layer {self.name!r}: bias=True, but its linear layer has none')
        for key, parameter in list(base.named_parameters()):
            trains = bias and key == 'bias'
            setattr(base, key, nn.Parameter(parameter.detach(), requires_grad=trains))
        self.base = base
        if kronecker is not None:
            self.kronecker = kronecker

    @property
    def keeps_dense_function(self) -> bool:
        """Adapters start as zeros, whatever the router says."""
        return True

    def copies(self) -> dict[str, nn.Module]:
        """The one frozen linear layer."""
        return {'base': self.base}

    def reset_parameters(self) -> None:
        """The router, the adapters and, where this layer owns them, u and v."""
        super().reset_parameters()
        for part in (*self.experts, self._modules.get('kronecker')):
            if part is not None:
                part.reset_parameters()  # type: ignore[operator]

    def _run(
        self,
        x: Tensor,
        items: Tensor,
        routing: Routing | SlotRouting,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        per_item: Callable[[int | str, Any], bool],
    ) -> Tensor:
        # Of the items where that is the same, bit for bit: adding into a view copies its gradient.
        out = self.base(items if x.is_contiguous() else x, *args, **kwargs)
        if out.ndim != items.ndim:
            out = out.view(*items.shape[:-1], out.shape[-1])
        if isinstance(routing, SlotRouting):
            return out + run_slots(self.experts, items, routing, (), {}, per_item)
        return add_experts(out, self.experts, items, routing)


# Merging


def merged_linear(layer: AdapterLayer) -> nn.Linear:
    """One linear layer that computes what ``layer`` does in evaluation.

    Raises:
        ValueError: If items go to different adapters, or with weights of their own: that is no one
            linear map.
    """
    router = layer.router
    weights: dict[int, float] | None = None
    if isinstance(router, SingleRouter):
        weights = {router.expert: 1.0}
    elif isinstance(router, PlanRouter):
        weights = _constant(router)
    if weights is None:
        raise ValueError(
            f'{layer.name!r} cannot be merged into one linear layer: its '
            f'{type(router).__name__} sends each item to adapters of its own, and no one matrix '
            f'is W0 + Delta_0 for one item and W0 + Delta_1 for another. A single adapter '
            f'(ranks=[r] without a router), or a plan that sends all datasets to the same, can be'
        )
    base = layer.base
    merged = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
    merged = merged.to(base.weight.device, base.weight.dtype)
    with torch.no_grad():
        delta = sum(w * _delta(layer, e).double() for e, w in weights.items())
        merged.weight.copy_(base.weight.double() + delta)
        if base.bias is not None:
            merged.bias.copy_(base.bias)
    return merged


def _delta(layer: AdapterLayer, e: int) -> Tensor:
    adapter = layer.experts[e]
    assert isinstance(adapter, Adapter)
    return adapter.delta()


def _constant(router: PlanRouter) -> dict[int, float] | None:
    """The weights a plan gives to every dataset, where they are the same for all."""
    first, *others = router.assignment().values()
    if any(other != first for other in others):
        return None
    return {router.experts.index(name): weight for name, weight in first.items()}


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the stock model that computes what ``model`` does in evaluation.

    Raises:
        ValueError: If the model has no adapters, has other MoE layers, or one cannot be merged.
    """
    layers = adapter_layers(model)
    if not layers:
        raise ValueError('the model has no adapters to merge')
    others = sorted(set(moe_layers(model)) - set(layers))
    if others:
        raise ValueError(f'{others} are MoE layers of whole experts, which cannot be merged')
    merged = {name: merged_linear(layer) for name, layer in layers.items()}
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        name = next((name for name in layers if key.startswith(f'{name}.')), None)
        if name is None:
            state[key] = value
        elif name in merged:
            linear = merged.pop(name).state_dict()
            state.update({f'{name}.{part}': tensor for part, tensor in linear.items()})
    return state


# Building from a spec


def build_adapters(
    cfg: Mapping[str, Any],
    base: nn.Module,
    name: str,
    shared: dict[tuple[int, int], KroneckerFactors],
) -> tuple[list[Adapter], bool, KroneckerFactors | None]:
    """The adapters a spec asks for at one place.

    Args:
        cfg: ``dict(type='LoRA', ranks=[1, 2, 4, 8], bias=None, ...)``; the rest are arguments of
            the adapter, and ``size`` and ``terms`` of u and v.
        base: The module at that place.
        name: Its full name, for messages.
        shared: u and v by (size, terms), as made so far in this network; new ones are added.

    Returns:
        Adapters, whether the base's bias trains, and u and v where this place is their first.

    Raises:
        ValueError: If the module is no linear layer, or the config says something impossible.
    """
    if not isinstance(base, nn.Linear):
        raise ValueError(
            f'MoE target {name!r} is a {type(base).__name__}: adapters are for linear layers'
        )
    if not isinstance(cfg, Mapping):
        raise ValueError(f"adapters must be dict(type='LoRA', ranks=[1, 2, 4, 8]), got {cfg!r}")
    options = dict(cfg)
    ranks = options.pop('ranks', None)
    ranks = [ranks] if isinstance(ranks, int) else ranks
    if not isinstance(ranks, Sequence) or isinstance(ranks, str) or not ranks:
        raise ValueError(f'adapters need ranks, one per expert, e.g. [1, 2, 4, 8], got {ranks!r}')
    kind: type[Adapter] = ADAPTERS.get(options.get('type', ''))
    bias = options.pop('bias', None)
    defaults: dict[str, Any] = dict(in_features=base.in_features, out_features=base.out_features)
    owned = None
    if issubclass(kind, KAdaptation):
        key = options.pop('size', 64), options.pop('terms', 64)
        if key not in shared:
            owned = shared[key] = KroneckerFactors(*key).to(base.weight.device, base.weight.dtype)
        defaults['kronecker'] = shared[key]
    try:
        adapters = [ADAPTERS.build(options, rank=rank, **defaults) for rank in ranks]
    except ValueError as error:
        raise ValueError(f'MoE target {name!r}: {error}') from None
    adapters = [adapter.to(base.weight.device, base.weight.dtype) for adapter in adapters]
    trains = kind.trains_bias and base.bias is not None if bias is None else bias
    return adapters, trains, owned


# What trains, and what it belongs to


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The layers with adapters, by name."""
    return {name: x for name, x in moe_layers(model).items() if isinstance(x, AdapterLayer)}


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters, each counted once.

    Attributes:
        adapters: Of adapters, the u and v they share, and biases that train with them.
        routers: Of routers.
        others: Of what else trains: the head.
        total: Of the model.
    """

    adapters: int
    routers: int
    others: int
    total: int

    @property
    def trainable(self) -> int:
        return self.adapters + self.routers + self.others

    def __str__(self) -> str:
        return (
            f'{self.trainable:,} of {self.total:,} parameters train: {self.adapters:,} of '
            f'adapters, {self.routers:,} of routers, {self.others:,} elsewhere (head)'
        )


def count_parameters(model: nn.Module) -> ParameterCounts:
    """What trains in a model with adapters."""
    layers = adapter_layers(model)
    trained = _trained(model)
    found = dict.fromkeys(('adapters', 'routers', 'others'), 0)
    total = 0
    for key, parameter in model.named_parameters():
        total += parameter.numel()
        if key in trained:
            name = next((name for name in layers if key.startswith(f'{name}.')), None)
            part = 'others' if name is None else 'adapters'
            if name is not None and key[len(name) + 1 :].startswith(('router.', 'balance.')):
                part = 'routers'
            found[part] += parameter.numel()
    return ParameterCounts(**found, total=total)


def _trained(model: nn.Module) -> set[str]:
    """Names of the parameters that train. A model may give its frozen ones their flag back while
    it is in evaluation mode; then it names them as ``frozen_parameters``."""
    frozen = set(getattr(model, 'frozen_parameters', ()))
    parameters = model.named_parameters(remove_duplicate=False)
    return {name for name, p in parameters if p.requires_grad and name not in frozen}


def learned_keys(model: nn.Module) -> list[str]:
    """Keys of the state dict that training changes, in whichever mode the model is: parameters
    with a gradient, and the buffers of routers, balance losses and of modules that have such
    parameters themselves."""
    keys = []
    layers = adapter_layers(model)
    trained = _trained(model)
    owners = {name.rpartition('.')[0] for name in trained}
    state = model.state_dict(keep_vars=True)
    for key, value in state.items():
        name = next((name for name in layers if key.startswith(f'{name}.')), None)
        if isinstance(value, nn.Parameter):
            learned = key in trained
        elif name is not None:
            learned = not key.startswith(f'{name}.base.')
        else:
            learned = key.rpartition('.')[0] in owners
        if learned:
            keys.append(key)
    return keys


def base_fingerprint(model: nn.Module) -> str:
    """SHA-256 of all that does not train: names, shapes, types and bytes."""
    learned = set(learned_keys(model))
    state = model.state_dict()
    return _fingerprint((key, state[key]) for key in sorted(state) if key not in learned)


def _fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for key, value in tensors:
        value = value.detach().cpu().contiguous()
        digest.update(f'{key}:{value.dtype}:{tuple(value.shape)};'.encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def adapter_checkpoint(model: nn.Module) -> dict[str, Any]:
    """What training changes in a model with adapters, and the fingerprint of the rest: a dict of
    tensors and strings, which ``torch.load(weights_only=True)`` reads."""
    state = model.state_dict()
    return {
        'format': ADAPTER_FORMAT,
        'base': base_fingerprint(model),
        'state_dict': {key: state[key].detach().cpu().clone() for key in learned_keys(model)},
    }


#: What an adapters-only checkpoint calls itself.
ADAPTER_FORMAT = 'mmdet_moe.adapters/1'


def complete_adapter_checkpoint(
    model: nn.Module, checkpoint: Mapping[str, Any], force: bool = False
) -> dict[str, Tensor]:
    """The whole state dict: that of an adapters-only checkpoint over the model's own.

    Args:
        model: The pretrained model, with adapters as those of the checkpoint.
        checkpoint: As :func:`adapter_checkpoint` makes it.
        force: Take another base all the same.

    Raises:
        ValueError: If it is no such checkpoint, belongs to another base, or its tensors are not
            those that train here; they are listed.
    """
    if checkpoint.get('format') != ADAPTER_FORMAT:
        raise ValueError(
            f'not a checkpoint of adapters ({ADAPTER_FORMAT}): it says '
            f'{checkpoint.get("format")!r} and has {list(checkpoint)[:5]}'
        )
    state = model.state_dict()
    given = checkpoint['state_dict']
    learned = set(learned_keys(model))
    problems = [
        *(f'{key} is missing' for key in sorted(learned - set(given))),
        *(f'{key} does not train here' for key in sorted(set(given) - learned)),
        *(
            f'{key} has shape {tuple(given[key].shape)}, the model {tuple(state[key].shape)}'
            for key in sorted(learned & set(given))
            if given[key].shape != state[key].shape
        ),
    ]
    if problems:
        more = f'; and {len(problems) - 8} more' if len(problems) > 8 else ''
        raise ValueError(
            f"the checkpoint's adapters are not the model's: {'; '.join(problems[:8])}{more}"
        )
    own = base_fingerprint(model)
    if not force and checkpoint['base'] != own:
        raise ValueError(
            f'the adapters were trained on another pretrained model (fingerprint '
            f'{checkpoint["base"][:12]}, this one is {own[:12]}): load that one first'
        )
    return {**state, **given}


__all__ = [
    'DEFAULT_TARGETS',
    'Adapter',
    'AdapterLayer',
    'KAdaptation',
    'KroneckerFactors',
    'LoRA',
    'ParameterCounts',
    'adapter_checkpoint',
    'adapter_layers',
    'base_fingerprint',
    'build_adapters',
    'complete_adapter_checkpoint',
    'count_parameters',
    'learned_keys',
    'merged_state_dict',
]
