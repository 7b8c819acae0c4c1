"""The Mixture-of-Experts layer: a module of E experts with the interface of one.

Axes: B images, T items, E experts, d channels.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from mmdet_moe.moe.balance import BalanceLoss
from mmdet_moe.moe.dispatch import _map_trees, run_experts
from mmdet_moe.moe.patches import Patches
from mmdet_moe.moe.registry import BALANCE, build_router
from mmdet_moe.moe.routers import Router
from mmdet_moe.moe.routing import Routing, RoutingContext, own_places
from mmdet_moe.moe.sharing import SHARES, image_features, let_go_of_graphs, shared_routing
from mmdet_moe.moe.soft import SlotRouting, run_slots
from mmdet_moe.moe.state import RoutingState

GRANULARITIES = ('token', 'image')
#: What modules on maps (B, C, H, W) can do.
MAP_GRANULARITIES = ('image', 'patch')
#: As ``noise``: experts are fresh draws.
INDEPENDENT = 'independent'
#: Last parts of the keys of running statistics.
RUNNING = ('running_mean', 'running_var', 'num_batches_tracked')


class MoELayer(nn.Module):
    r"""E experts and a router in the place of one dense module.

    .. math:: r_t = \sum_{e \in \mathrm{router}(x_t)} w_{te} f_e(x_t), \qquad
        y_t = r_t \;(+\; \mathrm{identity}_t)

    With S shared experts :math:`g_s`, which every item takes, and their weight v

    .. math:: y_t = v \frac{1}{S} \sum_s g_s(x_t) + (1 - v)\, r_t \;(+\; \mathrm{identity}_t)

    so that experts and shared experts that are copies of one dense module compute what it did.

    With a bypass D the layer is residual, :math:`D(x_t)` is added to the above.

    Call it as the dense module: further arguments are handed to the experts.

    State dict: ``experts.<e>.<key of the dense module>``, ``shared.<s>.<the same>``, ``router.*``,
    ``balance.*``, ``bypass.*``. The keys of the dense module itself load too: into every expert.

    Args:
        experts: E modules with equal interfaces.
        router: A router or its dict; ``num_experts`` and ``in_channels`` are filled in.
        state: The model's routing state; one of its own where None (then call ``state.begin``
            yourself).
        granularity: 'image': the items are the B entries of dimension 0 (maps (B, C, H, W),
            sequences (B, N, d), vectors (B, d)); what the router sees is their mean over places.
            'token': the items are all d-vectors along the last dimension. 'patch': the items are
            the patches of each map, see :mod:`mmdet_moe.moe.patches`. None: the router's
            preference, else ``default_granularity``.
        default_granularity: What suits the experts.
        granularities: Those the experts can do.
        balance: Balance losses, or their dicts.
        name: Full name in the model, for messages and statistics.
        in_channels: d, where the router learns.
        channel_dim: Dimension of the channels; by default 1 for maps (4 dimensions or more), else
            the last.
        per_item_args: Positions (0 follows the input) and names of further arguments with one
            entry per item. Tensors of the input's shape are taken to be; any other tensor must be
            declared here or in ``shared_args``, for its first dimension proves nothing.
        shared_args: Positions and names of arguments that go to each expert whole.
        residual: The dense module adds its ``identity`` argument (by default its input) to what it
            computes; the experts do not, and the layer does it once, whatever the weights sum to.
        noise: Symmetry-breaking noise of upcycling, as a share of each parameter's standard
            deviation, or 'independent' for fresh draws. See :mod:`mmdet_moe.moe.upcycle`.
        noise_seed: Its seed.
        dense_type: Name of the dense module's class, for messages.
        shared: S further modules beside the experts, which every item takes.
        shared_weight: v, where there are any.
        patches: How maps are cut, where the granularity is 'patch'.
        bypass: D.
        frozen_norms: Keep the batch norms of the experts in evaluation mode, in training too.
        altered: In what the experts differ from the dense module, for messages; empty: in nothing.
        share: 'call' or 'image' where the router is one of several layers, see
            :mod:`mmdet_moe.moe.sharing`.
        leader: The layer that owns that router; None: this one. ``router`` and ``balance`` are
            ignored then.
        image_size: Sides that the input images are pooled to, if larger, with ``share='image'``.
        drop: What the dense module applies to its output before the identity is added, once for
            the batch: stochastic depth, which drops whole images and not single tokens. Without
            parameters.

    Raises:
        ValueError: If the pieces do not fit.
    """

    #: Children; every other key below the layer's name belongs to the dense module.
    own_children: ClassVar[tuple[str, ...]] = ('experts', 'router', 'balance', 'shared', 'bypass')

    def __init__(
        self,
        experts: Sequence[nn.Module],
        router: Router | Mapping[str, Any],
        state: RoutingState | None = None,
        *,
        granularity: str | None = None,
        default_granularity: str = 'image',
        granularities: Sequence[str] = GRANULARITIES,
        balance: Sequence[BalanceLoss | Mapping[str, Any]] = (),
        name: str = 'moe',
        in_channels: int | None = None,
        channel_dim: int | None = None,
        per_item_args: Sequence[int | str] = (),
        shared_args: Sequence[int | str] = (),
        residual: bool = False,
        noise: float | str = 0.0,
        noise_seed: int = 0,
        dense_type: str | None = None,
        shared: Sequence[nn.Module] = (),
        shared_weight: float = 0.5,
        patches: Patches | None = None,
        bypass: nn.Module | None = None,
        frozen_norms: bool = False,
        altered: str = '',
        share: str | None = None,
        leader: MoELayer | None = None,
        image_size: int = 64,
        drop: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not experts:
            raise ValueError(f'MoE layer {name!r} has no experts')
        if not 0 < shared_weight < 1:
            raise ValueError(
                f'MoE layer {name!r}: shared_weight must be in (0, 1), got {shared_weight}'
            )
        self.name = name
        self.state = RoutingState() if state is None else state
        self.experts = nn.ModuleList(experts)
        self.shared = nn.ModuleList(shared)
        self.shared_weight = shared_weight
        self.bypass = bypass
        self.drop = drop
        self.router: Router
        self.balance: nn.ModuleList
        if share is not None and share not in SHARES:
            raise ValueError(f'MoE layer {name!r}: share must be one of {SHARES}, got {share!r}')
        self.share = share
        self.image_size = image_size
        if leader is None:
            defaults: dict[str, Any] = {'num_experts': len(experts)}
            if share == 'image':
                in_channels = 3
            if in_channels is not None:
                defaults['in_channels'] = in_channels
            self.router = build_router(router, **defaults)
        else:
            # Past nn.Module, which would take them for this layer's own.
            self.__dict__['router'] = leader.router
            self.__dict__['balance'] = leader.balance
        if self.router.num_experts != len(experts):
            raise ValueError(
                f'MoE layer {name!r} has {len(experts)} experts, its router '
                f'{self.router.num_experts}'
            )
        whose = '' if granularity else f' of {type(self.router).__name__}'
        granularity = granularity or self.router.granularity or default_granularity
        if granularity not in granularities:
            raise ValueError(
                f'MoE layer {name!r}: granularity {granularity!r}{whose} does not suit a '
                f'{dense_type or type(experts[0]).__name__}; possible: {tuple(granularities)}'
            )
        suited = self.router.granularities
        if suited is not None and granularity not in suited:
            raise ValueError(
                f'MoE layer {name!r}: {type(self.router).__name__} routes by {tuple(suited)}, not '
                f'by {granularity!r}'
            )
        on_maps = granularity != 'token' and channel_dim in (None, 1)
        if granularity == 'patch' and not (on_maps and patches is not None):
            raise ValueError(
                f"MoE layer {name!r}: granularity 'patch' needs maps (B, C, H, W) and a grid"
            )
        if share == 'image' and granularity != 'image':
            raise ValueError(
                f"MoE layer {name!r}: share_router='image' decides once per image, the granularity "
                f'is {granularity!r}'
            )
        if self.router.needs_maps and share != 'image' and not on_maps:
            raise ValueError(
                f'MoE layer {name!r}: the conv gate of {type(self.router).__name__} needs maps '
                f'(B, C, H, W), the items of a {dense_type or type(experts[0]).__name__} by '
                f"{granularity!r} are none; use kind='linear'"
            )
        self.granularity = granularity
        self.patches = patches
        if leader is None:
            losses: list[BalanceLoss] = [
                BALANCE.build(loss, num_experts=len(experts)) for loss in balance
            ]
            self.balance = nn.ModuleList(losses)
            for loss in losses:
                if not self.router.learned:
                    raise ValueError(
                        f'MoE layer {name!r}: {type(loss).__name__} has nothing to act on, '
                        f'{type(self.router).__name__} learns nothing'
                    )
                if not self.router.selects:
                    raise ValueError(
                        f'MoE layer {name!r}: {type(loss).__name__} has nothing to balance, '
                        f'{type(self.router).__name__} fills every slot'
                    )
                loss.check(self.router)
        if isinstance(noise, str) and noise != INDEPENDENT:
            raise ValueError(
                f'MoE layer {name!r}: noise must be a number or {INDEPENDENT!r}, got {noise!r}'
            )
        if not isinstance(noise, str) and noise < 0:
            raise ValueError(f'MoE layer {name!r}: noise must be >= 0, got {noise}')
        self.channel_dim = channel_dim
        self.per_item_args = frozenset(per_item_args)
        self.shared_args = frozenset(shared_args)
        self.residual = residual
        self.noise = noise
        self.noise_seed = noise_seed
        self.dense_type = dense_type or type(experts[0]).__name__
        self.frozen_norms = frozen_norms
        self.altered = altered
        self._sync_checked = False
        #: What :func:`~mmdet_moe.moe.forced_routing` makes of the router's decisions.
        self.forced: Callable[[Routing | SlotRouting], Routing] | None = None
        for module in self._with_statistics().modules():
            if isinstance(module, _BatchNorm):
                module.register_forward_pre_hook(_running_statistics_for_one_value)
                module.register_forward_hook(_own_statistics_again)
        self._register_members()
        self.router.attach(self)
        self._rest_frozen_norms()

    @property
    def num_experts(self) -> int:
        """E, without the shared experts and the router's own."""
        return len(self.experts)

    def copies(self) -> dict[str, nn.Module]:
        """What holds the dense module's tensors, by place: experts ('experts.0', ...), then shared
        experts ('shared.0', ...)."""
        found = {f'experts.{e}': expert for e, expert in enumerate(self.experts)}
        return {**found, **{f'shared.{s}': expert for s, expert in enumerate(self.shared)}}

    def _copies(self) -> nn.ModuleList:
        """Experts, then shared experts."""
        return nn.ModuleList([*self.experts, *self.shared])

    @property
    def dense(self) -> nn.Module:
        """What stands for the dense module: the first of :meth:`copies`."""
        return next(iter(self.copies().values()))

    def reset_parameters(self) -> None:
        """Initialise what the dense module does not tell: the router and the bypass."""
        if self.owns_router:
            self.router.reset_parameters()
        for part in () if self.bypass is None else self.bypass.children():
            part.reset_parameters()  # type: ignore[operator]

    def _with_statistics(self) -> nn.ModuleList:
        """What may hold norms with running statistics."""
        return nn.ModuleList([*self._copies(), *([] if self.bypass is None else [self.bypass])])

    @property
    def owns_router(self) -> bool:
        """Whether router and balance losses are this layer's, not another's that shares them."""
        return 'router' in self._modules

    def settle(self, state: RoutingState) -> None:
        """The forward is over."""
        let_go_of_graphs(self, state)

    def train(self, mode: bool = True) -> MoELayer:
        """As ever; frozen norms stay in evaluation mode."""
        super().train(mode)
        self._rest_frozen_norms()
        return self

    def _rest_frozen_norms(self) -> None:
        if self.frozen_norms:
            for module in self._copies().modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def _register_members(self) -> None:
        """Let the state settle what moves once per forward, in an order equal on every rank."""
        # A router may hold another (DAMEX).
        for member in (*self.router.modules(), *self.balance):
            if hasattr(member, 'settle'):
                self.state.register(member)
        if self.share is not None:
            self.state.register(self)

    @property
    def keeps_dense_function(self) -> bool:
        """Whether upcycled experts compute what the dense module did."""
        same = not self.noise and not self.altered and self.bypass is None
        return self.router.keeps_dense_function and same

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Route, run, combine.

        Args:
            x: (B, C, H, W), (B, N, d), (B, d) or (..., d) for tokens.
            args, kwargs: As the dense module's.

        Returns:
            As the dense module's.
        """
        identity = None
        if self.residual:
            identity, args, kwargs = _take_identity(x, args, kwargs)
        if self.training and self.state.dense:
            out = self.dense(x, *args, **kwargs)
            out = out if self.bypass is None else self.bypass(x) + out
            return self._join(out, identity)
        shape = x.shape
        per_image = 1
        self._check_args(x, args, kwargs)
        if self.granularity == 'token':
            per_image = shape[1:-1].numel()
            args = tuple(self._flatten(i, value, x) for i, value in enumerate(args))
            kwargs = {key: self._flatten(key, value, x) for key, value in kwargs.items()}
            items = x.reshape(-1, shape[-1])
        elif self.patches is not None:
            per_image = self.patches.per_image
            self._refuse_per_item_args(x, args, kwargs)
            items = self.patches.cut(x)
        else:
            items = x
        context = RoutingContext(
            state=self.state,
            num_items=items.shape[0],
            training=self.training,
            items_per_image=per_image,
            recompute=self.state.sealed,
            device=x.device,
            layer=self.name,
            balance=tuple(self.balance),
            extents=self._extents(items),
        )
        routing, decided = self._route(x, items, context)
        if self.forced is not None:
            routing = self.forced(routing)
        losses = self._account(routing, context, decided)

        def per_item(key: int | str, value: Any) -> bool:
            return isinstance(value, Tensor) and self._is_per_item(key, value, items)

        if self.training:
            self._refuse_sync_batch_norm()
        frozen = _frozen_statistics(self) if context.recompute else contextlib.nullcontext()
        with frozen:
            out = self._run(x, items, routing, args, kwargs, per_item)
            if len(self.shared) and items.shape[0]:
                own = [expert(items, *args, **kwargs) for expert in self.shared]
                out = _mix_shared(out, own, self.shared_weight)
            if self.patches is not None:
                out = self.patches.join(out, x)
            if self.bypass is not None:
                out = self.bypass(x) + out
        out = self.state.attach(out, losses)
        if self.granularity == 'token' and x.ndim != 2:
            out = out.reshape(*shape[:-1], out.shape[-1])
        return self._join(out, identity)

    def _join(self, out: Any, identity: Tensor | None) -> Any:
        out = out if self.drop is None else self.drop(out)
        return out if identity is None else identity + out

    # Parts of forward

    def _run(
        self,
        x: Tensor,
        items: Tensor,
        routing: Routing | SlotRouting,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        per_item: Callable[[int | str, Any], bool],
    ) -> Any:
        """The experts' outputs, combined; ``items`` are those of the input ``x``."""
        if isinstance(routing, SlotRouting):
            return run_slots(self.experts, items, routing, args, kwargs, per_item)
        extra = self.router.extra_experts
        experts: Sequence[nn.Module] | nn.ModuleList = self.experts
        if len(extra):
            experts = [*self.experts, *extra]
        return run_experts(experts, items, routing, args, kwargs, per_item)

    def _route(
        self, x: Tensor, items: Tensor, context: RoutingContext
    ) -> tuple[Routing | SlotRouting, bool]:
        """The routing, and whether it was decided here (and not in a layer that shares it)."""

        def decide() -> Any:
            features = None
            if self.share == 'image' and self.router.needs_features:
                context.num_images  # noqa: B018 - raises where the items are not the images
                features = image_features(
                    self.state, self.image_size, self.router.needs_maps, self.name
                )
            elif self.router.needs_features:
                seen = items if self.patches is None else self.patches.cut_bare(x)
                if self.router.needs_maps:
                    features = seen
                elif context.extents is None:
                    features = self._features(seen)
                else:
                    parts = own_places(seen, context.extents)
                    features = torch.cat([self._features(part) for part in parts])
            return self.router(features, context)

        if self.share is None:
            return decide(), True
        return shared_routing(self, tuple(x.shape), context, decide)

    def _extents(self, items: Tensor) -> Sequence[tuple[float, float]] | None:
        """The state's, where the items are the images' maps and the router looks at them."""
        extents = self.state.extents
        own = self.granularity == 'image' and self.share != 'image' and items.ndim == 4
        if extents is None or not own or self.channel_dim not in (None, 1):
            return None
        return extents if len(extents) == items.shape[0] and items.numel() else None

    def _features(self, items: Tensor) -> Tensor:
        """(T, d) what the router sees: the mean over each item's places."""
        if items.ndim <= 2:
            return items
        dim = self.channel_dim
        if dim is None:
            dim = 1 if items.ndim >= 4 else -1
        places = [i for i in range(1, items.ndim) if i != dim % items.ndim]
        if not items.numel():  # no place to take a mean over
            return items.sum(places)
        return items.mean(places)

    def _account(
        self, routing: Routing | SlotRouting, context: RoutingContext, decided: bool
    ) -> dict[str, Tensor]:
        """Leave losses and statistics in the state; the losses, for the recomputation.

        A decision taken by another layer has its losses there.
        """
        experts = self.num_experts + len(self.router.extra_experts)
        if routing.num_items != context.num_items or routing.num_experts != experts:
            raise ValueError(
                f'MoE layer {self.name!r}: {type(self.router).__name__} routed '
                f'{routing.num_items} items to {routing.num_experts} experts, the layer has '
                f'{context.num_items} and {experts}'
            )
        losses: dict[str, Tensor] = {}
        if self.training and decided:
            losses.update(routing.losses)
            for loss in context.balance:
                for key, value in loss(routing, context).items():
                    losses[key] = losses[key] + value if key in losses else value
            self.state.add_losses(self.name, losses)
        if not context.recompute:
            with torch.no_grad():  # a recomputation, which takes none, must save the same tensors
                weight = routing.importance()
            stats = {
                'weight': weight,
                'count': torch.tensor(routing.counts),
                'items': torch.as_tensor(context.num_items),
            }
            self.state.add_stats(self.name, {**stats, **routing.stats})
            for observer in self.state.observers:
                observer(self.name, routing, context)
        return losses

    def _is_per_item(self, key: int | str, value: Tensor, items: Tensor) -> bool:
        if key in self.per_item_args:
            return True
        return key not in self.shared_args and value.shape == items.shape

    def _check_args(self, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse a tensor of which nobody said whether it goes with the items."""
        declared = self.per_item_args | self.shared_args
        for key, value in [*enumerate(args), *kwargs.items()]:
            if not isinstance(value, Tensor) or key in declared or value.shape == x.shape:
                continue
            raise ValueError(
                f'MoE layer {self.name!r}: does argument {key!r}, shape {tuple(value.shape)}, have '
                f'one entry per item (input {tuple(x.shape)})? Name it in per_item_args or in '
                f'shared_args'
            )

    def _refuse_per_item_args(self, x: Tensor, args: Sequence[Any], kwargs: Any) -> None:
        for key, value in [*enumerate(args), *kwargs.items()]:
            if isinstance(value, Tensor) and self._is_per_item(key, value, x):
                raise ValueError(
                    f'MoE layer {self.name!r}: argument {key!r} has one entry per image, which '
                    f'cannot be cut into patches'
                )

    def _flatten(self, key: int | str, value: Any, x: Tensor) -> Any:
        if not isinstance(value, Tensor) or key in self.shared_args:
            return value
        if value.shape[: x.ndim - 1] != x.shape[:-1]:
            raise ValueError(
                f'MoE layer {self.name!r}: argument {key!r}, shape {tuple(value.shape)}, has no '
                f'entry for each token of the input {tuple(x.shape)}'
            )
        return value.reshape(-1, *value.shape[x.ndim - 1 :])

    def _refuse_sync_batch_norm(self) -> None:
        """SyncBN waits for every rank, and an expert idle on one rank never comes: a deadlock."""
        dist = torch.distributed
        if self._sync_checked or not (dist.is_available() and dist.is_initialized()):
            return
        self._sync_checked = True
        if dist.get_world_size() == 1:
            return
        # A shared expert without items (an empty batch on one rank) does not come either.
        for key, module in self._copies().named_modules():
            if isinstance(module, nn.SyncBatchNorm) and module.training:
                raise RuntimeError(
                    f'expert module {self.name}.experts.{key} is a SyncBatchNorm: experts do not '
                    f'run on every rank, and it would wait for ever. Use BatchNorm in experts'
                )

    # Loading

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """As usual, after turning the keys of the dense module into keys of every expert.

        Both ``nn.Module.load_state_dict`` and mmengine's own recursion come through here.
        """
        expand_dense_keys(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy comes with a copy of the routing state, which starts empty.
        super().__setstate__(state)
        self._register_members()

    # Initialisation

    def init_weights(self) -> None:
        """Initialise the experts that know how; mmengine's recursion stops at modules without
        this method."""
        for expert in self._copies():
            if hasattr(expert, 'init_weights'):
                expert.init_weights()  # type: ignore[operator]

    # What a parent must not do

    def __getattr__(self, key: str) -> Any:
        try:
            return super().__getattr__(key)
        except AttributeError:
            experts = self.__dict__.get('_modules', {}).get('experts')
            if experts is None or not len(experts) or not hasattr(experts[0], key):
                raise
            raise AttributeError(
                f'{key!r} is asked of MoE layer {self.name!r}, which stands in the place of a '
                f'{self.dense_type}: each of its {len(experts)} experts has its own. A module '
                f'whose attributes are read from outside cannot be a MoE target'
            ) from None

    def __getitem__(self, index: Any) -> NoReturn:
        raise TypeError(
            f'MoE layer {self.name!r} stands in the place of a {self.dense_type} and cannot be '
            f'indexed: each of its experts has its own parts. A module that is indexed from '
            f'outside cannot be a MoE target'
        )

    def extra_repr(self) -> str:
        parts = [f'granularity={self.granularity}']
        parts += ['residual'] if self.residual else []
        parts += [f'shared_weight={self.shared_weight}'] if len(self.shared) else []
        return ', '.join(parts)


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The MoE layers of ``model`` by name, each once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MoELayer)}


def expand_dense_keys(layer: MoELayer, state_dict: dict[str, Any], prefix: str) -> bool:
    """Replace ``<prefix><key>`` by ``<prefix>experts.<e>.<key>`` for every expert, in place.

    The layer's own values (the router's, the balance losses') fill in for what a dense checkpoint
    cannot have, so that a strict load passes. With ``layer.noise`` each expert's copy is disturbed.

    Returns:
        Whether there were dense keys.

    Raises:
        ValueError: If a dense tensor does not fit the experts, or the checkpoint holds another
            number of experts.
    """
    own = tuple(f'{prefix}{child}.' for child in layer.own_children)
    below = [key for key in state_dict if key.startswith(prefix)]
    found = {key[len(own[0]) :].partition('.')[0] for key in below if key.startswith(own[0])}
    if found and found != {str(e) for e in range(layer.num_experts)}:
        raise ValueError(
            f'the checkpoint has experts {sorted(found)} at {prefix.rstrip(".")!r}, the model '
            f'{layer.num_experts} experts'
        )
    dense = [key for key in below if not key.startswith(own)]
    if not dense:
        return False
    if found:
        raise ValueError(
            f'the checkpoint has both experts and the dense module at {prefix.rstrip(".")!r}: '
            f'{dense[0]!r}'
        )
    values = {key[len(prefix) :]: state_dict.pop(key) for key in dense}
    for place, expert in layer.copies().items():
        targets = dict(expert.state_dict(keep_vars=True))
        noisy = noisy_parameters(expert, layer.noise)
        for key, value in values.items():
            target = targets.get(key)
            shape = getattr(value, 'shape', None)
            if isinstance(target, Tensor) and shape is not None and target.shape != shape:
                raise ValueError(
                    f'{prefix}{key}: the dense checkpoint has shape {tuple(shape)}, the experts '
                    f'{tuple(target.shape)}{why_unlike(layer)}'
                )
            if target is None and layer.altered and key.rpartition('.')[2] in RUNNING:
                continue  # a group norm in the place of a batch norm keeps no statistics
            if layer.noise and key in noisy:
                seed_key = noise_key(layer, place, key)
                value = disturbed(value, layer.noise, layer.noise_seed, seed_key)
            state_dict[f'{prefix}{place}.{key}'] = value
    filled = {place.partition('.')[0] for place in layer.copies()}
    for child in (child for child in layer.own_children if child not in filled):
        module = layer._modules.get(child)
        for key, value in {} if module is None else module.state_dict().items():
            state_dict.setdefault(f'{prefix}{child}.{key}', value)
    return True


def why_unlike(layer: MoELayer) -> str:
    """The end of a message about a dense tensor that does not fit the experts."""
    if not layer.altered:
        return ''
    return (
        f': {layer.altered}, so a dense checkpoint cannot fill them. Train from scratch, load a '
        f'checkpoint of this MoE model, or leave width out'
    )


def noise_key(layer: MoELayer, place: str, key: str) -> str:
    """What the noise of a parameter of the expert at ``place`` is drawn by."""
    return f'{layer.name}.{place.removeprefix("experts.")}.{key}'


def noisy_parameters(expert: nn.Module, noise: float | str) -> set[str]:
    """The parameters that noise goes to: all, but those of norms where experts are fresh draws."""
    if noise != INDEPENDENT:
        return {key for key, _ in expert.named_parameters()}
    return {
        f'{name}.{key}' if name else key
        for name, module in expert.named_modules()
        if not isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm))
        for key, _ in module.named_parameters(recurse=False)
    }


def disturbed(value: Tensor, noise: float | str, seed: int, key: str) -> Tensor:
    """``value`` plus normal noise of ``noise`` times its own standard deviation; with
    'independent' a normal draw of its mean and standard deviation.

    The same on every rank and machine for the same seed and key. A constant tensor (a zero bias)
    stays.
    """
    if not value.is_floating_point() or value.numel() < 2:
        return value
    generator = torch.Generator().manual_seed(zlib.crc32(f'{seed}:{key}'.encode()))
    sample = torch.randn(value.shape, generator=generator, dtype=torch.float32)
    std = value.detach().float().std()
    if isinstance(noise, str):
        mean = value.detach().float().mean()
        return (mean + sample.to(value.device) * std).to(value.dtype)
    return value + (sample.to(value.device) * (noise * std)).to(value.dtype)


def _take_identity(
    x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The identity argument (second position or by name, x where absent), and the others."""
    if args:
        identity, args = args[0], args[1:]
    else:
        kwargs = dict(kwargs)
        identity = kwargs.pop('identity', None)
    return (x if identity is None else identity), args, kwargs


def _mix_shared(routed: Any, shared: Sequence[Any], weight: float) -> Any:
    """weight · mean of the shared + (1 - weight) · routed, at each place of nested outputs."""

    def mix(leaves: Sequence[Tensor]) -> Tensor:
        mean = leaves[1] if len(leaves) == 2 else torch.stack(list(leaves[1:])).mean(0)
        return torch.lerp(leaves[0].to(mean.dtype), mean, weight)

    return _map_trees(mix, [routed, *shared])


# Batch norm in experts


def _running_statistics_for_one_value(module: _BatchNorm, inputs: tuple[Any, ...]) -> None:
    """One value per channel has no variance: use the running statistics, for this call.

    The dense module sees the whole batch, an expert possibly one image, and at 1x1 torch refuses.
    """
    x = inputs[0]
    if module.training and module.running_mean is not None and x.numel() == x.shape[1]:
        module.training = False
        module.__dict__['_moe_one_value'] = True


def _own_statistics_again(module: _BatchNorm, inputs: tuple[Any, ...], output: Tensor) -> None:
    if module.__dict__.pop('_moe_one_value', False):
        module.training = True


@contextlib.contextmanager
def _frozen_statistics(layer: MoELayer) -> Iterator[None]:
    """Let batch norms compute what they did, without moving their running statistics again."""
    norms = [
        m
        for m in layer._with_statistics().modules()
        if isinstance(m, _NormBase) and m.training and m.track_running_stats
    ]
    kept = [(m, m.momentum, m._buffers.get('num_batches_tracked')) for m in norms]
    try:
        for m in norms:
            m.momentum = 0.0
            m._buffers['num_batches_tracked'] = None
        yield
    finally:
        for m, momentum, tracked in kept:
            m.momentum = momentum
            m._buffers['num_batches_tracked'] = tracked
