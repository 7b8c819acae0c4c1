from __future__ import annotations

from typing import Any

from mmdet.apis import DetInferencer


class MultiDomainInferencer(DetInferencer):
    """mmdet's ``DetInferencer`` that can be told which domain the images are of.

    A domain routes the images by the plan and restricts them to its classes. Without one, images
    are routed by their embedding (nearest domain), if the plan has prototypes. Labels are unified;
    their names are ``inferencer.model.dataset_meta['classes']``.

    Args:
        *args: As ``DetInferencer``: ``model`` (a config), ``weights``, ``device`` ...
        domain: The domain of images for which the call names none.
        scope: As ``DetInferencer``; ours finds our models.
        **kwargs: As ``DetInferencer``.

    Example:
        >>> inferencer = MultiDomainInferencer('config.py', 'weights.pth', domain='bccd')
        >>> inferencer('cells.jpg', out_dir='out')
        >>> inferencer('board.jpg', domain='deeppcb', out_dir='out')
    """

    forward_kwargs = DetInferencer.forward_kwargs | {'domain'}

    def __init__(
        self, *args: Any, domain: str | None = None, scope: str = 'mmdet_moe', **kwargs: Any
    ) -> None:
        super().__init__(*args, scope=scope, **kwargs)
        self.model.domain = self._checked(domain)

    def forward(self, inputs: dict, domain: str | None = None, **kwargs: Any) -> Any:
        """Predict a batch.

        Args:
            inputs: What the pipeline made of the images.
            domain: Their domain; None for the inferencer's own.
            **kwargs: As ``DetInferencer``.
        """
        before = self.model.domain
        if domain is not None:
            self.model.domain = self._checked(domain)
        try:
            return super().forward(inputs, **kwargs)
        finally:
            self.model.domain = before

    def _checked(self, domain: str | None) -> str | None:
        space = getattr(self.model, 'label_space', None)
        return domain if domain is None or space is None else space.check_domain(domain)
