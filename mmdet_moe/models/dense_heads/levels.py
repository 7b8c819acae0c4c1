from __future__ import annotations

import copy
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor


class LevelsMixin:
    """Predictions that know their feature level; put it before a dense head of mmdet.

    For heads that predict as mmdet's ``BaseDenseHead`` does, level by level.

    Args:
        with_levels: Whether predictions have ``levels``: the feature level of each box, 0 for the
            finest, long, has shape (num_instances,). Nothing else of them changes. Also an
            attribute that may be set at any time.
    """

    def __init__(self, *args: Any, with_levels: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.with_levels = with_levels

    def _predict_by_feat_single(
        self,
        cls_score_list: list[Tensor],
        bbox_pred_list: list[Tensor],
        score_factor_list: list[Tensor | None],
        mlvl_priors: list[Tensor],
        img_meta: dict,
        cfg: Any,
        rescale: bool = False,
        with_nms: bool = True,
    ) -> InstanceData:
        """As the base class, which is asked for each level's candidates alone where levels are
        wanted; rescaling, the size filter and NMS then see all of them, as ever."""
        predict = super()._predict_by_feat_single
        if not self.with_levels:
            return predict(
                cls_score_list,
                bbox_pred_list,
                score_factor_list,
                mlvl_priors,
                img_meta,
                cfg,
                rescale=rescale,
                with_nms=with_nms,
            )
        cfg = self.test_cfg if cfg is None else cfg
        unfiltered = copy.deepcopy(cfg)
        unfiltered.min_bbox_size = -1
        found = []
        levels = zip(cls_score_list, bbox_pred_list, score_factor_list, mlvl_priors, strict=True)
        for index, one_level in enumerate(levels):
            candidates = predict(*([x] for x in one_level), img_meta, unfiltered, with_nms=False)
            candidates.levels = torch.full_like(candidates.labels, index)
            found.append(candidates)
        return self._bbox_post_process(
            results=InstanceData.cat(found),
            cfg=cfg,
            rescale=rescale,
            with_nms=with_nms,
            img_meta=img_meta,
        )
