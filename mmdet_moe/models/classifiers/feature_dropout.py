"""Dropout between a backbone and its head."""

from __future__ import annotations

from mmengine.model import BaseModule
from torch import Tensor, nn

from mmdet_moe.registry import MODELS


@MODELS.register_module()
class FeatureDropout(BaseModule):
    """A neck that drops entries of the features, as DomainBed's ResNets do before the classifier.

    Args:
        p: Probability of an entry to be dropped.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p)

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Of each tensor of the tuple, of any shape."""
        return tuple(self.dropout(feature) for feature in inputs)
