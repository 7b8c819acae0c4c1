"""Several datasets with different looks and label spaces as one."""

from __future__ import annotations

import bisect
import colorsys
import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmengine.dataset import BaseDataset, Compose
from mmengine.structures import BaseDataElement
from torch.utils.data import Dataset

from mmdet_moe.datasets.domain import DomainDataset
from mmdet_moe.registry import DATASETS
from mmdet_moe.structures import LabelSpace, LabelSpaceError


@DATASETS.register_module()
class MultiDomainDataset(Dataset):
    """The datasets of several domains, one after the other, in unified labels.

    Every sample says where it comes from: after its pipeline ran, its data sample carries
    ``metainfo['domain']`` and ``metainfo['sample_idx']`` (its index in here, by which the evaluator
    tells padding from data). Labels are unified ids, found by name (see :class:`DomainDataset`).

    Args:
        label_space: The label space or its config. Its domains may be more than those given here
            (hold-outs, tests of one domain): ids do not shift.
        domains: Domain name -> the config of its dataset: any mmdet dataset, also wrapped in
            ``ConcatDataset``, ``RepeatDataset``, ``ClassBalancedDataset`` or
            ``MultiImageMixDataset`` (whose inner dataset then needs a loading pipeline of its own).
        pipeline: The transforms of every dataset that has no ``pipeline`` of its own. Each domain
            gets its own instance, so a transform that keeps images (``CachedMosaic``) never mixes
            domains. Assigning to the attribute changes it for all of them (as mmdet's
            ``PipelineSwitchHook`` does).
        domain_pipelines: Domain name -> its transforms, in place of ``pipeline``.
        test_mode: Set on every dataset when not None.
        lazy_init: Whether to put off reading annotations; ``metainfo`` is there regardless.

    Raises:
        LabelSpaceError: A domain that the label space does not have, or a dataset whose classes
            are not those of its domain.
    """

    def __init__(
        self,
        label_space: LabelSpace | Mapping[str, Any],
        domains: Mapping[str, Mapping[str, Any] | BaseDataset],
        pipeline: Sequence[dict | Callable] = (),
        domain_pipelines: Mapping[str, Sequence[dict | Callable]] | None = None,
        test_mode: bool | None = None,
        lazy_init: bool = False,
    ) -> None:
        self.label_space = LabelSpace.from_config(label_space)
        if not domains:
            raise LabelSpaceError(
                f'no domains given; the label space has {list(self.label_space.domains)}'
            )
        domain_pipelines = dict(domain_pipelines or {})
        for name in (*domains, *domain_pipelines):
            self.label_space.check_domain(name)
        unused = [name for name in domain_pipelines if name not in domains]
        if unused:
            raise LabelSpaceError(
                f'domain_pipelines names {unused}; the domains given are {list(domains)}'
            )
        self._shared: list[DomainDataset] = []
        self.datasets: dict[str, Any] = {}
        for name, dataset in domains.items():
            self.datasets[name] = self._build(
                dataset,
                domain=name,
                pipeline=domain_pipelines.get(name, pipeline),
                shared=name not in domain_pipelines,
                test_mode=test_mode,
            )
        self._pipeline = Compose(copy.deepcopy(list(pipeline)))
        self._metainfo = {
            'classes': self.label_space.classes,
            'palette': _palette(self.label_space.num_classes),
            'domains': tuple(self.datasets),
            'domain_meta': {
                name: _leaves(dataset)[0].metainfo for name, dataset in self.datasets.items()
            },
            'label_space': self.label_space.to_dict(),
        }
        self._fully_initialized = False
        if not lazy_init:
            self.full_init()

    def _build(
        self,
        dataset: Any,
        *,
        domain: str,
        pipeline: Sequence[dict | Callable],
        shared: bool,
        test_mode: bool | None,
    ) -> Any:
        """Build a domain's dataset with every leaf of its config in unified labels."""
        settings = {'domain': domain, 'label_space': self.label_space, 'test_mode': test_mode}

        def build(cfg: Any) -> Any:
            if isinstance(cfg, Mapping) and ('dataset' in cfg or 'datasets' in cfg):
                cfg = dict(cfg)
                if 'dataset' in cfg:
                    cfg['dataset'] = build(cfg['dataset'])
                else:
                    cfg['datasets'] = [build(item) for item in cfg['datasets']]
                return DATASETS.build({**cfg, 'lazy_init': True})
            leaf = DomainDataset(
                cfg, pipeline=copy.deepcopy(list(pipeline)), lazy_init=True, **settings
            )
            if shared and not leaf.has_own_pipeline:
                self._shared.append(leaf)
            return leaf

        return build(dataset)

    # -- what it is ------------------------------------------------------------------------------

    @property
    def metainfo(self) -> dict:
        """A copy of the meta information.

        ``classes`` (unified), ``palette``, ``domains``, ``domain_meta`` (each domain's own, its
        ``classes`` in the label space's order) and ``label_space`` (plain data).
        """
        return copy.deepcopy(self._metainfo)

    @property
    def pipeline(self) -> Compose:
        """The pipeline shared by the domains that have none of their own."""
        return self._pipeline

    @pipeline.setter
    def pipeline(self, pipeline: Compose | Sequence[dict | Callable]) -> None:
        self._pipeline = pipeline if isinstance(pipeline, Compose) else Compose(list(pipeline))
        for leaf in self._shared:
            leaf.pipeline = copy.deepcopy(self._pipeline)

    def full_init(self) -> None:
        """Read the annotations of every domain."""
        if self._fully_initialized:
            return
        for dataset in self.datasets.values():
            dataset.full_init()
        self._ends = list(itertools.accumulate(len(dataset) for dataset in self.datasets.values()))
        self._fully_initialized = True

    def __len__(self) -> int:
        self.full_init()
        return self._ends[-1]

    @property
    def domain_sizes(self) -> dict[str, int]:
        """The number of images of each domain."""
        self.full_init()
        return {name: len(dataset) for name, dataset in self.datasets.items()}

    def domain_of(self, idx: int) -> str:
        """The domain of image ``idx``."""
        return self._locate(idx)[0]

    def _locate(self, idx: int) -> tuple[str, int]:
        size = len(self)
        if not -size <= idx < size:
            raise IndexError(f'index {idx} is out of range for {size} images')
        idx %= size
        position = bisect.bisect_right(self._ends, idx)
        name = tuple(self.datasets)[position]
        return name, idx - (self._ends[position - 1] if position else 0)

    # -- samples ---------------------------------------------------------------------------------

    def get_data_info(self, idx: int) -> dict:
        """The annotation of image ``idx`` in unified labels, with ``domain`` and ``sample_idx``."""
        name, local = self._locate(idx)
        info = self.datasets[name].get_data_info(local)
        info.update(domain=name, sample_idx=idx % len(self))
        return info

    def get_cat_ids(self, idx: int) -> list[int]:
        """The unified ids of the objects in image ``idx``."""
        name, local = self._locate(idx)
        dataset = self.datasets[name]
        if hasattr(dataset, 'get_cat_ids'):
            return dataset.get_cat_ids(local)
        # ConcatDataset, RepeatDataset and MultiImageMixDataset only hand annotations through.
        return [item['bbox_label'] for item in dataset.get_data_info(local)['instances']]

    def __getitem__(self, idx: int) -> dict:
        name, local = self._locate(idx)
        return _tag(self.datasets[name][local], {'domain': name, 'sample_idx': idx % len(self)})

    def __repr__(self) -> str:
        sizes = self.domain_sizes if self._fully_initialized else dict.fromkeys(self.datasets, '?')
        return f'{type(self).__name__}({", ".join(f"{k}: {v}" for k, v in sizes.items())})'


def _tag(data: dict, tags: dict[str, Any]) -> dict:
    """Write ``tags`` into the data sample(s), or into the dict where none was packed."""
    samples = data.get('data_samples')
    if samples is None:
        data.update(tags)
        return data
    # Test-time augmentation packs a list of samples per image.
    for sample in samples if isinstance(samples, (list, tuple)) else [samples]:
        if isinstance(sample, BaseDataElement):
            sample.set_metainfo(tags)
    return data


def _leaves(dataset: Any) -> list[DomainDataset]:
    if isinstance(dataset, DomainDataset):
        return [dataset]
    children = dataset.datasets if hasattr(dataset, 'datasets') else [dataset.dataset]
    return [leaf for child in children for leaf in _leaves(child)]


def _palette(num_classes: int) -> list[tuple[int, int, int]]:
    """Colours that differ between neighbours: hues a golden ratio of the circle apart."""
    hues = (index * 0.618033988749895 % 1.0 for index in range(num_classes))
    values = itertools.cycle((1.0, 0.8, 0.6))
    return [
        tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, 0.75, value))
        for hue, value in zip(hues, values, strict=False)
    ]
