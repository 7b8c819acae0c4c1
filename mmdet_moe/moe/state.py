r"""What the MoE layers of one model share during one forward, and how their losses get home.

The state has *inputs* (domains, the batch's embeddings), which live until the next forward, and
*outputs* (auxiliary losses, statistics), which are sealed once collected.

**Auxiliary gradients.** A layer that runs with gradients leaves its loss in the state as it is,
with its graph. Reentrant activation checkpointing runs the layer *without* gradients first and
again during backward, so that loss has no graph and its gradient would be lost. Then:

1. the first pass leaves the loss's value only;
2. :meth:`RoutingState.collect` returns the value with a node (:class:`_CaptureScale`) that
   notes the gradient :math:`g = \partial L / \partial \mathrm{aux}` arriving at it: the loss scale
   of AMP, the divisor of gradient accumulation, a weight;
3. the recomputation passes the layer's output through :class:`_FeedLoss`, which leaves the
   output's gradient alone and gives :math:`g` to the recomputed loss.

Step 2 happens before step 3: autograd runs ready nodes of a device latest first, the node of
``collect`` is younger than every layer, and only the sum of the losses depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar('R')


@dataclass
class _Chain:
    """What one reader hands on to the next.

    Attributes:
        left: The last value.
        readers: Those of the present chain, by id.
        calls: Of each reader, by id: its own value and what it received, for recomputations.
    """

    left: Tensor | None = None
    readers: set[int] = field(default_factory=set)
    calls: dict[int, list[tuple[Tensor, Tensor | None]]] = field(default_factory=dict)


class RoutingState:
    """Shared by the MoE layers of one model, owned by whoever calls that model.

    A plain object on purpose: no parameters, no buffers, nothing in the state dict. A copy
    (``copy.deepcopy``, pickle) starts empty, and layers copied together share one copy.

    Example:
        >>> state = RoutingState()
        >>> state.begin(domains=['bccd', 'cheetah'], num_images=2, training=True)
        >>> # loss = model(x).sum() + sum(state.collect().values())
    """

    def __init__(self) -> None:
        #: While training, let every layer run its first expert alone: the dense module.
        self.dense = False
        #: What moves once per forward, in an order that is the same on every rank.
        self._members: list[Any] = []
        #: Called as ``observer(layer_name, routing, context)`` by every layer, once per call and
        #: not in recomputations; who looks on must change nothing.
        self.observers: list[Callable[[str, Any, Any], None]] = []
        #: The number of forwards begun.
        self.forwards = 0
        self._clear()

    def _clear(self) -> None:
        self.domains: tuple[str | None, ...] | None = None
        self.num_images: int | None = None
        self.training = False
        self.sealed = False
        #: (B, 3, H, W) the input images, where a router decides on them.
        self.images: Tensor | None = None
        #: The shares of height and width that each image has of the batch's; None: all of it.
        self.extents: tuple[tuple[float, float], ...] | None = None
        #: Datasets' prototypes among the embeddings, and the concentration; None: the plan's.
        self.prototypes: tuple[Mapping[str, Tensor], float] | None = None
        self._embed: Callable[[], Tensor] | None = None
        self._embeddings: Tensor | None = None
        self._cache: dict[Any, Any] = {}
        self._chains: dict[str, _Chain] = {}
        self._losses: dict[str, list[Tensor]] = {}
        self._deferred: dict[str, list[Tensor]] = {}
        self._scales: dict[str, Tensor] = {}
        self._stats: dict[str, Tensor] = {}

    def begin(
        self,
        domains: Sequence[str | None] | None = None,
        num_images: int | None = None,
        embed: Callable[[], Tensor] | None = None,
        training: bool = False,
        images: Tensor | None = None,
        extents: Sequence[tuple[float, float]] | None = None,
        prototypes: tuple[Mapping[str, Tensor], float] | None = None,
    ) -> None:
        """Start a forward: forget the last one, take this one's inputs.

        Args:
            domains: Domain of each image; None (all, or one) where it is not known.
            num_images: B; by default the number of ``domains``.
            embed: Gives the images' embeddings (B, d), L2-normalised, in this order. Called at
                most once, and only if a router asks.
            training: Whether the model trains.
            images: (B, 3, H, W) the model's input, for a router that several layers share and that
                decides on it.
            extents: The shares of height and width that each image has of the batch's, the rest
                being padding at its lower and right border; None: all of it. What a router sees of
                a map is then the mean over the image's own places, so that it does not depend on
                which images stand beside it.
            prototypes: Where ``embed`` is not the plan's embedder: the prototype (d,) of each
                dataset among its embeddings, and the concentration.

        Raises:
            ValueError: If the numbers of domains and images differ.
        """
        if isinstance(domains, str):
            raise TypeError(f'domains must be a sequence with one name per image, got {domains!r}')
        if domains is not None and num_images is not None and len(domains) != num_images:
            raise ValueError(f'{len(domains)} domains for {num_images} images')
        self._clear()
        self.forwards += 1
        self.domains = None if domains is None else tuple(domains)
        self.num_images = num_images if domains is None else len(domains)
        self._embed = embed
        self.prototypes = prototypes
        self.training = training
        self.images = images
        self.extents = None if extents is None or _all_whole(extents) else tuple(extents)

    def embeddings(self) -> Tensor:
        """(B, d) embeddings of the batch's images, computed once per forward, without gradient.

        Raises:
            RuntimeError: If this forward came without a way to embed.
        """
        if self._embeddings is None:
            if self._embed is None:
                raise RuntimeError(
                    'an image has no domain the plan knows, and there are no embeddings to route '
                    'it by: give the data sample its domain, give the model an embedder, or call '
                    'RoutingState.begin(..., embed=...)'
                )
            with torch.no_grad():
                found = self._embed()
            if self.num_images is not None and found.shape[0] != self.num_images:
                raise ValueError(f'{found.shape[0]} embeddings for {self.num_images} images')
            self._embeddings = found.detach()
        return self._embeddings

    def cached(self, key: Any, compute: Callable[[], R]) -> R:
        """``compute()``, once per forward for each ``key``; for what layers have in common."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def received(self, kind: str, reader: Any, own: Tensor) -> Tensor | None:
        """What the reader before left under ``kind`` in this forward, without its gradient.

        A reader that comes a second time begins a new chain, with nothing before it: a head that
        runs on the next level starts over.

        Args:
            kind: What is handed on.
            reader: Who asks.
            own: A value of the reader's own by which a recomputation, where calls come in another
                order, finds the call it repeats and gets again what that one got.
        """
        chain = self._chains.setdefault(kind, _Chain())
        calls = chain.calls.setdefault(id(reader), [])
        if self.sealed:
            alike = [call for call in calls if call[0].shape == own.shape]
            if len(alike) > 1:
                away = torch.stack([(known - own.detach()).abs().sum() for known, _ in alike])
                alike = [alike[int(away.argmin())]]
            return alike[0][1] if alike else None
        if id(reader) in chain.readers:
            chain.readers.clear()
            chain.left = None
        chain.readers.add(id(reader))
        if self.training:  # else nothing is computed again
            calls.append((own.detach(), chain.left))
        return chain.left

    def leave(self, kind: str, value: Tensor) -> None:
        """Leave a value for the next reader of ``kind``; ignored once sealed."""
        if not self.sealed:
            self._chains.setdefault(kind, _Chain()).left = value.detach()

    def register(self, member: Any) -> None:
        """Let :meth:`collect` call ``member.settle(self)`` once per forward, on every rank in the
        same order, whether or not its layer ran: the place to add up over calls and ranks."""
        if not any(known is member for known in self._members):
            self._members.append(member)

    # Outputs

    def add_losses(self, layer_name: str, losses: dict[str, Tensor]) -> None:
        """Take a layer's auxiliary losses; ignored once sealed.

        Raises:
            ValueError: If one is not a scalar.
        """
        if self.sealed:
            return
        for name, value in losses.items():
            if value.ndim:
                raise ValueError(
                    f'loss {name!r} of MoE layer {layer_name!r} has shape {tuple(value.shape)}, '
                    f'a scalar is needed'
                )
            if torch.is_grad_enabled():
                self._losses.setdefault(name, []).append(value)
                self._deferred.setdefault(name, [])
            else:
                self._losses.setdefault(name, [])
                self._deferred.setdefault(name, []).append(value.detach())

    def add_stats(self, layer_name: str, stats: dict[str, Tensor]) -> None:
        """Add to a layer's statistics of this forward; ignored once sealed."""
        if self.sealed:
            return
        for name, value in stats.items():
            key = stat_key(layer_name, name)
            value = value.detach()
            known = self._stats.get(key)
            self._stats[key] = value if known is None else known + value.to(known.device)

    def attach(self, output: Any, losses: dict[str, Tensor]) -> Any:
        """In a recomputation, tie the recomputed ``losses`` to the layer's ``output``."""
        if not (self.sealed and losses and torch.is_grad_enabled()):
            return output
        names = tuple(losses)
        return _on_first_tensor(
            output, lambda y: _FeedLoss.apply(y, self._scales, names, *losses.values())
        )

    def collect(self) -> dict[str, Tensor]:
        """Seal the outputs and hand the losses out: ``loss_moe_<name>``, summed over the layers.

        The second call in a forward returns nothing. Every layer must have run by then, and
        backward must come before the next :meth:`begin`.
        """
        collected = {}
        for name, values in self._losses.items():
            total: Tensor | None = None
            if values:
                total = torch.stack(values).sum() if len(values) > 1 else values[0]
            deferred = self._deferred[name]
            if deferred:
                value = torch.stack(deferred).sum()
                if torch.is_grad_enabled():
                    anchor = torch.zeros((), device=value.device, requires_grad=True)
                    value = _CaptureScale.apply(value, anchor, self._scales, name)
                total = value if total is None else total + value
            if total is not None:
                collected[f'loss_moe_{name}'] = total
        self._losses, self._deferred = {}, {}
        if not self.sealed:
            self.sealed = True
            for member in self._members:
                member.settle(self)
        return collected

    def stats(self) -> dict[str, Tensor]:
        """Statistics of this forward: ``<layer>/weight``, ``<layer>/count``, ``<layer>/items``.

        ``weight`` (E,) is the sum of combine weights per expert, ``count`` (E,) its number of
        items, ``items`` () how many items there were. Sums over the calls of a layer. No key
        contains 'loss': see :func:`stat_key`.
        """
        return dict(self._stats)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies start empty: inputs belong to one forward, outputs hold graphs.
        return (type(self), ())

    def __repr__(self) -> str:
        return f'{type(self).__name__}(domains={self.domains}, sealed={self.sealed})'


def _all_whole(extents: Sequence[tuple[float, float]]) -> bool:
    return all(height >= 1 and width >= 1 for height, width in extents)


def stat_key(layer_name: str, name: str) -> str:
    """Key of a layer's statistic. mmengine adds up every key that contains 'loss'; none does."""
    return f'{layer_name}/{name}'.replace('loss', 'los')


class _CaptureScale(torch.autograd.Function):
    """A value; on backward, note the gradient that arrived at it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, value: Tensor, anchor: Tensor, scales: dict[str, Tensor], name: str
    ) -> Tensor:
        ctx.scales, ctx.name = scales, name
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        ctx.scales[ctx.name] = grad.detach()
        return None, None, None, None


class _FeedLoss(torch.autograd.Function):
    """The output unchanged; on backward, feed the noted gradients to the losses."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, output: Tensor, scales: dict[str, Tensor], names: tuple[str, ...], *losses: Tensor
    ) -> Tensor:
        ctx.scales, ctx.names = scales, names
        ctx.like = [(loss.dtype, loss.device) for loss in losses]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        fed = []
        for name, (dtype, device) in zip(ctx.names, ctx.like, strict=True):
            scale = ctx.scales.get(name)
            fed.append(None if scale is None else scale.to(device=device, dtype=dtype))
        return (grad, None, None, *fed)


def _on_first_tensor(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``function`` on the first floating tensor of nested tuples, lists and dicts."""
    done = False

    def walk(node: Any) -> Any:
        nonlocal done
        if done:
            return node
        if isinstance(node, Tensor) and node.is_floating_point():
            done = True
            return function(node)
        if isinstance(node, (tuple, list)):
            parts = [walk(part) for part in node]
            return type(node)(*parts) if hasattr(node, '_fields') else type(node)(parts)
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        return node

    return walk(tree)
