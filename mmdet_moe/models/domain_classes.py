"""Which classes an image may be scored on: masks for training, slices for testing.

An annotator of one domain says nothing about another domain's classes: a blood cell image without
a 'car' box is no evidence that it has no car, and a picture of cars carries boxes of cars only.
So an image is trained and tested on the classes of its own domain:

* *Training*: the logits of all other classes are set to :data:`MASKED_LOGIT` wherever logits are
  made. Sigmoid and softmax make 0 of it, and every loss built on them gets neither a value nor a
  gradient from those classes.
* *Testing*: the scores are *sliced* to the domain's classes and post-processed in its local
  labels. Masking alone would not do: top-k would fill up with classes of score 0, and class-wise
  NMS offsets boxes by ``label * (max + 1)``, so that a shift of the labels changes rounding.

Conventions: B images, C unified classes, A anchors per location.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmdet_moe.structures import LabelSpace, LabelSpaceError

from .layers.class_blocks import RowLayout

#: Finite on purpose: -inf makes NaN of 0 * -inf in the focal loss, -1e9 does not exist in fp16.
MASKED_LOGIT = -1e4


class DomainClasses:
    """The class masks and ids of a label space's domains as tensors, cached per device.

    Args:
        label_space: The label space, or its config.
        background: Whether logits carry a background channel after the classes (softmax heads).
            Background belongs to every domain.
    """

    def __init__(self, label_space: LabelSpace | dict, background: bool = False) -> None:
        self.label_space = LabelSpace.from_config(label_space)
        self.background = background
        self._ids: dict[tuple[str, torch.device], Tensor] = {}
        self._masks: dict[tuple[str, torch.device], Tensor] = {}

    def ids(self, domain: str, device: torch.device | str = 'cpu') -> Tensor:
        """Unified ids of the domain's classes in local order, has shape (num_local,)."""
        key = (domain, torch.device(device))
        if key not in self._ids:
            ids = self.label_space.unified_ids(domain)
            self._ids[key] = torch.tensor(ids, dtype=torch.long, device=device)
        return self._ids[key]

    def columns(self, domain: str, device: torch.device | str = 'cpu') -> Tensor:
        """As :meth:`ids`, with the background channel appended where there is one."""
        ids = self.ids(domain, device)
        if not self.background:
            return ids
        return torch.cat([ids, ids.new_tensor([self.label_space.num_classes])])

    def allowed(self, domains: Sequence[str], device: torch.device | str = 'cpu') -> Tensor:
        """Which channels each image may use, bool, has shape (B, C or C + 1)."""
        return torch.stack([self._mask(domain, torch.device(device)) for domain in domains])

    def _mask(self, domain: str, device: torch.device) -> Tensor:
        key = (domain, device)
        if key not in self._masks:
            channels = self.label_space.num_classes + int(self.background)
            mask = torch.zeros(channels, dtype=torch.bool, device=device)
            mask[self.columns(domain, device)] = True
            self._masks[key] = mask
        return self._masks[key]


class MultiDomainHeadMixin:
    """What the multi-domain heads have in common: label space, masks, slices, loss weights.

    Put before a dense or DETR head of mmdet. Without a ``label_space`` the head is its base class.

    Args:
        num_classes: As the base head's; with a ``label_space`` it may be left out, and is the
            number of unified classes in any case.
        label_space: A :class:`~mmdet_moe.structures.LabelSpace` or its config. MoE detectors pass
            their own on.
        restrict_classes: At test, score an image on its domain's classes only. ``False``: all
            classes compete (the "unrestricted" reading). Images whose domain is unknown are always
            scored on all classes.
        loss_norm: What the losses are divided by. ``'batch'``: the number of positives in the
            batch, as mmdet does, by which a domain with 18 boxes an image drowns one with 1.7.
            ``'domain'``: see :func:`domain_loss_weights`.
        newcomers: Domains of the label space that joined a trained model. The rows of the classes
            that no domain before them has are parameters of their own (``newcomers.<domain>.*``
            beside the old ones), see :mod:`~mmdet_moe.models.layers.class_blocks`.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        *args: Any,
        label_space: LabelSpace | dict | None = None,
        restrict_classes: bool = True,
        loss_norm: str = 'batch',
        newcomers: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        if loss_norm not in ('batch', 'domain'):
            raise ValueError(f"loss_norm must be 'batch' or 'domain', got {loss_norm!r}")
        if label_space is not None:
            label_space = LabelSpace.from_config(label_space)
            num_classes = label_space.num_classes
        elif num_classes is None:
            raise ValueError(f'{type(self).__name__} needs num_classes or a label_space')
        if newcomers and label_space is None:
            raise ValueError(f'newcomers {list(newcomers)} need a label_space that has them')
        # Before the base class, which builds the layers.
        self.__dict__.update(label_space=label_space, newcomers=tuple(newcomers))
        super().__init__(num_classes, *args, **kwargs)
        self.restrict_classes = restrict_classes
        self.loss_norm = loss_norm
        #: Whether to keep what is predicted where all classes compete, for take_unrestricted.
        self.keep_unrestricted = False
        self._unrestricted: list[Any] | None = None
        self.domain_classes = None
        if label_space is not None:
            background = self.cls_out_channels == num_classes + 1
            self.domain_classes = DomainClasses(label_space, background)

    # -- training --------------------------------------------------------------------------------

    def train_domains(
        self, batch_img_metas: Sequence[Mapping], batch_gt_instances: Sequence[Any] | None = None
    ) -> list[str] | None:
        """The domain of each training image, or None without a label space.

        Raises:
            ValueError: An image has no domain or an unknown one, or is labelled with a class that
                its domain does not have (its logit would be masked, and the loss huge).
        """
        if self.label_space is None:
            return None
        domains = []
        for meta in batch_img_metas:
            domain = meta.get('domain')
            if domain is None:
                raise ValueError(
                    f'image {meta.get("img_path")!r} has no domain, which training on a label '
                    'space needs: data samples get it from MultiDomainDataset '
                    "(data_sample.metainfo['domain'])"
                )
            domains.append(self.label_space.check_domain(domain))
        if batch_gt_instances is not None:
            self._check_labels(batch_img_metas, domains, batch_gt_instances)
        return domains

    def _check_labels(
        self, batch_img_metas: Sequence[Mapping], domains: list[str], gts: Sequence[Any]
    ) -> None:
        labels = [gt.labels for gt in gts]
        if not labels or sum(map(len, labels)) == 0:
            return
        # One comparison and one synchronisation for the whole batch.
        flat = torch.cat(labels)
        image = torch.repeat_interleave(
            torch.arange(len(labels), device=flat.device),
            torch.tensor([len(x) for x in labels], device=flat.device),
        )
        inside = (flat >= 0) & (flat < self.num_classes)
        allowed = self.domain_classes.allowed(domains, flat.device)
        fine = inside & allowed[image, flat.clamp(0, self.num_classes - 1)]
        if bool(fine.all()):
            return
        wrong = int((~fine).nonzero()[0])
        i, label = int(image[wrong]), int(flat[wrong])
        name = self.label_space.classes[label] if bool(inside[wrong]) else 'no class at all'
        raise ValueError(
            f'image {batch_img_metas[i].get("img_path")!r} of domain {domains[i]!r} has a box of '
            f'unified label {label} ({name}), which is not a class of that domain; labels of a '
            'multi-domain batch are unified ids, as MultiDomainDataset makes them'
        )

    def weigh_domains(self, domains: Sequence[str], positives: Sequence[float]) -> list[float]:
        """:func:`domain_loss_weights` where ``loss_norm`` is 'domain', else ones."""
        if self.loss_norm == 'batch':
            return [1.0] * len(domains)
        return domain_loss_weights(domains, positives)

    # -- testing ---------------------------------------------------------------------------------

    def test_domain(self, img_meta: Mapping) -> str | None:
        """The domain whose classes a test image is restricted to, or None for all classes.

        It is the image's own, or the one nearest to it where it has none and the model found one
        (``nearest_domain``).
        """
        if self.label_space is None or not self.restrict_classes:
            return None
        domain = img_meta.get('domain') or img_meta.get('nearest_domain')
        return None if domain is None else self.label_space.check_domain(domain)

    @contextmanager
    def unrestricted(self) -> Iterator[None]:
        """For a time, score all images on all classes."""
        before, self.restrict_classes = self.restrict_classes, False
        try:
            yield
        finally:
            self.restrict_classes = before

    def take_unrestricted(self) -> list[Any] | None:
        """The last predictions where all classes compete, once, if the head kept them.

        Only a head whose outputs do not depend on the restriction can: a dense one.
        """
        kept, self._unrestricted = self._unrestricted, None
        return kept

    def local_view(self, domain: str) -> Any:
        """This head as one that has the domain's classes only, sharing everything but their number.

        A shallow copy: same modules and parameters, its own ``num_classes``.
        """
        num_local = len(self.label_space.unified_ids(domain))
        view = copy.copy(self)
        view.num_classes = num_local
        view.cls_out_channels = num_local + int(self.domain_classes.background)
        return view

    # -- checkpoints -----------------------------------------------------------------------------

    def row_layout(self, channels: int) -> RowLayout:
        """Which of an anchor's channels are the newcomers'.

        Raises:
            LabelSpaceError: A newcomer is not in the label space, or nobody was there before.
        """
        before, blocks = newcomer_classes(self.label_space, self.newcomers)
        return RowLayout(channels, blocks, before if blocks else ())

    def class_rows(self) -> dict[str, tuple[str | None, ...]]:
        """Parameters with a row per class: name pattern -> the class of each channel of one anchor
        or query (None: background).

        Used when rows are copied from a checkpoint with other classes. A parameter of that name
        has a first dimension of k * channels, laid out as (k, channels).
        """
        raise NotImplementedError

    def rows_of(self, pattern: str, channels: int) -> dict[str, tuple[str | None, ...]]:
        """What :meth:`class_rows` says of one layer and its blocks."""
        if self.label_space is None:
            return {pattern: (None,) * channels}
        return named_rows(pattern, self.row_layout(channels), self.label_space)


def newcomer_classes(
    space: LabelSpace, newcomers: Sequence[str]
) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
    """The unified ids of the domains before the newcomers, and those that each newcomer brought,
    which no domain before it has.

    Wherever the newcomers stand in the label space, the first are in the order of a label space
    without them, and a newcomer's in the order of its own classes.

    Raises:
        LabelSpaceError: A newcomer is not in the label space, or nobody was there before.
    """
    if not newcomers:
        return (), {}
    for name in newcomers:
        space.check_domain(name)
    old = [domain for domain in space.domains if domain not in newcomers]
    if not old:
        raise LabelSpaceError(
            f'newcomers {list(newcomers)} are all domains of the label space: to whom do they come?'
        )
    known = dict.fromkeys(i for domain in old for i in space.unified_ids(domain))
    before, found = tuple(known), {}
    for name in newcomers:
        own = tuple(dict.fromkeys(i for i in space.unified_ids(name) if i not in known))
        known.update(dict.fromkeys(own))
        if own:
            found[name] = own
    return before, found


def named_rows(
    pattern: str, layout: RowLayout, space: LabelSpace
) -> dict[str, tuple[str | None, ...]]:
    """The classes of the rows of a layer called ``pattern`` and of its blocks."""
    names = [*space.classes, *[None] * (layout.channels - space.num_classes)]
    rows = {pattern: tuple(names[i] for i in layout.own)}
    for name, block in layout.blocks.items():
        rows[rf'{pattern}\.newcomers\.{re.escape(name)}'] = tuple(names[i] for i in block)
    return rows


def domain_loss_weights(domains: Sequence[str], positives: Sequence[float]) -> list[float]:
    r"""Weights of the images' losses so that every domain is normalised by its own positives.

    With :math:`l_i` the summed loss of image i, :math:`n_i` its positives, :math:`B_d` and
    :math:`P_d = \max(\sum_{i \in d} n_i, 1)` the images and positives of domain d, B and P those
    of the batch, mmdet computes :math:`\sum_i l_i / P`. Here it is to be

    .. math:: L = \sum_d \frac{B_d}{B} \sum_{i \in d} \frac{l_i}{P_d}
                = \frac{1}{P} \sum_i w_i l_i, \qquad w_i = \frac{B_d}{B} \frac{P}{P_d},

    the average over images of losses per positive. A batch of one domain is weighted by 1: there
    the two normalisations agree.

    Args:
        domains: The domain of each image.
        positives: The number of positives of each image.

    Returns:
        :math:`w_i` for each image.
    """
    total = max(sum(positives), 1.0)
    images: dict[str, int] = {}
    counts: dict[str, float] = {}
    for domain, count in zip(domains, positives, strict=True):
        images[domain] = images.get(domain, 0) + 1
        counts[domain] = counts.get(domain, 0.0) + count
    return [images[d] / len(domains) * total / max(counts[d], 1.0) for d in domains]
