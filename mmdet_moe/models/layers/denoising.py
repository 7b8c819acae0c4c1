from __future__ import annotations

import math
from typing import Any

import torch
from mmdet.models.layers import CdnQueryGenerator
from mmdet.structures import SampleList
from torch import Tensor

from mmdet_moe.structures import LabelSpace


class MultiDomainCdnQueryGenerator(CdnQueryGenerator):
    """DINO's contrastive denoising with wrong labels drawn from the image's own domain.

    mmdet draws the noise of a label from all classes. Over several domains most of it would be
    classes that the image cannot show and its masked logits cannot name: noise that is told from
    truth by the domain alone teaches nothing.

    Args:
        label_space: The label space, or its config.
        *args: As ``CdnQueryGenerator``, whose ``num_classes`` is the number of unified classes.
        **kwargs: As ``CdnQueryGenerator``.
    """

    def __init__(self, label_space: LabelSpace | dict, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.label_space = LabelSpace.from_config(label_space)
        self._domain_of_target: list[str] = []

    def __call__(self, batch_data_samples: SampleList) -> tuple:
        """As the base class; data samples carry their ``domain``."""
        self._domain_of_target = [
            sample.metainfo['domain']
            for sample in batch_data_samples
            for _ in range(len(sample.gt_instances.labels))
        ]
        return super().__call__(batch_data_samples)

    def generate_dn_label_query(self, gt_labels: Tensor, num_groups: int) -> Tensor:
        """Replace labels by random ones of the same domain and embed them.

        Args:
            gt_labels: Unified labels of all targets of the batch, has shape (num_targets,).
            num_groups: The number of denoising groups, each of positives and negatives.

        Returns:
            Has shape (num_targets * num_groups * 2, embed_dims).
        """
        labels = gt_labels.repeat(2 * num_groups)
        noise = torch.rand_like(labels.float())
        chosen = torch.nonzero(noise < self.label_noise_scale * 0.5).view(-1)
        noisy = labels.scatter(0, chosen, self._draw_labels(chosen, len(gt_labels)))
        return self.label_embedding(noisy)

    def _draw_labels(self, chosen: Tensor, num_targets: int) -> Tensor:
        """Uniform labels, each of its target's domain, has the shape of ``chosen``.

        One draw r from 0 .. L-1, L the least common multiple of the domains' class counts n_d:
        r mod n_d is exactly uniform for each of them, and for a batch of one domain it is the very
        draw that a model with only this domain's classes would make.
        """
        if not self._domain_of_target:
            return chosen
        domains = sorted(set(self._domain_of_target))
        ids = [self.label_space.unified_ids(domain) for domain in domains]
        table = chosen.new_zeros(len(domains), max(map(len, ids)))
        for row, domain_ids in zip(table, ids, strict=True):
            row[: len(domain_ids)] = row.new_tensor(domain_ids)
        sizes = chosen.new_tensor([len(domain_ids) for domain_ids in ids])
        index = {domain: i for i, domain in enumerate(domains)}
        domain_of_target = chosen.new_tensor([index[d] for d in self._domain_of_target])
        draws = torch.randint_like(chosen, 0, math.lcm(*map(len, ids)))
        domain_of_draw = domain_of_target[chosen % num_targets]
        return table[domain_of_draw, draws % sizes[domain_of_draw]]
