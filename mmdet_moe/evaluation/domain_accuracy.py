"""Accuracy of a classifier in every part of every domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric

from mmdet_moe.registry import METRICS

_TINY = 1e-12  # scores are float32 softmax outputs, which may be 0


@METRICS.register_module()
class DomainAccuracy(BaseMetric):
    """Top-1 accuracy in % and cross-entropy in nats, per (domain, part).

    The data samples need ``domain`` and ``part`` in their metainfo, as ``DGDataset`` gives them and
    ``PackInputs(meta_keys=('domain', 'part'))`` passes them on. Metrics are called
    ``dg/<domain>/<part>/accuracy`` and ``.../nll``.
    """

    default_prefix = 'dg'

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Keep (domain, part, correct, loss) of each sample."""
        for sample in data_samples:
            if 'domain' not in sample or 'part' not in sample:
                raise ValueError(
                    "DomainAccuracy needs 'domain' and 'part' in the metainfo: add them to the "
                    'meta_keys of PackInputs'
                )
            scores = sample['pred_score'].double().cpu()
            label = int(sample['gt_label'])
            self.results.append(
                (
                    sample['domain'],
                    sample['part'],
                    int(scores.argmax()) == label,
                    -float(torch.log(scores[label].clamp_min(_TINY))),
                )
            )

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Mean over the samples of each (domain, part)."""
        found: dict[tuple[str, str], list[tuple[bool, float]]] = {}
        for domain, part, correct, loss in results:
            found.setdefault((domain, part), []).append((correct, loss))
        metrics = {}
        for (domain, part), values in found.items():
            right, losses = zip(*values, strict=True)
            metrics[f'{domain}/{part}/accuracy'] = 100 * sum(right) / len(right)
            metrics[f'{domain}/{part}/nll'] = sum(losses) / len(losses)
        return metrics
