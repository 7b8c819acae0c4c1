from __future__ import annotations

from typing import Any

from mmdet.models.dense_heads import RetinaHead
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet_moe.registry import MODELS

from ..domain_classes import MASKED_LOGIT, MultiDomainHeadMixin
from ..layers.class_blocks import with_blocks
from .levels import LevelsMixin


@MODELS.register_module()
class MultiDomainRetinaHead(MultiDomainHeadMixin, LevelsMixin, RetinaHead):
    """RetinaNet's head over several domains with one label space.

    Channels of ``retina_cls`` are anchor * C + class with C unified classes. An image's loss and
    predictions are those of a head that has only its domain's classes (with the same weights in
    the rows of these classes), whatever else is in the batch.

    Args:
        See :class:`~mmdet_moe.models.domain_classes.MultiDomainHeadMixin`,
        :class:`~mmdet_moe.models.dense_heads.levels.LevelsMixin` and mmdet's ``RetinaHead``.
    """

    def _init_layers(self) -> None:
        super()._init_layers()
        if self.newcomers:
            self.retina_cls = with_blocks(self.retina_cls, self.row_layout(self.cls_out_channels))

    def loss_by_feat(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        batch_gt_instances: list[InstanceData],
        batch_img_metas: list[dict],
        batch_gt_instances_ignore: list[InstanceData] | None = None,
    ) -> dict:
        """As the base class, on logits masked to each image's domain.

        Args:
            cls_scores: Logits of each level, each has shape (B, A * C, H, W).
            bbox_preds: Box deltas of each level, each has shape (B, A * 4, H, W).
            batch_gt_instances: Boxes and unified labels of each image.
            batch_img_metas: Meta of each image, with its ``domain``.
            batch_gt_instances_ignore: Boxes to ignore of each image.
        """
        domains = self.train_domains(batch_img_metas, batch_gt_instances)
        if domains is not None:
            allowed = self.domain_classes.allowed(domains, cls_scores[0].device)
            cls_scores = [mask_channels(score, allowed) for score in cls_scores]
        return super().loss_by_feat(
            cls_scores, bbox_preds, batch_gt_instances, batch_img_metas, batch_gt_instances_ignore
        )

    def get_targets(
        self,
        anchor_list: list[list[Tensor]],
        valid_flag_list: list[list[Tensor]],
        batch_gt_instances: list[InstanceData],
        batch_img_metas: list[dict],
        batch_gt_instances_ignore: list[InstanceData] | None = None,
        unmap_outputs: bool = True,
        return_sampling_results: bool = False,
    ) -> tuple:
        """As the base class, with the weights of ``loss_norm='domain'`` on labels and boxes.

        mmdet divides by the positives of this process, so the weights are this process's too.
        """
        targets = super().get_targets(
            anchor_list,
            valid_flag_list,
            batch_gt_instances,
            batch_img_metas,
            batch_gt_instances_ignore,
            unmap_outputs=unmap_outputs,
            return_sampling_results=True,
        )
        labels, label_weights, bbox_targets, bbox_weights, avg_factor, samples, *rest = targets
        domains = self.train_domains(batch_img_metas)
        if domains is not None and self.loss_norm == 'domain':
            weights = self.weigh_domains(domains, [sample.avg_factor for sample in samples])
            per_image = label_weights[0].new_tensor(weights)
            label_weights = [weight * per_image[:, None] for weight in label_weights]
            bbox_weights = [weight * per_image[:, None, None] for weight in bbox_weights]
        result = (labels, label_weights, bbox_targets, bbox_weights, avg_factor)
        if return_sampling_results:
            result += (samples,)
        return result + tuple(rest)

    def predict_by_feat(self, *args: Any, **kwargs: Any) -> list[InstanceData]:
        """As the base class; with ``keep_unrestricted`` the other reading is made beside it."""
        results = super().predict_by_feat(*args, **kwargs)
        if self.keep_unrestricted:
            with self.unrestricted():
                self._unrestricted = super().predict_by_feat(*args, **kwargs)
        return results

    def _predict_by_feat_single(
        self,
        cls_score_list: list[Tensor],
        bbox_pred_list: list[Tensor],
        score_factor_list: list[Tensor | None],
        mlvl_priors: list[Tensor],
        img_meta: dict,
        *args: Any,
        **kwargs: Any,
    ) -> InstanceData:
        """As the base class, in local labels that are mapped back to unified ones at the end.

        Args:
            cls_score_list: Logits of one image for each level, each has shape (A * C, H, W).
            bbox_pred_list: Box deltas for each level, each has shape (A * 4, H, W).
            score_factor_list: Unused by RetinaNet.
            mlvl_priors: Anchors of each level, each has shape (H * W * A, 4).
            img_meta: Meta of the image; its ``domain`` decides which classes are scored.
            *args: As the base class.
            **kwargs: As the base class.
        """
        domain = self.test_domain(img_meta)
        if domain is None:
            return super()._predict_by_feat_single(
                cls_score_list,
                bbox_pred_list,
                score_factor_list,
                mlvl_priors,
                img_meta,
                *args,
                **kwargs,
            )
        columns = self.domain_classes.columns(domain, cls_score_list[0].device)
        local_scores = [
            slice_channels(score, columns, self.cls_out_channels) for score in cls_score_list
        ]
        results = super(MultiDomainRetinaHead, self.local_view(domain))._predict_by_feat_single(
            local_scores, bbox_pred_list, score_factor_list, mlvl_priors, img_meta, *args, **kwargs
        )
        results.labels = columns[results.labels]
        return results

    def class_rows(self) -> dict[str, tuple[str | None, ...]]:
        """``retina_cls`` has a row per anchor and class."""
        return self.rows_of('retina_cls', self.cls_out_channels)


def mask_channels(scores: Tensor, allowed: Tensor) -> Tensor:
    """Set the logits of classes that an image's domain lacks to :data:`MASKED_LOGIT`.

    Args:
        scores: Logits, has shape (B, A * C, H, W), channels anchor * C + class.
        allowed: The classes of each image, bool, has shape (B, C).

    Returns:
        Has shape (B, A * C, H, W).
    """
    batch, channels, height, width = scores.shape
    scores = scores.reshape(batch, -1, allowed.shape[1], height, width)
    masked = scores.masked_fill(~allowed[:, None, :, None, None], MASKED_LOGIT)
    return masked.reshape(batch, channels, height, width)


def slice_channels(scores: Tensor, columns: Tensor, num_channels: int) -> Tensor:
    """Take the given classes' logits of every anchor.

    Args:
        scores: Logits of one image, has shape (A * C, H, W), channels anchor * C + class.
        columns: The n channels to take, has shape (n,).
        num_channels: C.

    Returns:
        Has shape (A * n, H, W), channels anchor * n + position in ``columns``.
    """
    height, width = scores.shape[-2:]
    scores = scores.reshape(-1, num_channels, height, width)
    return scores[:, columns].reshape(-1, height, width)
