from __future__ import annotations

from typing import Any

from mmdet.models.detectors import DINO
from mmdet.structures import OptSampleList
from torch import Tensor

from mmdet_moe.registry import MODELS

from ..layers import MultiDomainCdnQueryGenerator, with_blocks
from ..moe_mixin import MoEMixin


@MODELS.register_module()
class MoEDINO(MoEMixin, DINO):
    """DINO whose modules named in ``moe`` are Mixture-of-Experts layers (GEM-DINO).

    The paper's targets are FFNs of the decoder. With ``MultiDomainDINOHead`` and a ``label_space``
    it trains on several domains at once: logits of the encoder's proposals, the matching and the
    denoising queries are those of the image's own domain, and so are the denoising labels. Without
    ``moe`` it is the dense twin of the same model.

    Args:
        dn_cfg: As mmdet's ``DINO``.
        **kwargs: See :class:`~mmdet_moe.models.moe_mixin.MoEMixin` and mmdet's ``DINO``.
    """

    def __init__(self, *args: Any, dn_cfg: dict | None = None, **kwargs: Any) -> None:
        # DINO adds to the dict what our own generator needs as well.
        dn_cfg = dict(dn_cfg or {})
        super().__init__(*args, dn_cfg=dn_cfg, **kwargs)
        if self.label_space is not None:
            generator = MultiDomainCdnQueryGenerator(self.label_space, **dn_cfg)
            if self.newcomers:
                layout = self.bbox_head.row_layout(generator.num_classes)
                generator.label_embedding = with_blocks(generator.label_embedding, layout)
            self.dn_query_generator = generator
            if self._trained:  # the generator is new
                self._freeze_untrained()

    def forward_transformer(
        self, img_feats: tuple[Tensor, ...], batch_data_samples: OptSampleList = None
    ) -> dict:
        """As mmdet's, with the class logits of each image restricted to its domain."""
        if hasattr(self.bbox_head, 'restrict'):
            samples = batch_data_samples
            self.bbox_head.restrict(None if samples is None else [s.metainfo for s in samples])
        return super().forward_transformer(img_feats, batch_data_samples)

    def class_rows(self) -> dict[str, tuple[str | None, ...]]:
        """The head's rows, and the label embedding of denoising."""
        rows = super().class_rows()
        if rows:
            classes = self.dn_query_generator.num_classes
            name = r'dn_query_generator\.label_embedding'
            rows.update(self.bbox_head.rows_of(name, classes))
        return rows
