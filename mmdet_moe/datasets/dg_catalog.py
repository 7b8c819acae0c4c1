"""What is known about the data sets of domain generalisation: domains, classes, owners, recipes.

Names, folders and domain order are DomainBed's (arXiv 2007.01434), so that one ``data_root`` serves
both, and so does the split of a trial.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmdet_moe.planning.checks import unknown_name


@dataclass(frozen=True)
class DGInfo:
    """One data set.

    Attributes:
        folder: Its folder in ``data_root``.
        domains: The domains, in order.
        num_classes: The number of classes.
        source: Who publishes it, and where.
        classes: The classes' names, where they are folders' names that are always the same.
        images: The numbers of images that complete copies have, where these are known.
        layout: ``folders`` (``<domain>/<class>/<image>``), or a reader of ``dg_readers``.
    """

    folder: str
    domains: tuple[str, ...]
    num_classes: int
    source: str
    classes: tuple[str, ...] | None = None
    images: tuple[int, ...] = ()
    layout: str = 'folders'


_MNIST = 'MNIST (Y. LeCun, C. Cortes, C. Burges; torchvision.datasets.MNIST fetches the idx files)'
_DOMAINBED = 'domainbed/scripts/download.py of github.com/facebookresearch/DomainBed'
_WILDS = 'WILDS, wilds.stanford.edu (pip install wilds; its download_datasets.py)'

CATALOG: dict[str, DGInfo] = {
    'PACS': DGInfo(
        'PACS',
        ('art_painting', 'cartoon', 'photo', 'sketch'),
        7,
        'its authors (Li et al., ICCV 2017), www.eecs.qmul.ac.uk/~dl307/project_iccv2017',
        classes=('dog', 'elephant', 'giraffe', 'guitar', 'horse', 'house', 'person'),
        images=(9991,),
    ),
    'VLCS': DGInfo(
        'VLCS',
        ('Caltech101', 'LabelMe', 'SUN09', 'VOC2007'),
        5,
        f'its authors (Fang et al., ICCV 2013); {_DOMAINBED} has the folders',
        classes=('bird', 'car', 'chair', 'dog', 'person'),
        images=(10729,),
    ),
    'OfficeHome': DGInfo(
        'office_home',
        ('Art', 'Clipart', 'Product', 'Real World'),
        65,
        'its authors (Venkateswara et al., CVPR 2017), hemanthdv.org/OfficeHome-Dataset',
        images=(15588,),
    ),
    'TerraIncognita': DGInfo(
        'terra_incognita',
        ('location_100', 'location_38', 'location_43', 'location_46'),
        10,
        'Caltech Camera Traps (Beery et al., ECCV 2018), '
        f'lila.science/datasets/caltech-camera-traps; {_DOMAINBED} sorts them into folders',
        images=(24788, 24330),  # of 2020, and what the owner publishes since
    ),
    'DomainNet': DGInfo(
        'domain_net',
        ('clipart', 'infograph', 'painting', 'quickdraw', 'real', 'sketch'),
        345,
        f'its authors (Peng et al., ICCV 2019), ai.bu.edu/M3SDA; {_DOMAINBED} drops duplicates',
        images=(586575,),
    ),
    'SVIRO': DGInfo(
        'sviro',
        ('aclass', 'escape', 'hilux', 'i3', 'lexus', 'tesla', 'tiguan', 'tucson', 'x5', 'zoe'),
        7,
        f'DFKI and IEE, sviro.kl.dfki.de; {_DOMAINBED} names the archive',
    ),
    'WILDSCamelyon': DGInfo(
        'camelyon17_v1.0',
        tuple(f'hospital_{i}' for i in range(5)),
        2,
        _WILDS,
        classes=('normal', 'tumor'),
        images=(455954,),
        layout='camelyon17',
    ),
    'WILDSFMoW': DGInfo(
        'fmow_v1.1',
        ('Asia', 'Europe', 'Africa', 'Americas', 'Oceania', 'Other'),
        62,
        _WILDS,
        layout='fmow',
    ),
    'RotatedMNIST': DGInfo(
        'MNIST',
        ('0', '15', '30', '45', '60', '75'),
        10,
        _MNIST,
        classes=tuple('0123456789'),
        images=(70000,),
        layout='rotated',
    ),
    'ColoredMNIST': DGInfo(
        'MNIST',
        ('+90%', '+80%', '-90%'),
        2,
        _MNIST,
        classes=('5-9', '0-4'),
        images=(70000,),
        layout='colored',
    ),
    # The same two from scikit-learn's 1797 digits of 8 x 8, which need no file.
    'RotatedDigits': DGInfo(
        '',
        ('0', '15', '30', '45', '60', '75'),
        10,
        'scikit-learn (sklearn.datasets.load_digits)',
        classes=tuple('0123456789'),
        images=(1797,),
        layout='rotated',
    ),
    'ColoredDigits': DGInfo(
        '',
        ('+90%', '+80%', '-90%'),
        2,
        'scikit-learn (sklearn.datasets.load_digits)',
        classes=('5-9', '0-4'),
        images=(1797,),
        layout='colored',
    ),
}

#: Published learning rates and weight decays, ``RECIPES[algorithm][dataset]`` with ``'*'`` for the
#: rest: SF-MoE arXiv 2206.04046v1; GMoE arXiv 2206.04046v6 (its weight decay is not published: 0);
#: MoA, LoRA and KAdaptation arXiv 2310.11031; ERM is DomainBed's default.
RECIPES: dict[str, dict[str, dict[str, float]]] = {
    'erm': {'*': dict(lr=5e-5, weight_decay=0.0)},
    'sf_moe': {
        'PACS': dict(lr=3e-5, weight_decay=0.0),
        'VLCS': dict(lr=1e-5, weight_decay=1e-6),
        'OfficeHome': dict(lr=3e-5, weight_decay=1e-6),
        'TerraIncognita': dict(lr=3e-5, weight_decay=1e-4),
        'DomainNet': dict(lr=3e-5, weight_decay=0.0),
        '*': dict(lr=3e-5, weight_decay=0.0),
    },
    'gmoe': {
        'PACS': dict(lr=3e-5, weight_decay=0.0),
        'VLCS': dict(lr=3e-5, weight_decay=0.0),
        'OfficeHome': dict(lr=1e-5, weight_decay=0.0),
        'TerraIncognita': dict(lr=5e-5, weight_decay=0.0),
        'DomainNet': dict(lr=5e-5, weight_decay=0.0),
        '*': dict(lr=5e-5, weight_decay=0.0),
    },
    'moa': {'*': dict(lr=5e-5, weight_decay=0.0)},
}


def info_of(name: str) -> DGInfo:
    """The entry of a data set.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in CATALOG:
        raise ValueError(unknown_name(name, list(CATALOG), 'dataset'))
    return CATALOG[name]


def recipe(algorithm: str, dataset: str) -> dict[str, float]:
    """``lr`` and ``weight_decay`` that were published for an algorithm on a data set.

    Raises:
        ValueError: There is no such algorithm.
    """
    if algorithm not in RECIPES:
        raise ValueError(unknown_name(algorithm, list(RECIPES), 'recipe'))
    table = RECIPES[algorithm]
    return dict(table.get(dataset, table['*']))


def leave_outs(
    domains: Sequence[str], groups: Sequence[Sequence[str]] = ()
) -> list[tuple[str, ...]]:
    """What is held out at a time: each domain, or the whole group that it is in.

    Returns:
        Tuples of domains, in the order of ``domains``.

    Raises:
        ValueError: A group names a domain that is not there, or one is in two groups.
    """
    group_of: dict[str, tuple[str, ...]] = {}
    for group in groups:
        for name in group:
            if name not in domains:
                raise ValueError(unknown_name(name, domains, 'groups: domain'))
            if name in group_of:
                raise ValueError(f'groups: domain {name!r} is in two groups')
            group_of[name] = tuple(d for d in domains if d in group)
    return list(dict.fromkeys(group_of.get(name, (name,)) for name in domains))


def held_out_with_groups(
    held_out: Sequence[str], domains: Sequence[str], groups: Sequence[Sequence[str]] = ()
) -> tuple[str, ...]:
    """The domains held out, with all of a group where one of it is; in the order of ``domains``.

    Raises:
        ValueError: An unknown domain, or nothing is left to train on.
    """
    for name in held_out:
        if name not in domains:
            raise ValueError(unknown_name(name, domains, 'held_out: domain'))
    wanted: set[Any] = set()
    for unit in leave_outs(domains, groups):
        if set(unit) & set(held_out):
            wanted.update(unit)
    if len(wanted) == len(domains):
        raise ValueError(f'held_out {list(held_out)} leaves no domain to train on')
    return tuple(d for d in domains if d in wanted)
