"""Data sets of domain generalisation: held-out domains, and parts of domains by trial."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmdet_moe.datasets.dg_catalog import held_out_with_groups, info_of
from mmdet_moe.datasets.dg_readers import READERS, MissingData
from mmdet_moe.datasets.domain_folder import DomainImageFolder, split_of
from mmdet_moe.registry import DATASETS

#: DomainBed's parts of a domain.
PARTS = {'train': 0.8, 'val': 0.2}


@DATASETS.register_module()
class DGDataset(DomainImageFolder):
    """A data set of domain generalisation, some of its domains held out.

    Of a catalogue entry (``mmdet_moe.datasets.dg_catalog``: PACS, VLCS, OfficeHome,
    TerraIncognita, DomainNet, SVIRO, WILDSCamelyon, WILDSFMoW, RotatedMNIST, ColoredMNIST, and
    RotatedDigits and ColoredDigits, which need no files), in ``<data_root>/<its folder>``; or any
    folder ``<data_root>/<domain>/<class>/<image>``.

    Each domain is cut into parts, ``train`` (80 %) and ``val`` (20 %):

    * ``split_by='domain'``: by chance, with the seed of ``trial``; the very split of DomainBed,
      where the folders are DomainBed's.
    * ``split_by='stem'``: by file name (see :class:`DomainImageFolder`), so that what is drawn in
      several domains under one name stands in one part of all. ``fractions`` may have a third
      part, ``test``.

    A data info has ``domain``, ``domain_label``, ``part`` and ``gt_label``; images of digits come
    as ``img``, all others as ``img_path``.

    Args:
        data_root: Folder of the data sets, or of the domains where ``name`` is None.
        name: Entry of the catalogue.
        held_out: Domains not trained on. One of a group holds out all of it.
        sources_only: Leave out images of domains held out.
        parts: The parts to take.
        trial: Seed of the split.
        split_by: ``'domain'`` or ``'stem'``.
        fractions: Each part's share; they add up to 1.
        domains: The domains there are; all, by name, where None.
        groups: Domains that are never on opposite sides, such as two renderings of one style.
        check: Whether to demand the catalogue's classes and number of images.
        **kwargs: Of mmpretrain's ``BaseDataset``: ``pipeline``, ``test_mode``, ``indices``, ...

    Raises:
        ValueError: The data set is not there or not complete (says what is missing and who
            publishes it); an unknown name, domain or part; nothing left to train on.

    Example:
        >>> dataset = dict(
        ...     type='mmdet_moe.DGDataset', data_root='data/', name='PACS', held_out=['sketch'],
        ...     sources_only=True, parts=['train'], trial=0, pipeline=[...])
    """

    def __init__(
        self,
        data_root: str = '',
        name: str | None = None,
        held_out: Sequence[str] = (),
        sources_only: bool = False,
        parts: Sequence[str] = ('train', 'val'),
        trial: int = 0,
        split_by: str = 'domain',
        fractions: Mapping[str, float] = PARTS,
        domains: Sequence[str] | None = None,
        groups: Sequence[Sequence[str]] = (),
        check: bool = True,
        **kwargs: Any,
    ) -> None:
        self.info = None if name is None else info_of(name)
        if split_by not in ('domain', 'stem'):
            raise ValueError(f"split_by must be 'domain' or 'stem', got {split_by!r}")
        for what, value in (('held_out', held_out), ('parts', parts)):
            if isinstance(value, str):
                raise ValueError(f'{what} must be a list of names, got {value!r}')
        self.name = name
        self.held_out = tuple(held_out)
        self.sources_only = sources_only
        self.parts = tuple(parts)
        self.trial = int(trial)
        self.split_by = split_by
        self.groups = tuple(map(tuple, groups))
        self.check = check
        unknown = set(self.parts) - set(fractions)
        if unknown or not {'train', 'val'} <= set(fractions):
            raise ValueError(
                f'parts {list(self.parts)} must be among the fractions {list(fractions)}, which '
                "must have 'train' and 'val'"
            )
        if self.info is not None:
            if self.info.layout == 'folders' and self.info.classes is not None:
                kwargs.setdefault('classes', self.info.classes)
            domains = self.info.domains if domains is None else domains
            data_root = str(Path(data_root) / self.info.folder)
        super().__init__(data_root, domains=domains, fractions=fractions, seed=int(trial), **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Read what there is, cut it into parts and take those that are asked for."""
        images = self._all_images()
        domains = self._metainfo['domains']
        held_out = held_out_with_groups(self.held_out, domains, self.groups)
        self._metainfo.update(
            dataset=self.name or Path(self.data_root).name,
            held_out=held_out,
            groups=self.groups,
            trial=self.trial,
            parts=tuple(self.fractions),
        )
        self._cut(images)
        taken = [
            image
            for image in images
            if image['part'] in self.parts
            and not (self.sources_only and image['domain'] in held_out)
        ]
        wanted = [d for d in domains if not (self.sources_only and d in held_out)]
        there = {(image['domain'], image['part']) for image in taken}
        for domain in wanted:
            for part in self.parts:
                if (domain, part) not in there:
                    raise ValueError(
                        f'{self.data_root}: domain {domain!r} has no image in its part {part!r}'
                    )
        return taken

    def _all_images(self) -> list[dict[str, Any]]:
        if self.info is None:
            return super().load_data_list()
        try:
            if self.info.layout == 'folders':
                images = super().load_data_list()
            else:
                images = self._read()
            if self.check:
                self._check_complete(images)
        except ValueError as error:
            raise ValueError(f'{self.name}: {error}. It is from {self.info.source}') from None
        return images

    def _read(self) -> list[dict[str, Any]]:
        """What a reader finds, without the domains that are not asked for."""
        assert self.info is not None and self.name is not None
        classes, images = READERS[self.info.layout](Path(self.data_root), self.info, self.name)
        assert self.domains is not None
        for domain in self.domains:
            if domain not in self.info.domains:
                raise ValueError(f'no domain {domain!r}; there are {list(self.info.domains)}')
        self._metainfo.setdefault('classes', classes)
        self._metainfo['domains'] = self.domains
        if self.check:  # the lists are complete; are the images there?
            for domain in self.domains:
                first = next((i for i in images if i['domain'] == domain), None)
                if first is None:
                    raise MissingData(f'no image of domain {domain!r}')
                if 'img_path' in first and not Path(first['img_path']).is_file():
                    raise MissingData(f'{first["img_path"]} is not there')
        order = {domain: i for i, domain in enumerate(self.domains)}
        images = [
            dict(image, domain_label=order[image['domain']])
            for image in images
            if image['domain'] in order
        ]
        return sorted(images, key=lambda image: image['domain_label'])  # stable

    def _check_complete(self, images: Sequence[Mapping[str, Any]]) -> None:
        assert self.info is not None
        if len(self.CLASSES) != self.info.num_classes:
            raise MissingData(
                f'{self.data_root} has {len(self.CLASSES)} classes, not {self.info.num_classes}'
            )
        known = self.info.images
        if known and self.domains == self.info.domains and len(images) not in known:
            counts = dict(Counter(image['domain'] for image in images))
            raise MissingData(
                f'{self.data_root} has {len(images)} images, not {" or ".join(map(str, known))}; '
                f'by domain {counts} (check=False takes what is there)'
            )

    def _cut(self, images: Sequence[dict[str, Any]]) -> None:
        """Set each image's ``part``."""
        if self.split_by == 'stem':
            for image in images:
                if 'img_path' not in image:
                    raise ValueError("split_by='stem' needs images with file names")
                image['part'] = split_of(Path(image['img_path']).stem, self.fractions, self.trial)
            return
        for label in range(len(self._metainfo['domains'])):
            members = [image for image in images if image['domain_label'] == label]
            parts = domain_parts(len(members), self.fractions, self.trial, label)
            for image, part in zip(members, parts, strict=True):
                image['part'] = part


def domain_parts(size: int, fractions: Mapping[str, float], trial: int, domain: int) -> list[str]:
    """The part of each image of a domain; for two parts of 0.8 and 0.2, DomainBed's.

    The images are shuffled by the seed md5(str((trial, domain))) mod 2^31. The last part takes
    the first floor(fraction * size) of them, the one before it the next ones, and so on; the first
    part takes the rest.

    Args:
        size: Number of images.
        fractions: Each part's share, in order.
        trial: The trial.
        domain: The domain's number in the data set.
    """
    seed = int(hashlib.md5(str((trial, domain)).encode()).hexdigest(), 16) % 2**31
    order = list(range(size))
    np.random.RandomState(seed).shuffle(order)
    first, *others = fractions
    parts = [first] * size
    start = 0
    for part in reversed(others):
        end = start + int(size * fractions[part])
        for i in order[start:end]:
            parts[i] = part
        start = end
    return parts
