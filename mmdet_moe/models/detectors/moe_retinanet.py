from __future__ import annotations

from mmdet.models.detectors import RetinaNet

from mmdet_moe.registry import MODELS

from ..moe_mixin import MoEMixin


@MODELS.register_module()
class MoERetinaNet(MoEMixin, RetinaNet):
    """RetinaNet whose modules named in ``moe`` are Mixture-of-Experts layers.

    With ``MultiDomainRetinaHead`` and a ``label_space`` it trains on several domains at once;
    without ``moe`` it is the dense twin of the same model.

    Args:
        See :class:`~mmdet_moe.models.moe_mixin.MoEMixin` and mmdet's ``RetinaNet``.
    """
