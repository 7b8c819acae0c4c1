from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmdet.models.dense_heads import DINOHead
from mmdet.utils import reduce_mean
from mmengine.dist import get_world_size
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdet_moe.registry import MODELS

from ..domain_classes import MASKED_LOGIT, MultiDomainHeadMixin
from ..layers.class_blocks import with_blocks


@MODELS.register_module()
class MultiDomainDINOHead(MultiDomainHeadMixin, DINOHead):
    """DINO's head over several domains with one label space.

    DINO makes logits in three places: for the encoder's proposals (in the *detector*, where they
    choose the queries), for the decoder's matching queries and for its denoising queries. All of
    them come out of ``cls_branches``, so that is where they are masked. Which image may use which
    class is told by :meth:`restrict` before the transformer runs.

    Args:
        See :class:`~mmdet_moe.models.domain_classes.MultiDomainHeadMixin` and mmdet's ``DINOHead``.
    """

    def _init_layers(self) -> None:
        super()._init_layers()
        if self.newcomers:
            layout = self.row_layout(self.cls_out_channels)
            whole = {branch: with_blocks(branch, layout) for branch in self.cls_branches}
            self.cls_branches = nn.ModuleList(whole[branch] for branch in self.cls_branches)
        self._allowed: Tensor | None = None
        # A set: with `share_pred_layer` all branches are one module. The hook is a bound method,
        # so that a deep copy (EMA) of the head masks with its own state.
        for branch in set(self.cls_branches):
            branch.register_forward_hook(self._mask_logits)

    def init_weights(self) -> None:
        """As the base class, which sets the bias of the class branches' own rows only."""
        super().init_weights()
        for branch in self.cls_branches:
            for block in getattr(branch, 'newcomers', {}).values():
                nn.init.constant_(block.bias, float(branch.bias[0]))

    def restrict(self, batch_img_metas: Sequence[Mapping] | None) -> None:
        """Tell whose classes the next logits are of.

        Args:
            batch_img_metas: Meta of each image, with its ``domain``; None lifts the restriction.
        """
        self._allowed = None
        if self.label_space is None or batch_img_metas is None:
            return
        device = self.cls_branches[0].weight.device
        if self.training:
            domains = self.train_domains(batch_img_metas)
            self._allowed = self.domain_classes.allowed(domains, device)
            return
        domains = [self.test_domain(meta) for meta in batch_img_metas]
        if any(domain is not None for domain in domains):
            rows = [
                torch.ones(self.cls_out_channels, dtype=torch.bool, device=device)
                if domain is None
                else self.domain_classes.allowed([domain], device)[0]
                for domain in domains
            ]
            self._allowed = torch.stack(rows)

    def _mask_logits(self, module: nn.Module, inputs: tuple, logits: Tensor) -> Tensor:
        """Forward hook of ``cls_branches``: logits have shape (B, num_queries, C)."""
        if self._allowed is None:
            return logits
        return logits.masked_fill(~self._allowed[:, None], MASKED_LOGIT)

    def loss_by_feat(
        self,
        all_layers_cls_scores: Tensor,
        all_layers_bbox_preds: Tensor,
        enc_cls_scores: Tensor,
        enc_bbox_preds: Tensor,
        batch_gt_instances: list[InstanceData],
        batch_img_metas: list[dict],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """As the base class, after a check that every label is of its image's domain."""
        self.train_domains(batch_img_metas, batch_gt_instances)
        return super().loss_by_feat(
            all_layers_cls_scores,
            all_layers_bbox_preds,
            enc_cls_scores,
            enc_bbox_preds,
            batch_gt_instances,
            batch_img_metas,
            *args,
            **kwargs,
        )

    def get_targets(
        self,
        cls_scores_list: list[Tensor],
        bbox_preds_list: list[Tensor],
        batch_gt_instances: list[InstanceData],
        batch_img_metas: list[dict],
    ) -> tuple:
        """As the base class, with the weights of ``loss_norm='domain'``."""
        targets = super().get_targets(
            cls_scores_list, bbox_preds_list, batch_gt_instances, batch_img_metas
        )
        return self._weigh_targets(targets, batch_img_metas)

    def get_dn_targets(
        self,
        batch_gt_instances: list[InstanceData],
        batch_img_metas: list[dict],
        dn_meta: dict[str, int],
    ) -> tuple:
        """As the base class, with the weights of ``loss_norm='domain'``."""
        targets = super().get_dn_targets(batch_gt_instances, batch_img_metas, dn_meta)
        return self._weigh_targets(targets, batch_img_metas)

    def _weigh_targets(self, targets: tuple, batch_img_metas: list[dict]) -> tuple:
        r"""Multiply each image's weights so that its domain's positives normalise it.

        DINO divides box losses by the positives averaged over processes, and class losses by these
        or by this process's own (``sync_cls_avg_factor``). For one global mean over all processes,
        with bars for averages over processes, image i of domain d is to weigh
        :math:`\bar B_d / \bar B / \bar P_d`; each weight here is that times what DINO divides by.
        See :func:`~mmdet_moe.models.domain_classes.domain_loss_weights` for one process.
        """
        if self.label_space is None or self.loss_norm == 'batch':
            return targets
        labels, label_weights, bbox_targets, bbox_weights, num_pos, num_neg = targets
        domains = self.train_domains(batch_img_metas)
        index = {domain: i for i, domain in enumerate(self.label_space.domains)}
        # One collective of fixed size, whatever domains this process has in its batch.
        sums = label_weights[0].new_zeros(2, len(index), dtype=torch.float32)
        for domain, weight in zip(domains, bbox_weights, strict=True):
            sums[0, index[domain]] += 1
            sums[1, index[domain]] += (weight[:, 0] > 0).sum()
        images, positives = reduce_mean(sums).cpu()
        box_factor = max(float(positives.sum()), 1.0)
        cls_factor = box_factor if self.sync_cls_avg_factor else max(float(num_pos), 1.0)
        least = 1.0 / get_world_size()
        for i, domain in enumerate(domains):
            j = index[domain]
            share = float(images[j] / images.sum()) / max(float(positives[j]), least)
            label_weights[i] = label_weights[i] * (share * cls_factor)
            bbox_weights[i] = bbox_weights[i] * (share * box_factor)
        return labels, label_weights, bbox_targets, bbox_weights, num_pos, num_neg

    def _predict_by_feat_single(
        self, cls_score: Tensor, bbox_pred: Tensor, img_meta: dict, rescale: bool = True
    ) -> InstanceData:
        """As the base class, in local labels that are mapped back to unified ones at the end.

        Args:
            cls_score: Logits of one image, has shape (num_queries, C).
            bbox_pred: Boxes (cx, cy, w, h) relative to the image, has shape (num_queries, 4).
            img_meta: Meta of the image; its ``domain`` decides which classes are scored.
            rescale: Whether boxes are of the original image.
        """
        domain = self.test_domain(img_meta)
        if domain is None:
            return super()._predict_by_feat_single(cls_score, bbox_pred, img_meta, rescale)
        columns = self.domain_classes.columns(domain, cls_score.device)
        view = self.local_view(domain)
        # Few queries on few classes may be fewer than `max_per_img`, which top-k would refuse.
        candidates = len(cls_score) * (view.num_classes if self.loss_cls.use_sigmoid else 1)
        test_cfg = dict(self.test_cfg or {})
        test_cfg['max_per_img'] = min(test_cfg.get('max_per_img', len(cls_score)), candidates)
        view.test_cfg = test_cfg
        results = super(MultiDomainDINOHead, view)._predict_by_feat_single(
            cls_score[:, columns], bbox_pred, img_meta, rescale
        )
        results.labels = columns[results.labels]
        return results

    def class_rows(self) -> dict[str, tuple[str | None, ...]]:
        """Each class branch has a row per class."""
        return self.rows_of(r'cls_branches\.\d+', self.cls_out_channels)
