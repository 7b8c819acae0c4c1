"""Classification images of several domains, in folders."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmpretrain.datasets import BaseDataset

from mmdet_moe.registry import DATASETS

SUFFIXES = frozenset({'.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp'})
FRACTIONS = {'train': 0.8, 'val': 0.1, 'test': 0.1}


@DATASETS.register_module()
class DomainImageFolder(BaseDataset):
    """Images at ``<data_root>/<domain>/<class>/<image>``, the same classes in every domain.

    This is the layout of domain generalisation's data (PACS, Office-Home, VLCS). A data info has
    ``img_path``, ``gt_label``, ``domain`` and ``domain_label``, so that
    ``PackInputs(meta_keys=(..., 'domain'))`` puts the domain into the data sample's metainfo.

    Classes are numbered in the order of their names, or of ``classes``; domains in the order of
    ``domains``. ``metainfo`` has both, as ``classes`` and ``domains``.

    A split takes images by their *stem* (``cat`` of ``noto/animals/cat.png``): u, a number in
    [0, 1) hashed from ``seed`` and the stem, falls into one of the intervals that ``fractions``
    cut. So what is drawn, say, in five styles stands in one split with all five, and a split does
    not change when images are added or domains left out. A split has its fraction of the images on
    average, not to the image.

    Args:
        data_root: The folder of the domains.
        domains: The domains to take, in this order; all, by name, where None.
        split: A name in ``fractions``; None: all images.
        fractions: Each split's share; they add up to 1.
        seed: Another seed cuts other splits.
        **kwargs: Of mmpretrain's ``BaseDataset``: ``pipeline``, ``classes``, ``test_mode``, ...

    Raises:
        ValueError: A folder or domain is not there, has other classes than the rest, or the split
            has no image; fractions do not add up to 1, or do not know the split.

    Example:
        >>> dataset = dict(
        ...     type='mmdet_moe.DomainImageFolder', data_root='data/emoji_dg', split='train',
        ...     domains=['noto', 'twemoji'],
        ...     pipeline=[dict(type='LoadImageFromFile'),
        ...               dict(type='PackInputs', meta_keys=('img_path', 'domain'))])
    """

    def __init__(
        self,
        data_root: str,
        domains: Sequence[str] | None = None,
        split: str | None = None,
        fractions: Mapping[str, float] = FRACTIONS,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if isinstance(domains, str) or (domains is not None and not domains):
            raise ValueError(f'domains must be a list of names or None, got {domains!r}')
        self.fractions = _checked(fractions)
        if split is not None and split not in self.fractions:
            raise ValueError(f'there is no split {split!r} in {list(self.fractions)}')
        self.domains = None if domains is None else tuple(domains)
        self.split = split
        self.seed = seed
        super().__init__(ann_file='', data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Read the folders."""
        root = Path(self.data_root)
        if not root.is_dir():
            raise ValueError(f'{root} is not a folder')
        there = {path.name: _folders(path) for path in _folders(root)}
        domains = tuple(there) if self.domains is None else self.domains
        for domain in domains:
            if domain not in there:
                raise ValueError(f'{root} has no domain {domain!r}; it has {list(there)}')
        if not domains:
            raise ValueError(f'{root} has no domains: want {root}/<domain>/<class>/<image>')
        self._metainfo['domains'] = domains
        # Domains that are left out are checked too: ids are the same whichever are taken.
        self._check_classes({name: [p.name for p in paths] for name, paths in there.items()})

        images = [
            dict(img_path=str(path), gt_label=label, domain=domain, domain_label=domain_label)
            for domain_label, domain in enumerate(domains)
            for label, name in enumerate(self.CLASSES)
            for path in sorted((root / domain / name).iterdir())
            if path.suffix.lower() in SUFFIXES
            and self.split in (None, split_of(path.stem, self.fractions, self.seed))
        ]
        if not images:
            what = 'no image' if self.split is None else f'no image in split {self.split!r}'
            raise ValueError(f'{root}: {what} of {list(domains)}')
        return images

    def _check_classes(self, found: Mapping[str, Sequence[str]]) -> None:
        """Take the classes of the first domain if none are stated; refuse those that differ."""
        reference = 'the list of classes'
        if self.CLASSES is None:
            first, classes = next(iter(found.items()))
            self._metainfo['classes'] = tuple(classes)
            reference = f'domain {first!r}'
        for domain, classes in found.items():
            for name in sorted(set(self.CLASSES).symmetric_difference(classes)):
                sides = [reference, f'domain {domain!r}']
                has, lacks = sides if name in self.CLASSES else reversed(sides)
                raise ValueError(f'{self.data_root}: {has} has class {name!r}, {lacks} has not')

    def extra_repr(self) -> list[str]:
        """What mmpretrain's ``__repr__`` says besides."""
        return [f'Root: \t{self.data_root}', f'Domains: \t{self.domains}', f'Split: \t{self.split}']


def split_of(stem: str, fractions: Mapping[str, float], seed: int = 0) -> str:
    """The split of what is called ``stem``, the same on every machine.

    Args:
        stem: File name without its last suffix.
        fractions: Each split's share, in order, sum 1.
        seed: Another seed, another split.
    """
    digest = hashlib.sha256(f'{seed}:{stem}'.encode()).digest()
    u = int.from_bytes(digest[:6], 'big') / 2**48
    ends = itertools.accumulate(fractions.values())
    inside = (name for name, end in zip(fractions, ends, strict=True) if u < end)
    # The shares may add up to a little less than 1.
    return next(inside, [name for name, share in fractions.items() if share > 0][-1])


def _folders(path: Path) -> list[Path]:
    """Its folders by name, without hidden ones."""
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith('.'))


def _checked(fractions: Mapping[str, float]) -> dict[str, float]:
    shares = {name: float(share) for name, share in fractions.items() if name != '_scope_'}
    if not all(share >= 0 for share in shares.values()) or not math.isclose(
        sum(shares.values()), 1.0, abs_tol=1e-6
    ):
        raise ValueError(f'fractions must be >= 0 and add up to 1, got {shares}')
    return shares
