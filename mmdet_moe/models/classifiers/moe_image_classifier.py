from __future__ import annotations

from mmpretrain.models import ImageClassifier

from mmdet_moe.registry import MODELS

from ..moe_mixin import MoEMixin


@MODELS.register_module()
class MoEImageClassifier(MoEMixin, ImageClassifier):
    """mmpretrain's classifier whose modules named in ``moe`` are Mixture-of-Experts layers.

    Configs of classifiers keep mmpretrain's scope (``default_scope = 'mmpretrain'``), so that
    ``ResNet`` is mmpretrain's, and name this one ``mmdet_moe.MoEImageClassifier``. A data sample
    may carry its ``domain`` in its metainfo; routers that learn do not need it. Without ``moe`` it
    is the dense twin of the same model.

    Args:
        See :class:`~mmdet_moe.models.moe_mixin.MoEMixin` and mmpretrain's ``ImageClassifier``.
    """
