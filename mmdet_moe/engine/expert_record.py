r"""What the experts of a model did with a set of images, and the numbers that tell it.

Axes: I images, C calls of a layer in one forward, E experts, N objects, R groups of objects.

A *decision* is one call's treatment of one image. A head that runs on every FPN level calls its
layers once per level, so there C is the number of levels; elsewhere C is 1. Of a decision with
several items (tokens, patches) the mean over its items is kept.

**Attribution.** An object counts for the decision that it belongs to: that of its image and, in a
layer called once per level, of its level. In classification the image's label is the object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmdet_moe.evaluation.expert_statistics import (
    coefficient_of_variation,
    living_experts,
    mutual_information,
)

SCHEMA = 1
#: COCO's size classes; their limits in pixels of the original image are 32² and 96².
AREAS = ('small', 'medium', 'large')
AREA_LIMITS = (32.0**2, 96.0**2)


# --------------------------------------------------------------------------------------------------
# The record
# --------------------------------------------------------------------------------------------------


@dataclass
class Objects:
    """The N ground-truth objects of the images.

    Attributes:
        image: (N,) number of the image.
        label: (N,) class.
        area: (N,) index into :data:`AREAS`; -1 for an object without a box.
        level: (N,) FPN level; -1 where the model has no anchors.
    """

    image: np.ndarray
    label: np.ndarray
    area: np.ndarray
    level: np.ndarray

    @classmethod
    def empty(cls) -> Objects:
        return cls(*(np.zeros(0, dtype=np.int64) for _ in range(4)))

    def __len__(self) -> int:
        return len(self.image)


@dataclass
class LayerRecord:
    """The decisions of one MoE layer.

    Attributes:
        weight: (I, C, E) combine weight, the mean over the decision's items.
        share: (I, C, E) share of the decision's items that took the expert (weight > 0).
        effective: (I, C) mean over items of exp(entropy of the item's weights), 0 for a dropped
            item.
        items: (I, C) number of items.
        pairs: (E, E) number of items that took both experts; on the diagonal, that took the expert.
        logit_images: (n,) images whose logits were kept.
        logits: (n, C, E) their gate logits, the mean over items; n = 0 where the router has none.
    """

    weight: np.ndarray
    share: np.ndarray
    effective: np.ndarray
    items: np.ndarray
    pairs: np.ndarray
    logit_images: np.ndarray
    logits: np.ndarray

    @property
    def num_experts(self) -> int:
        return self.weight.shape[2]

    @property
    def calls(self) -> int:
        return self.weight.shape[1]


@dataclass
class ExpertRecord:
    """What was recorded in one run over a dataset.

    Attributes:
        images: I paths (or ids).
        domains: I domains, None where an image has none.
        classes: Names by label.
        objects: The ground truth.
        levels: Names of the FPN levels, fine to coarse; none where the model has no anchors.
        layers: MoE layer by name.
    """

    images: list[str]
    domains: list[str | None]
    classes: list[str]
    objects: Objects
    levels: list[str] = field(default_factory=list)
    layers: dict[str, LayerRecord] = field(default_factory=dict)

    def by_level(self, layer: str) -> bool:
        """Whether a layer decides once per FPN level."""
        return len(self.levels) > 1 and self.layers[layer].calls == len(self.levels)

    def of_objects(self, layer: str, values: np.ndarray) -> np.ndarray:
        """(N, E) of (I, C, E): the decision that each object belongs to."""
        of_images = values.mean(axis=1)[self.objects.image]
        if not self.by_level(layer):
            return of_images
        known = self.objects.level >= 0
        of_levels = values[self.objects.image, np.maximum(self.objects.level, 0)]
        return np.where(known[:, None], of_levels, of_images)

    @classmethod
    def merge(cls, records: Sequence[ExpertRecord]) -> ExpertRecord:
        """One record of what several processes recorded, each on its own images."""
        first = records[0]
        starts = np.cumsum([0, *(len(record.images) for record in records)])
        shifted = list(zip(records, starts.tolist(), strict=False))

        def joined(pick: Any) -> np.ndarray:
            return np.concatenate([pick(record, start) for record, start in shifted])

        objects = Objects(
            joined(lambda record, start: record.objects.image + start),
            *(
                joined(lambda record, _, key=key: getattr(record.objects, key))
                for key in ('label', 'area', 'level')
            ),
        )
        layers = {}
        for name in first.layers:
            parts = [(r.layers[name], start) for r, start in shifted if name in r.layers]
            layers[name] = LayerRecord(
                *(
                    np.concatenate([getattr(part, key) for part, _ in parts])
                    for key in ('weight', 'share', 'effective', 'items')
                ),
                pairs=sum(part.pairs for part, _ in parts),
                logit_images=np.concatenate([part.logit_images + start for part, start in parts]),
                logits=np.concatenate([part.logits for part, _ in parts]),
            )
        return cls(
            images=[path for record in records for path in record.images],
            domains=[domain for record in records for domain in record.domains],
            classes=first.classes,
            objects=objects,
            levels=first.levels,
            layers=layers,
        )

    # -- files -----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the statistics to read, the decisions to compute others from."""
        return {
            'schema': SCHEMA,
            'statistics': {name: statistics(self, name) for name in self.layers},
            'classes': self.classes,
            'levels': self.levels,
            'images': {'path': self.images, 'domain': self.domains},
            'objects': {key: value.tolist() for key, value in vars(self.objects).items()},
            'layers': {
                name: {key: rounded(value) for key, value in vars(layer).items()}
                for name, layer in self.layers.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExpertRecord:
        """The record of :meth:`to_dict`.

        Raises:
            ValueError: It is of another schema.
        """
        if data.get('schema') != SCHEMA:
            raise ValueError(
                f'expert record: schema {data.get("schema")!r} is not {SCHEMA}, which this version '
                f'reads'
            )
        integers = ('items', 'logit_images')
        objects = {key: np.array(value, dtype=np.int64) for key, value in data['objects'].items()}
        layers = {}
        for name, layer in data['layers'].items():
            arrays = {
                key: np.array(value, dtype=np.int64 if key in integers else np.float64)
                for key, value in layer.items()
            }
            arrays['logits'] = arrays['logits'].reshape(-1, *arrays['weight'].shape[1:])
            layers[name] = LayerRecord(**arrays)
        return cls(
            images=list(data['images']['path']),
            domains=list(data['images']['domain']),
            classes=list(data['classes']),
            objects=Objects(**objects),
            levels=list(data['levels']),
            layers=layers,
        )


# --------------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------------


def statistics(record: ExpertRecord, layer: str) -> dict[str, Any]:
    r"""The numbers of one layer, as plain data.

    With :math:`w_{te}` the combine weight of item t and T items:

    =================== =======================================================================
    ``items``           T
    ``importance``      :math:`\sum_t w_{te}` of each expert
    ``count``           number of items that took the expert
    ``mean_weight``     importance / T
    ``utilisation``     count / T
    ``cv_importance``   standard deviation over mean of the importance (0: even)
    ``cv_count``        the same of the counts
    ``living``          number of experts with more than 0.01 of the weight:
                        :math:`\sum_t w_{te} / \sum_{t,j} w_{tj}`
    ``effective_k``     ``selected``: experts with weight > 0 per item; ``entropy``:
                        :math:`\frac{1}{T} \sum_t \exp(-\sum_e p_{te} \ln p_{te})`,
                        :math:`p_t = w_t / \sum_e w_{te}`
    ``pairs``           (E, E) number of items that took both
    ``class`` ...       the groups of :func:`groups`: names, weight and count (R, E), number (R,)
    ``information``     mutual information between the expert and domain, class, area, level:
                        ``mi`` in nats and normalised ``nmi``, as
                        :func:`~mmdet_moe.evaluation.expert_statistics.expert_statistics` has them
    =================== =======================================================================

    Dropped items are items: they have weight 0, take no expert and count as 0 in both
    ``effective_k``; ``living`` and the CVs, which are of shares, do not see them.
    """
    data = record.layers[layer]
    items = data.items[:, :, None]
    total = max(int(data.items.sum()), 1)
    importance = (data.weight * items).sum((0, 1), dtype=np.float64)
    count = (data.share * items).sum((0, 1), dtype=np.float64)
    found = groups(record, layer)
    return {
        'num_experts': data.num_experts,
        'items': int(data.items.sum()),
        'importance': rounded(importance),
        'count': rounded(count),
        'mean_weight': rounded(importance / total),
        'utilisation': rounded(count / total),
        'cv_importance': rounded(coefficient_of_variation(importance)),
        'cv_count': rounded(coefficient_of_variation(count)),
        'living': living_experts(importance),
        'effective_k': {
            'selected': rounded(count.sum() / total),
            'entropy': rounded((data.effective * data.items).sum() / total),
        },
        'pairs': rounded(data.pairs),
        **{key: group.to_dict() for key, group in found.items()},
        'information': {
            key: dict(zip(('mi', 'nmi'), rounded(mutual_information(group.weight)), strict=True))
            for key, group in found.items()
            if key != 'level_area'
        },
    }


@dataclass
class Group:
    """Sums over the members of R groups.

    Attributes:
        names: R names.
        weight: (R, E) sum of combine weights.
        count: (R, E) sum of selections.
        number: (R,) members.
    """

    names: list[str]
    weight: np.ndarray
    count: np.ndarray
    number: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """(R, E) mean combine weight; 0 for a group without members."""
        return self.weight / np.maximum(self.number, 1)[:, None]

    def present(self) -> Group:
        """The groups that have members."""
        keep = self.number > 0
        names = [name for name, kept in zip(self.names, keep, strict=True) if kept]
        return Group(names, self.weight[keep], self.count[keep], self.number[keep])

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            'names': self.names,
            'weight': rounded(self.weight),
            'count': rounded(self.count),
            'number': rounded(self.number),
        }


def groups(record: ExpertRecord, layer: str) -> dict[str, Group]:
    """Who went where, summed over

    * ``domain``: all items of the domain's images (absent where no image has a domain),
    * ``class``: objects of the class,
    * ``area``: objects of COCO's sizes,
    * ``level``: all items of the level (in layers that decide per level),
    * ``level_area``: objects of each level and size, named ``'P3 small'``.

    Only what occurs is listed. The last one tells size from level: where the experts differ
    between levels but not between the sizes of one level, the routing follows the level.
    """
    data, objects = record.layers[layer], record.objects
    items = data.items[:, :, None].astype(np.float64)
    of_objects = [record.of_objects(layer, values) for values in (data.weight, data.share)]

    def summed(key: np.ndarray, names: Sequence[str], values: Sequence[np.ndarray]) -> Group:
        valid = (key >= 0) & (key < len(names))
        sums = [np.zeros((len(names), data.num_experts)) for _ in values]
        for out, value in zip(sums, values, strict=True):
            for e in range(data.num_experts):  # much faster than np.add.at
                out[:, e] = np.bincount(key[valid], value[valid, e], minlength=len(names))
        number = np.bincount(key[valid], minlength=len(names))
        return Group(list(names), *sums, number).present()

    found: dict[str, Group] = {}
    domains = sorted({domain for domain in record.domains if domain is not None})
    if domains:
        row = {domain: i for i, domain in enumerate(domains)}
        key = np.array([row.get(domain, -1) for domain in record.domains])
        group = summed(key, domains, [(v * items).sum(1) for v in (data.weight, data.share)])
        number = np.bincount(key[key >= 0], data.items.sum(1)[key >= 0], len(domains))
        group.number = number[number > 0]
        found['domain'] = group
    if len(objects):
        found['class'] = summed(objects.label, record.classes, of_objects)
    if (objects.area >= 0).any():
        found['area'] = summed(objects.area, AREAS, of_objects)
    if record.by_level(layer):
        weight, share = ((v * items).sum(0) for v in (data.weight, data.share))
        found['level'] = Group(record.levels, weight, share, data.items.sum(0))
        if (objects.level >= 0).any():
            key = np.where(objects.area < 0, -1, objects.level * len(AREAS) + objects.area)
            both = [f'{name} {area}' for name in record.levels for area in AREAS]
            found['level_area'] = summed(key, both, of_objects)
    return found


def specialisation(table: np.ndarray) -> np.ndarray:
    r"""(R,) nats by which a row's experts differ from the average:
    :math:`\sum_e p_{e|r} \ln (p_{e|r} / p_e)`; 0 for an empty row.

    Their mean, each row counting by its weight, is the mutual information of row and expert.

    Args:
        table: (R, E) weights, not negative.
    """
    table = np.asarray(table, dtype=np.float64)
    average = table.sum(0) / max(table.sum(), 1e-300)
    given = table / np.maximum(table.sum(1, keepdims=True), 1e-300)
    ratio = np.divide(given, average, out=np.ones_like(given), where=given > 0)
    return (given * np.log(ratio)).sum(1)


# --------------------------------------------------------------------------------------------------
# Objects
# --------------------------------------------------------------------------------------------------


def area_bins(areas: np.ndarray) -> np.ndarray:
    """Index into :data:`AREAS` of areas in square pixels of the original image."""
    return np.digitize(areas, AREA_LIMITS)


def object_levels(sizes: np.ndarray, anchors: Sequence[np.ndarray]) -> np.ndarray:
    r"""(N,) the FPN level on which an object's anchors lie.

    An anchor detector learns an object on the level of the anchor that overlaps it most. Anchors
    stand at every place of their level, so the place says little, and that level is the one with

    .. math:: \arg\max_l \max_{a \in \mathrm{anchors}_l}
        \frac{\min(w, w_a) \min(h, h_a)}{w h + w_a h_a - \min(w, w_a) \min(h, h_a)}

    the IoU of boxes with one centre. Among equals the finest level.

    Args:
        sizes: (N, 2) width and height in pixels of the *network's* input.
        anchors: For each level, (A, 2) width and height of its anchors in the same pixels.
    """
    best = np.zeros((len(sizes), len(anchors)))
    areas = sizes.prod(1)[:, None]
    for level, shapes in enumerate(anchors):
        common = np.minimum(sizes[:, None], shapes[None]).prod(2)
        best[:, level] = (common / (areas + shapes.prod(1) - common)).max(1)
    return best.argmax(1)


def rounded(values: Any, digits: int = 5) -> Any:
    """Plain numbers of ``digits`` decimals, whole ones as integers."""
    array = np.asarray(values)
    if array.dtype.kind in 'iu':
        return array.tolist()
    array = np.round(array.astype(np.float64), digits)
    if array.size > 1 and (array == np.rint(array)).all() and np.abs(array).max() < 2**53:
        array = array.astype(np.int64)  # shorter, and several times faster to write
    return array.tolist()
