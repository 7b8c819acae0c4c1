from __future__ import annotations

from mmcv.transforms import BaseTransform
from mmengine.structures import BaseDataElement

from mmdet_moe.registry import TRANSFORMS


@TRANSFORMS.register_module()
class SetDomain(BaseTransform):
    """Say which domain an image is of, where no ``MultiDomainDataset`` does.

    For pipelines of inference and of single datasets. After ``PackDetInputs`` the data sample gets
    the domain; before it, ``domain`` must be among its ``meta_keys`` to be packed.

    Args:
        domain: A domain of the label space.
    """

    def __init__(self, domain: str) -> None:
        if not isinstance(domain, str) or not domain:
            raise ValueError(f'SetDomain: domain must be a name, got {domain!r}')
        self.domain = domain

    def transform(self, results: dict) -> dict:
        """Set ``results['domain']``, or that of the packed data sample."""
        sample = results.get('data_samples')
        if isinstance(sample, BaseDataElement):
            sample.set_metainfo({'domain': self.domain})
        else:
            results['domain'] = self.domain
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(domain={self.domain!r})'
