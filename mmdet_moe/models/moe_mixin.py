"""The mixin that puts Mixture-of-Experts into any single-stage, DETR-like or classification model.

One seam per duty:

* *what is replaced*: the ``moe`` specs, by name, after the base model is built;
* *what the experts start as*: copies of the dense module, after the base's own ``init_weights``;
* *who an image is*: the routing state is begun once per forward with the data samples' domains;
* *what comes out*: the routing's auxiliary losses and statistics join the model's losses.

The base class is entered as ever and knows nothing of it.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mmdet_moe.moe import (
    ROUTERS,
    MoELayer,
    PlanRouter,
    RoutingState,
    adapter_layers,
    check_datasets,
    count_parameters,
    replace_modules,
    sparse_blocks,
    upcycle_,
)
from mmdet_moe.moe.routers.plan import load_plan
from mmdet_moe.planning import ExpertPlan
from mmdet_moe.registry import MODELS, SCOPE
from mmdet_moe.structures import LabelSpace

from . import targets as _targets  # noqa: F401 - teaches the moe package mmcv's and mmdet's modules
from .adaptation import Adaptation, ExpertStart
from .domain_classes import MultiDomainHeadMixin
from .domain_features import DomainFeatures, last_unrouted_layer, pool_features

#: Where mmdet's and mmpretrain's models keep their heads.
HEADS = ('bbox_head', 'roi_head', 'head')
#: How a test treats the domains of images, and what guesses them.
DOMAIN_MODES = ('given', 'nearest', 'mixture')
GUESSES = ('embedder', 'features')


class MoEMixin:
    r"""Mixture-of-Experts for a model of mmdet or mmpretrain; put it before the base class.

    Args:
        *args: As the base model.
        moe: What to replace, a list of specs: ``dict(targets=regex, num_experts=E,
            router=dict(type=...), ...)``, see :func:`mmdet_moe.moe.replace_modules`. Of a
            transformer ``blocks='[SF]*6'`` in the place of ``targets`` says which blocks are
            sparse: their FFNs are replaced, see :func:`mmdet_moe.moe.sparse_blocks`. None or
            empty: the dense twin.
        label_space: The :class:`~mmdet_moe.structures.LabelSpace` of the data or its config.
            Passed on to the head, whose number of classes follows from it.
        plan: Plan file (or its content, or an ``ExpertPlan``) for the ``PlanRouter`` specs that
            name none.
        embedder: Config of the frozen embedder that routes images of unknown domain. By default
            the one the plan was made with.
        restrict_classes: Passed on to the head: test images are scored on the classes of their
            domain only. None leaves it to the head's config.
        domain: The domain of samples that do not carry one, say in a demo on one domain's images.
            Also a plain attribute that may be set at any time.
        log_routing: Whether losses come with ``moe/...`` statistics for the log.
        freeze_others: Train the MoE layers (experts, routers, bypasses) and nothing else: all other
            parameters are frozen, heads and their class rows too, and norms outside of MoE layers
            stay in evaluation mode, also after ``train()``. Optimisers skip parameters without a
            gradient, so they need no option for it. ``dict(train=[r'head\..*'])`` lets the
            parameters train, too, whose whole names match one of the regular expressions.
        domain_features: Guess unknown domains by pooled features of the detector's own instead of
            the embedder: ``dict(layer=name)``, or ``{}`` for the backbone or its last stage before
            the first MoE layer. See :class:`~mmdet_moe.models.domain_features.DomainFeatures`;
            ``dimension`` says the layer's channels where a 64 x 64 image does not run through.
        both_readings: At test, give each data sample ``pred_instances_unrestricted`` too: what the
            model predicts where all classes compete.
        newcomers: Domains of the label space that join a trained model: the rows of their classes
            are parameters of their own, see :mod:`~mmdet_moe.models.layers.class_blocks`.
        adapt: How a domain joins: ``dict(domain=..., previous=..., start='nearest', train=[])``,
            see :class:`~mmdet_moe.models.adaptation.Adaptation`. Its experts and its rows are
            trained, and what ``train`` names, all else is frozen as with ``freeze_others``;
            checkpoints with the experts of the previous plan load.
        **kwargs: As the base model.

    Raises:
        ValueError: The plan has datasets that the label space has not; both are listed. (Whether
            it has those of the training data, ``PlanHook`` checks.) Or ``freeze_others`` leaves
            nothing to train.
    """

    def __init__(
        self,
        *args: Any,
        moe: Sequence[Mapping] | None = None,
        label_space: LabelSpace | dict | None = None,
        plan: str | Mapping | ExpertPlan | None = None,
        embedder: Mapping | None = None,
        restrict_classes: bool | None = None,
        domain: str | None = None,
        log_routing: bool = True,
        freeze_others: bool | Mapping[str, Sequence[str]] = False,
        domain_features: Mapping | None = None,
        both_readings: bool = False,
        newcomers: Sequence[str] = (),
        adapt: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.__dict__.update(newcomers=tuple(newcomers), _trained=(), _frozen=())
        if label_space is not None:
            label_space = LabelSpace.from_config(label_space)
            told = dict(restrict_classes=restrict_classes, newcomers=self.newcomers or None)
            for key in HEADS:
                if isinstance(kwargs.get(key), Mapping):
                    kwargs[key] = _tell_head(kwargs[key], label_space, told)
        images_are_rgb = _is_rgb(kwargs.get('data_preprocessor'))
        super().__init__(*args, **kwargs)
        self.label_space = label_space
        self.domain = domain
        self.log_routing = log_routing
        self.routing_state = RoutingState()
        self._in_forward = False
        self._images_are_rgb = images_are_rgb
        specs = [_with_plan(_with_targets(spec, self), plan) for spec in moe or ()]
        self.moe_names: list[str] = []
        if specs:
            self.moe_names = replace_modules(self, specs, self.routing_state)
        self._routes_images = any(x.share == 'image' for x in self.moe_layers().values())
        self._refuse_frozen()
        self.expert_start: ExpertStart | None = None
        if freeze_others:
            layers = [rf'{re.escape(name)}\..*' for name in self.moe_names]
            self._freeze('freeze_others', layers, _train_patterns(freeze_others))
        if adapt is not None:
            adaptation = Adaptation(**adapt)
            own = adaptation.trained(self.moe_layers(), label_space)
            self._freeze('adapt', own, adaptation.train)
            plans = [found for found in map(_plan_of, specs) if found is not None]
            self.expert_start = adaptation.expert_start(plans[0] if plans else None)
        if adapter_layers(self):
            print_log(str(count_parameters(self)), logger='current')
        self._embeds_known = any(
            layer.router.needs_embeddings for layer in self.moe_layers().values()
        )
        if label_space is not None:
            # A label space may name domains that are held out of training, and so of the plan.
            check_datasets(self, label_space.domains, held_out=True)
        self._planned = planned_domains(self.moe_layers().values())
        self._prototypes = _prototypes([plan, *(_plan_of(spec) for spec in specs)])
        if embedder is None and self._prototypes is not None:
            embedder = self._prototypes.get('embedder')
        self._embedder = None if embedder is None else Detached(dict(embedder))
        self.domain_mode = 'given'
        self._unknown = [router.unknown for router in self.plan_routers()]
        self.both_readings = both_readings
        self._features: Tensor | None = None
        #: In a forward that guesses by features: the samples and the numbers of the unknown.
        self._guessed: tuple[list, list[int]] | None = None
        self._only_features = False
        self.domain_features: DomainFeatures | None = None
        self.guess_by = 'embedder'
        if domain_features is not None:
            self.add_domain_features(**domain_features)

    # -- building and weights --------------------------------------------------------------------

    def moe_layers(self) -> dict[str, MoELayer]:
        """The MoE layers by name."""
        return {name: self.get_submodule(name) for name in self.moe_names}

    def init_weights(self) -> None:
        """The base model's initialisation, then upcycling.

        The base runs on the *dense* modules, put back in their places for that time: it draws the
        random numbers the dense model would draw, so that one seed gives the MoE model and its
        dense twin the same weights, and no initialisation that walks the model ever meets an
        expert list or a router.
        """
        with self._dense_modules():
            super().init_weights()
        upcycle_(self)

    @contextmanager
    def _dense_modules(self) -> Iterator[None]:
        """The dense modules in the places of their layers."""
        places = [
            (parent._modules, child, layer)
            for parent in list(self.modules())
            for child, layer in parent._modules.items()
            if isinstance(layer, MoELayer)
        ]
        try:
            for children, child, layer in places:
                children[child] = layer.dense
            yield
        finally:
            for children, child, layer in places:
                children[child] = layer

    def train(self, mode: bool = True) -> MoEMixin:
        """As the base model; norms that are frozen by name stay in evaluation mode.

        Frozen parameters have ``requires_grad=False`` while training only: torch chooses between
        two ways to multiply by that flag (``matmul`` folds the batch or does not), also without
        gradients, so a model that was frozen would else not compute the bits of one that was not.
        """
        super().train(mode)
        for name in self._frozen:
            self.get_parameter(name).requires_grad_(not mode)
        if self._trained:
            for name, module in self.named_modules():
                if isinstance(module, _NormBase) and not self._is_trained(f'{name}.weight'):
                    module.eval()
        return self

    @property
    def frozen_parameters(self) -> tuple[str, ...]:
        """Names of the parameters that ``freeze_others`` or ``adapt`` freeze, in either mode."""
        return self._frozen

    def _is_trained(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self._trained)

    def _refuse_frozen(self) -> None:
        """A backbone freezes its first stages whole: a router in there would never learn."""
        for name, layer in self.moe_layers().items():
            parameters = list(layer.experts.parameters())
            if layer.router.learned and parameters and not any(p.requires_grad for p in parameters):
                raise ValueError(
                    f'MoE layer {name!r} is in a part that the model freezes (frozen_stages?): '
                    f'neither its experts nor its router would learn. Freeze less, or choose '
                    f'another target'
                )

    def _freeze(self, option: str, own: Sequence[str], train: Sequence[str]) -> None:
        """Freeze all parameters but those whose names match a pattern of ``own`` or ``train``."""
        known = dict(self.named_parameters())
        idle = [x for x in train if not any(re.fullmatch(x, name) for name in known)]
        if idle:
            raise ValueError(
                f'{option}: no parameter is called {idle[0]!r}; the last are {list(known)[-4:]}'
            )
        self._trained = (*own, *train)
        self._freeze_untrained()
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(
                f'{option} leaves nothing to train: '
                + (f'{self.moe_names} are frozen too' if self.moe_names else 'no moe is given')
            )

    def _freeze_untrained(self) -> None:
        """Freeze what :meth:`_freeze` was not told to train; again where a part was built anew."""
        frozen = dict.fromkeys(self._frozen)
        for name, parameter in self.named_parameters():
            if not self._is_trained(name) and (parameter.requires_grad or name in frozen):
                parameter.requires_grad_(False)
                frozen[name] = None
        self._frozen = tuple(frozen)

    def class_rows(self) -> dict[str, tuple[str | None, ...]]:
        """Parameters with a row per class, by regular expression of their module's full name.

        The value names the class of each of the C channels of one anchor or query (None for the
        background): the parameter's first dimension is k * C. Empty where the model has no label
        space of its own.
        """
        rows: dict[str, tuple[str | None, ...]] = {}
        for key in HEADS:
            head = getattr(self, key, None)
            if isinstance(head, MultiDomainHeadMixin):
                found = head.class_rows().items()
                rows.update({rf'{key}\.{pattern}': channels for pattern, channels in found})
        return rows

    # -- the domain, told or guessed -------------------------------------------------------------

    def add_domain_features(self, layer: str | None = None, dimension: int | None = None) -> None:
        """Let pooled features of ``layer`` tell the domain of images from now on.

        Args:
            layer: As ``domain_features['layer']`` of the class.
            dimension: As there.

        Raises:
            ValueError: No label space, no such layer, a MoE layer that would have to know the
                domain before the layer has run, or a router that asks for embeddings in training,
                when there are no prototypes yet.
        """
        if self.label_space is None:
            raise ValueError('domain_features needs a label_space: its domains have the prototypes')
        if self._embeds_known:
            raise ValueError(
                'domain_features: a router of this model routes by embeddings in training, when '
                'features have no prototypes yet; it needs the embedder'
            )
        layer = last_unrouted_layer(self, self.moe_names) if layer is None else layer
        modules = dict(self.named_modules())
        if layer not in modules:
            near = difflib.get_close_matches(layer, modules, n=3)
            raise ValueError(f'domain_features: there is no layer {layer!r}; near: {near}')
        self.domain_features = DomainFeatures(self.label_space.domains, layer, dimension or 0)
        self.guess_by = 'features'
        modules[layer].register_forward_hook(self._note_features)
        if dimension is None:
            weight = next(modules[layer].parameters(), torch.zeros(()))
            flags = [(module, module.training) for module in self.modules()]
            try:
                for module, _ in flags:
                    module.training = False
                found = self.pooled_features(torch.zeros(1, 3, 64, 64, device=weight.device))
            finally:
                for module, flag in flags:
                    module.training = flag
            self.domain_features.mean = found.new_zeros(
                len(self.label_space.domains), found.shape[1]
            )

    def pooled_features(self, inputs: Tensor, data_samples: Sequence | None = None) -> Tensor:
        """The features that ``domain_features`` tells domains by; what lies behind does not run.

        Args:
            inputs: Preprocessed images, has shape (B, 3, H, W).
            data_samples: Their data samples, for their extents.

        Returns:
            Has shape (B, d), rows of length 1.
        """
        self._only_features = True
        try:
            with torch.no_grad(), self._routing(inputs, data_samples):
                super().extract_feat(inputs)
        except _FeaturesThere:
            assert self._features is not None
            return self._features
        finally:
            self._only_features = False
        raise ValueError(
            f'domain_features: {self._feature_layer!r} does not run when features are extracted'
        )

    @property
    def _feature_layer(self) -> str:
        return '' if self.domain_features is None else self.domain_features.layer

    def set_domain_mode(self, mode: str, by: str | None = None) -> None:
        """Test as if domains were told, or as if they were not, whatever data samples say.

        Args:
            mode: ``'given'``; ``'nearest'``: every image is taken for one of the domain whose
                prototype is nearest; ``'mixture'``: so are its classes, and its experts are mixed
                by the posterior. Training is left alone.
            by: What guesses, ``'embedder'`` or ``'features'``; None leaves it.

        Raises:
            ValueError: There is no such mode, or nothing to guess by.
        """
        if mode not in DOMAIN_MODES:
            raise ValueError(f'domain mode must be one of {DOMAIN_MODES}, got {mode!r}')
        by = self.guess_by if by is None else by
        if by not in GUESSES:
            raise ValueError(f'a domain is guessed by one of {GUESSES}, got {by!r}')
        if mode != 'given':
            if by == 'features' and self.domain_features is None:
                raise ValueError('to guess by features, give the model domain_features={}')
            if by == 'embedder' and (self._embedder is None or self._prototypes is None):
                raise ValueError(
                    'to guess by the embedder, the model needs a plan that has prototypes'
                )
        for router, configured in zip(self.plan_routers(), self._unknown, strict=True):
            router.unknown = configured if mode == 'given' else mode
        self.domain_mode, self.guess_by = mode, by

    def plan_routers(self) -> list[PlanRouter]:
        """The routers that send images where the plan says, and not those it only teaches."""
        routers = [layer.router for layer in self.moe_layers().values()]
        return [router for router in routers if isinstance(router, PlanRouter)]

    def _note_features(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        """Forward hook of the feature layer."""
        if self._only_features or (self._guessed is not None and self._features is None):
            self._features = pool_features(output, self.routing_state.extents)
            if self._only_features:
                raise _FeaturesThere
            assert self._guessed is not None
            self._set_nearest(*self._guessed)

    def _own_features(self) -> Tensor:
        if self._features is None:
            raise ValueError(
                'a MoE layer has to know the domain of an image before '
                f'{self._feature_layer!r} has run, whose features are to tell it: '
                f'choose an earlier domain_features layer (MoE layers: {self.moe_names})'
            )
        return self._features

    # -- forward ---------------------------------------------------------------------------------

    def forward(
        self, inputs: Tensor, data_samples: Sequence | None = None, mode: str = 'tensor'
    ) -> Any:
        """As the base model, with the routing begun from the data samples."""
        with self._routing(inputs, data_samples):
            return super().forward(inputs, data_samples, mode=mode)

    def loss(self, inputs: Tensor, data_samples: Sequence, *args: Any, **kwargs: Any) -> dict:
        """The base model's losses, and the routing's: ``loss_moe_*``.

        Args:
            inputs: Preprocessed images, has shape (B, 3, H, W).
            data_samples: Their data samples, with a ``domain`` each.
            *args: As the base model.
            **kwargs: As the base model.
        """
        with self._routing(inputs, data_samples):
            losses = super().loss(inputs, data_samples, *args, **kwargs)
            losses.update(self.routing_state.collect())
            if self.log_routing:
                losses.update(routing_summary(self.routing_state.stats()))
        return losses

    def predict(
        self, inputs: Tensor, data_samples: Sequence | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the base model; predictions carry unified labels.

        Args:
            inputs: Preprocessed images, has shape (B, 3, H, W).
            data_samples: Their data samples. One without ``domain`` is routed by its embedding and
                gets the ``nearest_domain`` in its metainfo.
            *args: As the base model.
            **kwargs: As the base model.
        """
        with self._routing(inputs, data_samples):
            for head in self._multi_domain_heads():
                head.keep_unrestricted = self.both_readings
            results = super().predict(inputs, data_samples, *args, **kwargs)
            if self.both_readings and results:
                self._add_unrestricted(inputs, results, *args, **kwargs)
            return results

    def _add_unrestricted(
        self, inputs: Tensor, results: Sequence, *args: Any, **kwargs: Any
    ) -> None:
        """Give each sample its second reading: the head's, or that of a second forward.

        A dense head makes both of the same outputs. A DETR head's queries are chosen by classes, so
        the forward itself is another.
        """
        head = next((h for h in self._multi_domain_heads()), None)
        if head is None:
            raise ValueError('both_readings needs a head that restricts classes (MultiDomain...)')
        instances = head.take_unrestricted()
        if instances is None:
            copies = [sample.clone() for sample in results]
            with head.unrestricted():
                again = super().predict(inputs, copies, *args, **kwargs)
            instances = [sample.pred_instances for sample in again]
        for sample, found in zip(results, instances, strict=True):
            sample.pred_instances_unrestricted = found

    def _multi_domain_heads(self) -> list[MultiDomainHeadMixin]:
        heads = [getattr(self, key, None) for key in HEADS]
        return [head for head in heads if isinstance(head, MultiDomainHeadMixin)]

    def extract_feat(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the base model; by itself it is a forward of its own, with no domain told."""
        with self._routing(inputs, None):
            return super().extract_feat(inputs, *args, **kwargs)

    @contextmanager
    def _routing(self, inputs: Tensor, data_samples: Sequence | None) -> Iterator[None]:
        """Begin the routing state, unless an outer entry of this forward already has."""
        if self._in_forward:
            yield
            return
        self._in_forward = True
        hidden = self._hide_domains(data_samples)
        try:
            self._begin(inputs, data_samples)
            yield
        finally:
            self._in_forward = False
            self._guessed = None
            for sample, domain in hidden:
                sample.set_metainfo({'domain': domain})

    def _hide_domains(self, data_samples: Sequence | None) -> list[tuple[Any, str]]:
        """Where domains are to be guessed, take them from the samples for the time of a forward."""
        samples = [s for s in data_samples or () if s is not None and 'domain' in s.metainfo]
        if self.training or self.domain_mode == 'given' or self._only_features:
            return []
        return [(sample, sample.pop('domain')) for sample in samples]

    def _begin(self, inputs: Tensor, data_samples: Sequence | None) -> None:
        samples = [None] * len(inputs) if data_samples is None else list(data_samples)
        domains = [None if s is None else s.metainfo.get('domain') for s in samples]
        for i, sample in enumerate(samples):
            if domains[i] is None and self.domain is not None and self.domain_mode == 'given':
                domains[i] = self.domain
                if sample is not None:
                    sample.set_metainfo({'domain': self.domain})
        if self.label_space is not None:
            for domain in domains:
                if domain is not None:
                    self.label_space.check_domain(domain)
        unknown = [i for i, domain in enumerate(domains) if domain is None]
        # The closure keeps the images until the next forward: only where they may be needed.
        embed: Callable[[], Tensor] | None = None
        prototypes = None
        self._features = None
        unplanned = self._planned is not None and not self._planned.issuperset(domains)
        if self._only_features:
            # Who asks now asks too early, and is told so.
            embed = self._own_features
            prototypes = (dict.fromkeys(self.label_space.domains, torch.zeros(1)), 1.0)
        elif unknown or unplanned or self._embeds_known:
            if self.guess_by == 'features' and self.domain_features is not None:
                # Features alone may be asked for before anything was measured.
                asked = any(sample is not None for sample in samples)
                if not self.training and (asked or self.domain_features.measured):
                    embed = self._own_features
                    prototypes = self.domain_features.prototypes()
                    self._guessed = (samples, unknown)
            elif self._embedder is not None:
                embed = self._embed_of(inputs, samples)
        images = inputs if self._routes_images else None
        self.routing_state.begin(
            domains,
            len(inputs),
            embed=embed,
            training=self.training,
            images=images,
            extents=image_extents(inputs, samples),
            prototypes=prototypes,
        )
        # By features it is known once they are there, which is before any head asks.
        if unknown and embed is not None and self._guessed is None and not self.training:
            self._set_nearest(samples, unknown)

    def _embed_of(self, inputs: Tensor, samples: list) -> Callable[[], Tensor]:
        def embed() -> Tensor:
            images = restore_images(inputs, samples, self.data_preprocessor, self._images_are_rgb)
            return self._embedder.embed(images)

        return embed

    def _set_nearest(self, samples: list, unknown: list[int]) -> None:
        """Note the nearest domain of images without one: its classes are what they may show."""
        refused = any(
            getattr(x.router, 'unknown', '') == 'error' for x in self.moe_layers().values()
        )
        if refused or all(samples[i] is None for i in unknown):
            return
        means = self._means()
        if means is None:
            return
        embeddings = self.routing_state.embeddings()[unknown].float().cpu()
        prototypes = torch.stack([torch.as_tensor(mean).float().cpu() for mean in means.values()])
        if prototypes.shape[1] != embeddings.shape[1]:
            raise ValueError(
                f'the embedder gives {embeddings.shape[1]} numbers an image, the prototypes of '
                f'the plan have {prototypes.shape[1]}: the plan was made with another embedder'
            )
        names = list(means)
        found = (embeddings @ prototypes.t()).argmax(1).tolist()
        for i, nearest in zip(unknown, found, strict=True):
            if samples[i] is not None:
                samples[i].set_metainfo({'nearest_domain': names[nearest]})

    def _means(self) -> Mapping[str, Any] | None:
        """Domain -> prototype among this forward's embeddings."""
        if self.routing_state.prototypes is not None:
            return self.routing_state.prototypes[0]
        return None if self._prototypes is None else self._prototypes['mean']


class _FeaturesThere(Exception):
    """Ends a forward that is only run for features."""


class Detached:
    """A frozen module that its owner does not own: no part of its state dict or parameters.

    Built at the first use, and shared by copies of the owner (EMA): frozen weights need no second
    set.

    Args:
        cfg: Config of the module; ``FrozenEmbedder`` where it names no type.
    """

    def __init__(self, cfg: dict) -> None:
        self.cfg = cfg
        self._module: nn.Module | None = None

    def module(self, device: torch.device | str = 'cpu') -> nn.Module:
        """The module on ``device``, in evaluation mode and without gradients."""
        if self._module is None:
            # A plan names its embedder's parts without a scope: ours, in a classifier too.
            defaults = {'type': 'FrozenEmbedder', '_scope_': SCOPE}
            module = MODELS.build({**defaults, **copy.deepcopy(self.cfg)})
            self._module = module.eval().requires_grad_(False)
        return self._module.to(device)

    @torch.no_grad()
    def embed(self, images: Sequence[Tensor]) -> Tensor:
        """Embeddings of RGB images (3, H_i, W_i) in 0..255, has shape (B, d)."""
        return self.module(images[0].device).embed(list(images))

    def __deepcopy__(self, memo: dict) -> Detached:
        return self

    def __getstate__(self) -> dict:
        return {'cfg': self.cfg, '_module': None}


def image_extents(inputs: Tensor, samples: Sequence) -> list[tuple[float, float]]:
    """The share of the batch's height and width that each image has, the rest being padding.

    Args:
        inputs: Preprocessed batch, has shape (B, 3, H, W).
        samples: A data sample per image, or None; one that was batched with padding has
            ``batch_input_shape`` beside its ``img_shape``.
    """
    height, width = inputs.shape[-2:]
    extents = []
    for sample in samples:
        meta = {} if sample is None else sample.metainfo
        known = 'img_shape' in meta and 'batch_input_shape' in meta
        h, w = meta['img_shape'][:2] if known else (height, width)
        extents.append((min(1.0, h / height), min(1.0, w / width)))
    return extents


def restore_images(
    inputs: Tensor, data_samples: Sequence, preprocessor: nn.Module, images_are_rgb: bool
) -> list[Tensor]:
    """Undo the data preprocessor: RGB images in 0..255 without padding.

    Args:
        inputs: Preprocessed batch, has shape (B, 3, H, W).
        data_samples: A data sample per image, whose ``img_shape`` (h, w) tells the padding; None
            or one without it: the whole.
        preprocessor: The model's data preprocessor (its ``mean`` and ``std``).
        images_are_rgb: The channel order of ``inputs``; False for BGR.

    Returns:
        B images, each has shape (3, h, w).
    """
    images = inputs.detach().float()
    mean, std = getattr(preprocessor, 'mean', None), getattr(preprocessor, 'std', None)
    if mean is not None and std is not None:
        images = images * std + mean
    if not images_are_rgb:
        images = images.flip(1)
    restored = []
    for image, sample in zip(images, data_samples, strict=True):
        shape = None if sample is None else sample.metainfo.get('img_shape')
        if shape is not None:
            image = image[:, : int(shape[0]), : int(shape[1])]
        restored.append(image.clamp(0, 255))
    return restored


def routing_summary(stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A line for the log from the layers' statistics, averaged over layers.

    Args:
        stats: ``<layer>/count`` -> items per expert, has shape (E,).

    Returns:
        ``moe/max_share``: the busiest expert's share of the items; ``moe/idle``: the share of the
        experts without an item.
    """
    counts = [value.float() for key, value in stats.items() if key.endswith('/count')]
    if not counts:
        return {}
    shares = [count.max() / count.sum().clamp(min=1) for count in counts]
    idle = [(count == 0).float().mean() for count in counts]
    return {
        'moe/max_share': torch.stack(shares).mean(),
        'moe/idle': torch.stack(idle).mean(),
    }


def _tell_head(cfg: Mapping, label_space: LabelSpace, told: Mapping[str, Any]) -> Mapping:
    """The head's config with the label space, or its number of classes for an ordinary head."""
    cfg = copy.copy(cfg)
    head = MODELS.get(cfg['type']) if isinstance(cfg.get('type'), str) else cfg.get('type')
    if isinstance(head, type) and issubclass(head, MultiDomainHeadMixin):
        cfg['label_space'] = label_space
        cfg['num_classes'] = label_space.num_classes
        cfg.update({key: value for key, value in told.items() if value is not None})
    elif 'num_classes' in cfg:
        cfg['num_classes'] = label_space.num_classes
    return cfg


def _train_patterns(freeze_others: bool | Mapping[str, Sequence[str]]) -> list[str]:
    if not isinstance(freeze_others, Mapping):
        return []
    if set(freeze_others) != {'train'}:
        raise ValueError(
            rf"freeze_others must be a bool or dict(train=[r'head\..*']), got {freeze_others!r}"
        )
    train = freeze_others['train']
    return [train] if isinstance(train, str) else list(train)


def _is_rgb(preprocessor: Any) -> bool:
    """Whether the preprocessor hands over RGB; images are loaded as BGR."""
    get = (
        preprocessor.get if isinstance(preprocessor, Mapping) else vars(preprocessor or object).get
    )
    return bool(get('bgr_to_rgb') or get('to_rgb') or get('_channel_conversion'))


def planned_domains(layers: Iterable[MoELayer]) -> frozenset[str] | None:
    """The domains that every plan among the layers' routers knows (others go by their embedding);
    None without a plan."""
    plans = [r.datasets for x in layers for r in x.router.modules() if isinstance(r, PlanRouter)]
    return frozenset.intersection(*map(frozenset, plans)) if plans else None


def _with_targets(spec: Mapping, model: nn.Module) -> Mapping:
    """The spec with the FFNs of its ``blocks`` as ``targets``.

    Raises:
        ValueError: It has both, or the model's backbone is no transformer whose blocks are
            ``layers.<i>`` with an ``ffn``; or see :func:`~mmdet_moe.moe.sparse_blocks`.
    """
    if 'blocks' not in spec:
        return spec
    rest = {key: value for key, value in spec.items() if key != 'blocks'}
    if 'targets' in rest:
        raise ValueError(
            f'a MoE spec has blocks={spec["blocks"]!r} and targets={rest["targets"]!r}: give one'
        )
    backbone = getattr(model, 'backbone', None)
    layers = getattr(backbone, 'layers', None)
    if not isinstance(layers, nn.ModuleList) or not all(hasattr(x, 'ffn') for x in layers):
        raise ValueError(
            f'blocks={spec["blocks"]!r} is for a backbone that is a row of layers with an ffn each '
            f'(VisionTransformer); a {type(backbone).__name__} is none: name the modules in targets'
        )
    chosen = sparse_blocks(spec['blocks'], len(layers))
    return {**rest, 'targets': [rf'backbone\.layers\.{block - 1}\.ffn' for block in chosen]}


def is_plan_router(spec: Mapping) -> bool:
    """Whether the router of a MoE spec takes a plan (``PlanRouter``, ``DAMEXRouter`` ...)."""
    router = spec.get('router')
    kind = router.get('type') if isinstance(router, Mapping) else None
    try:
        return 'plan' in inspect.signature(ROUTERS.get(kind)).parameters
    except KeyError:  # building it says what is wrong
        return False


def _with_plan(spec: Mapping, plan: Any) -> Mapping:
    """The spec with the model's plan where its router takes one and names none."""
    if not is_plan_router(spec) or spec['router'].get('plan') is not None:
        return spec
    if plan is None:
        raise ValueError(
            f'the router of targets {spec.get("targets")!r} has no plan: give it one, or give '
            "the model plan='plan.json' (tools/plan_experts.py makes it)"
        )
    return {**spec, 'router': {**spec['router'], 'plan': plan}}


def _plan_of(spec: Mapping) -> Any:
    return spec['router'].get('plan') if is_plan_router(spec) else None


def _prototypes(plans: Sequence[Any]) -> Mapping | None:
    """The prototypes of the first plan that has some."""
    for plan in plans:
        if plan is not None:
            prototypes = load_plan(plan).prototypes
            if prototypes is not None:
                return prototypes
    return None
