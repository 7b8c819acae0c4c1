"""Evaluate each image by its own domain's metrics, in that domain's labels."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmdet.evaluation import CocoMetric
from mmdet.structures.mask import encode_mask_results
from mmengine.dist import broadcast_object_list, collect_results, get_dist_info, is_main_process
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.logging import print_log
from mmengine.structures import BaseDataElement

from mmdet_moe.registry import EVALUATOR, METRICS
from mmdet_moe.structures import LabelSpace, LabelSpaceError


@EVALUATOR.register_module()
class MultiDomainEvaluator(Evaluator):
    r"""Several metrics per domain, and their average over domains.

    A data sample goes to the metrics of the domain in its ``metainfo`` and to no others. Before,
    its predicted and ground-truth labels are turned, by name, from unified ids into the labels the
    metric counts in; predictions of classes its domain does not have are dropped (there are some
    only when a model is read unrestricted).

    Keys of the result are ``'<domain>/<metric key>'``, for instance ``'bccd/coco/bbox_mAP'``, and
    for every numeric metric key ``'macro/<metric key>'``, its mean over the domains that report it,
    leaving out those without images or without ground truth (COCO's -1, nan), but not those
    without detections, which count as zero. So ``save_best='macro/coco/bbox_mAP'`` works.
    ``'small/<metric key>'`` and ``'large/<metric key>'`` are the means over the small domains and
    over the others: what a macro average of both would hide is that the large ones pay.

    Samples of a model with ``both_readings`` have a second prediction, where all classes competed:
    its keys are ``'<domain>/unrestricted/<metric key>'`` (and macro, small, large). A box of a
    class that the domain does not have is in nobody's ground truth; what it costs is the places
    and the suppressed boxes it took from others.

    Where the model guessed the domain (``nearest_domain`` in the metainfo),
    ``'<domain>/guess/accuracy'`` is the share of the domain's images guessed right.

    Processes each evaluate their share; results are gathered as mmengine does (``collect_device``),
    and images that a sampler repeated to fill up the last batch count once.

    Args:
        label_space: The label space or its config.
        metrics: Domain name -> config(s) of its metrics. With ``CocoMetric``, give each domain's
            ``ann_file``.
        train_images: Domain name -> number of its training images, by which it is small or large.
        small: The small domains: their names, or a number of training images that they have less
            than (which needs ``train_images``). By default, given ``train_images``, the smaller
            half; with an odd number the middle one is large. Without both there are no such means.
        collect_device: Where results of several processes meet, ``'cpu'`` (files) or ``'gpu'``.
        collect_dir: The directory for them, with ``'cpu'``.

    Attributes:
        domain_metrics: Domain name -> its metrics.
        small_domains: The small domains, or None.
        metrics: Further metrics that see every sample as it is, in unified labels. Empty at first;
            mmdet's ``tools/test.py --out`` appends one that dumps the predictions.

    Raises:
        LabelSpaceError: A domain the label space does not have, data of a domain without metrics,
            data whose label space is another, or a metric whose annotation file lacks a class.
    """

    def __init__(
        self,
        label_space: LabelSpace | Mapping[str, Any],
        metrics: Mapping[str, Any],
        train_images: Mapping[str, int] | None = None,
        small: Sequence[str] | int | None = None,
        collect_device: str = 'cpu',
        collect_dir: str | None = None,
    ) -> None:
        super().__init__(metrics=[])
        self.label_space = LabelSpace.from_config(label_space)
        if not isinstance(metrics, Mapping) or 'type' in metrics:
            raise TypeError(
                'metrics must map each domain to its metrics, dict(domain=[dict(type=...)]); the '
                f'domains are {list(self.label_space.domains)}'
            )
        self.small_domains = small_domains(list(metrics), train_images, small)
        self.collect_device = collect_device
        self.collect_dir = collect_dir
        self.domain_metrics: dict[str, list[BaseMetric]] = {}
        self._tables: dict[str, list[np.ndarray]] = {}
        self._results: list[tuple] = []
        for domain, configs in metrics.items():
            self.label_space.check_domain(domain)
            configs = configs if isinstance(configs, (list, tuple)) else [configs]
            self.domain_metrics[domain] = [
                config if isinstance(config, BaseMetric) else METRICS.build(config)
                for config in configs
            ]
            self._settle(domain, {})

    def _settle(self, domain: str, meta: Mapping[str, Any]) -> None:
        """Tell a domain's metrics their classes and note the labels each of them counts in."""
        self._tables[domain] = []
        for metric in self.domain_metrics[domain]:
            classes = self._classes_of(metric, domain)
            metric.dataset_meta = {**meta, 'classes': classes}
            # unified id -> label of the metric, -1 where the domain lacks the class
            table = np.full(self.label_space.num_classes, -1, dtype=np.int64)
            unified = dict(
                zip(
                    self.label_space.local_classes(domain),
                    self.label_space.unified_ids(domain),
                    strict=True,
                )
            )
            for label, name in enumerate(classes):
                table[unified[name]] = label
            self._tables[domain].append(table)

    def _classes_of(self, metric: BaseMetric, domain: str) -> tuple[str, ...]:
        """The domain's class names in the order of the metric's labels.

        A COCO-like metric with an annotation file takes label k to be ``cat_ids[k]``. We settle
        them by increasing id, the order in which the COCO tools themselves report classes.
        """
        classes = self.label_space.local_classes(domain)
        api = getattr(metric, '_coco_api', None) or getattr(metric, '_lvis_api', None)
        if api is None:
            return classes
        by_name = {category['name']: cat_id for cat_id, category in api.cats.items()}
        missing = [name for name in classes if name not in by_name]
        if missing:
            raise LabelSpaceError(
                f'domain {domain!r}: class {missing[0]!r} is not in the annotation file of '
                f'{type(metric).__name__}, which has {sorted(by_name)}'
            )
        ordered = sorted(classes, key=by_name.__getitem__)
        metric.cat_ids = [by_name[name] for name in ordered]
        return tuple(ordered)

    # -- mmengine's interface --------------------------------------------------------------------

    @property
    def dataset_meta(self) -> dict | None:
        """The meta information of the dataset."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, dataset_meta: Mapping[str, Any]) -> None:
        theirs = dataset_meta.get('label_space')
        if theirs is not None and LabelSpace.from_config(theirs) != self.label_space:
            raise LabelSpaceError(
                "the dataset's label space is not the evaluator's: "
                f'{LabelSpace.from_config(theirs)} against {self.label_space}'
            )
        without = [name for name in dataset_meta.get('domains', ()) if not self._has(name)]
        if without:
            raise LabelSpaceError(
                f'no metrics for domain {without[0]!r}; there are some for '
                f'{list(self.domain_metrics)}'
            )
        self._dataset_meta = dict(dataset_meta)
        for domain in self.domain_metrics:
            self._settle(domain, dataset_meta.get('domain_meta', {}).get(domain, {}))
        for metric in self.metrics:
            metric.dataset_meta = dict(dataset_meta)

    def _has(self, domain: str) -> bool:
        return domain in self.domain_metrics

    def process(
        self, data_samples: Sequence[BaseDataElement | dict], data_batch: Any = None
    ) -> None:
        """Hand each sample to the metrics of its domain.

        Args:
            data_samples: Predictions with their ground truth, labels unified.
            data_batch: The batch they come from.

        Raises:
            LabelSpaceError: A sample without a domain, or of one without metrics.
        """
        samples = [
            sample.to_dict() if isinstance(sample, BaseDataElement) else sample
            for sample in data_samples
        ]
        for metric in self.metrics:
            metric.process(data_batch, samples)
        for sample in samples:
            domain = sample.get('domain')
            if domain is None or not self._has(domain):
                raise LabelSpaceError(
                    f'image {sample.get("img_path", sample.get("img_id"))!r} has domain '
                    f'{domain!r}; there are metrics for {list(self.domain_metrics)}'
                )
            results = {}
            for reading, read in _readings(sample).items():
                results[reading] = []
                for metric, table in zip(
                    self.domain_metrics[domain], self._tables[domain], strict=True
                ):
                    metric.results.clear()
                    metric.process(data_batch, [_to_local(read, table)])
                    results[reading].append(list(metric.results))
                    metric.results.clear()
            guess = sample.get('nearest_domain')
            right = None if guess is None else guess == domain
            self._results.append((self._key(sample, domain), _num_objects(sample), results, right))

    def _key(self, sample: Mapping[str, Any], domain: str) -> tuple[str, Any]:
        """What tells an image from every other and makes a repeated one recognisable."""
        index = sample.get('sample_idx', sample.get('img_id'))
        if index is None:
            index = f'rank {get_dist_info()[0]}, number {len(self._results)}'
        return domain, index

    def evaluate(self, size: int) -> dict:
        """Evaluate what was processed.

        Args:
            size: The number of images of the whole dataset.

        Returns:
            The metrics of every domain and their averages.
        """
        extra = {}
        for metric in self.metrics:
            extra.update(metric.evaluate(size))
        # The whole share of every process, padding too: which images are padding is decided by
        # their keys, not by their place.
        own, self._results = self._results, []
        world_size = get_dist_info()[1]
        if self.collect_device == 'cpu':
            parts = collect_results([own], world_size, 'cpu', tmpdir=self.collect_dir)
        else:
            parts = collect_results([own], world_size, self.collect_device)
        outcome: list = [None]
        if is_main_process():
            results: dict[tuple, tuple] = {}
            for part in parts:
                for key, *result in part:
                    results.setdefault(key, result)
            outcome = [{**self._compute(results), **extra}]
        broadcast_object_list(outcome)
        return outcome[0]

    # -- on the main process ---------------------------------------------------------------------

    def _compute(self, results: Mapping[tuple, Sequence]) -> dict:
        of_domain: dict[str, list] = {domain: [] for domain in self.domain_metrics}
        for key in sorted(results, key=_order):
            of_domain[key[0]].append(results[key])
        values: dict[str, Any] = {}
        terms: dict[str, list[tuple[str, float]]] = {}  # of the averages
        for domain, items in of_domain.items():
            if not items:
                continue
            empty = all(count == 0 for count, *_ in items)
            guesses = [right for *_, right in items if right is not None]
            if guesses:
                accuracy = sum(guesses) / len(guesses)
                values[f'{domain}/guess/accuracy'] = accuracy
                terms.setdefault('guess/accuracy', []).append((domain, accuracy))
            for reading in items[0][1]:
                what = f'Evaluating domain {domain} ({len(items)} images) {reading}'.rstrip(' /')
                print_log(what, logger='current')
                found = self._compute_domain(domain, [item[1][reading] for item in items])
                for name, value in found.items():
                    values[f'{domain}/{reading}{name}'] = value
                    if isinstance(value, numbers.Number) and not isinstance(value, bool):
                        known = not empty and math.isfinite(value) and value != -1
                        terms.setdefault(f'{reading}{name}', []).extend(
                            [(domain, float(value))] if known else []
                        )
        groups: dict[str, Sequence[str]] = {'macro': list(of_domain)}
        if self.small_domains:
            groups['small'] = self.small_domains
            groups['large'] = [name for name in of_domain if name not in self.small_domains]
        for name, known in terms.items():
            for group, members in groups.items():
                inside = [value for domain, value in known if domain in members]
                values[f'{group}/{name}'] = sum(inside) / len(inside) if inside else math.nan
        return values

    def _compute_domain(self, domain: str, results: Sequence[list]) -> dict[str, Any]:
        """What the metrics of a domain make of one reading of its images."""
        values: dict[str, Any] = {}
        for place, metric in enumerate(self.domain_metrics[domain]):
            gathered = [result for item in results for result in _cpu(item[place])]
            if isinstance(metric, CocoMetric):
                gathered = _with_a_box(gathered)
            for name, value in metric.compute_metrics(gathered).items():
                name = f'{metric.prefix}/{name}' if metric.prefix else name
                if name in values:
                    raise ValueError(
                        f'two metrics of domain {domain!r} report {name!r}; give one of them '
                        'another prefix'
                    )
                values[name] = value
        return values


def small_domains(
    domains: Sequence[str],
    train_images: Mapping[str, int] | None = None,
    small: Sequence[str] | int | None = None,
) -> tuple[str, ...] | None:
    """Which of ``domains`` are small; None where nobody says.

    Args:
        domains: The evaluated domains.
        train_images: Number of training images by domain (more domains do no harm).
        small: Names, or the number of training images that small domains have less than.

    Raises:
        ValueError: A threshold without ``train_images``, or a domain without a number.
    """
    if small is not None and not isinstance(small, int):
        return tuple(name for name in domains if name in set(small))
    if train_images is None:
        if small is None:
            return None
        raise ValueError(f'small={small} is a number of training images: give train_images, too')
    missing = [name for name in domains if name not in train_images]
    if missing:
        raise ValueError(f'train_images has no number for {missing}')
    if small is None:
        order = sorted(domains, key=lambda name: (train_images[name], name))
        chosen = set(order[: len(order) // 2])
    else:
        chosen = {name for name in domains if train_images[name] < small}
    return tuple(name for name in domains if name in chosen)


def _readings(sample: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Prefix of the keys -> the sample with the predictions of that reading."""
    readings = {'': sample}
    if 'pred_instances_unrestricted' in sample:
        other = {**sample, 'pred_instances': sample['pred_instances_unrestricted']}
        readings['unrestricted/'] = other
    return readings


def _order(key: tuple) -> tuple:
    """Sort numbers by value and before names, so that results come in the dataset's order."""
    index = key[1]
    return (key[0], isinstance(index, str), index)


def _with_a_box(results: list[tuple[dict, dict]]) -> list[tuple[dict, dict]]:
    """Make sure that ``CocoMetric`` has something to count.

    Where no image has a detection it reports nothing, and the domain would drop out of the average
    that it should pull down. One detection of score 0 beside everything gives the zeros (and the
    -1 where there is no ground truth) that COCO's rules give.
    """
    if any(len(prediction['bboxes']) for _, prediction in results):
        return results
    (truth, first), *others = results
    size = (truth['height'], truth['width'])
    box = {
        'bboxes': np.array([[-2.0, -2.0, -1.0, -1.0]], dtype=np.float32),
        'scores': np.zeros(1, dtype=np.float32),
        'labels': np.zeros(1, dtype=np.int64),
    }
    if 'masks' in first:
        box['masks'] = encode_mask_results(np.zeros((1, *size), dtype=np.uint8))
    if 'mask_scores' in first:
        box['mask_scores'] = np.zeros(1, dtype=np.float32)
    return [(truth, {**first, **box}), *others]


def _num_objects(sample: Mapping[str, Any]) -> int | None:
    """The number of annotated objects, None where the sample carries no ground truth."""
    if sample.get('instances') is not None:
        return len(sample['instances'])
    truth = sample.get('gt_instances')
    return None if truth is None or 'labels' not in truth else len(truth['labels'])


def _to_local(sample: Mapping[str, Any], table: np.ndarray) -> dict:
    """A copy of ``sample`` with labels looked up in ``table``; those it maps to -1 are dropped."""
    local = dict(sample)
    for name in ('pred_instances', 'gt_instances', 'ignored_instances'):
        instances = local.get(name)
        if instances is not None and 'labels' in instances:
            local[name] = _instances_to_local(instances, table)
    if local.get('instances'):
        local['instances'] = [
            {**instance, 'bbox_label': int(table[instance['bbox_label']])}
            for instance in local['instances']
        ]
    return local


def _instances_to_local(instances: Mapping[str, Any], table: np.ndarray) -> dict:
    labels = instances['labels']
    as_tensor = isinstance(labels, torch.Tensor)
    lookup = torch.as_tensor(table, device=labels.device) if as_tensor else table
    mapped = lookup[labels]
    keep = mapped >= 0
    if bool(keep.all()):
        return {**instances, 'labels': mapped}
    kept = [index for index, flag in enumerate(keep.tolist()) if flag]
    selected = {
        name: [value[index] for index in kept] if isinstance(value, list) else value[keep]
        for name, value in instances.items()
    }
    return {**selected, 'labels': mapped[keep]}


def _cpu(data: Any) -> Any:
    """Copy tensors in (nested) results to the CPU."""
    if isinstance(data, (torch.Tensor, BaseDataElement)):
        return data.to('cpu')
    if isinstance(data, (list, tuple)):
        return type(data)(_cpu(item) for item in data)
    if isinstance(data, dict):
        return {key: _cpu(value) for key, value in data.items()}
    return data
