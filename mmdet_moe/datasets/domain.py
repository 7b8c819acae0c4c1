"""One domain's dataset, seen in unified labels."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmdet.datasets import XMLDataset
from mmengine.dataset import BaseDataset, Compose
from mmengine.fileio import load

from mmdet_moe.registry import DATASETS
from mmdet_moe.structures import LabelSpace, LabelSpaceError


@DATASETS.register_module()
class DomainDataset(BaseDataset):
    """Any mmdet dataset whose labels are turned, by name, into unified ids.

    mmdet's datasets number their classes each in its own way: ``CocoDataset`` in the order of the
    categories in the JSON, ``XMLDataset`` in that of ``metainfo['classes']``. This one asks the
    loaded dataset which *name* each of its labels stands for and looks the name up in the label
    space. The wrapped dataset's serialised cache is left as it is; labels change on the way out.

    ``MultiDomainDataset`` builds these; nobody needs to write one in a config.

    Args:
        dataset: The dataset, or its config. In a config without ``metainfo.classes`` the classes
            are those of the label space, and a category that has boxes and is not among them is
            refused. With ``metainfo.classes`` (the same names as in the label space, in any order)
            further categories are dropped as mmdet does: stating them is saying so.
        domain: The domain's name in the label space.
        label_space: The label space or its config.
        pipeline: The transforms. The dataset's own pipeline comes first in rank: this one is used
            when it has none.
        test_mode: Overrides the dataset's ``test_mode`` when not None.
        lazy_init: Whether to put off reading the annotations.
        max_refetch: Attempts at another image when the training pipeline returns None.

    Raises:
        LabelSpaceError: The dataset's classes are not those of its domain.
    """

    def __init__(
        self,
        dataset: BaseDataset | Mapping[str, Any],
        domain: str,
        label_space: LabelSpace | Mapping[str, Any],
        pipeline: Sequence[dict | Callable] = (),
        test_mode: bool | None = None,
        lazy_init: bool = False,
        max_refetch: int = 1000,
    ) -> None:
        self.label_space = LabelSpace.from_config(label_space)
        self.domain = self.label_space.check_domain(domain)
        self._local_classes = self.label_space.local_classes(domain)
        self._categories: dict[int, tuple[str, bool]] = {}
        if isinstance(dataset, BaseDataset):
            self._classes_stated = True
            self._check_stated(dataset.metainfo.get('classes'))
        else:
            dataset = self._build(dict(dataset), test_mode)
        self.dataset = dataset
        if test_mode is not None:
            self.dataset.test_mode = test_mode
        self.test_mode = self.dataset.test_mode
        self.max_refetch = max_refetch
        self._metainfo = {
            **_plain(self.dataset.metainfo),
            'classes': self._local_classes,
            'domain': domain,
        }
        if len(self._metainfo.get('palette') or ()) != len(self._local_classes):
            self._metainfo.pop('palette', None)  # COCO's 80 colours, inherited
        own = self.dataset.pipeline.transforms
        self.has_own_pipeline = bool(own)
        self.pipeline = self.dataset.pipeline if own else Compose(list(pipeline))
        self._fully_initialized = False
        if not lazy_init:
            self.full_init()

    def _build(self, cfg: dict, test_mode: bool | None) -> BaseDataset:
        metainfo = dict(cfg.get('metainfo') or {})
        self._classes_stated = metainfo.get('classes') is not None
        if self._classes_stated:
            self._check_stated(metainfo['classes'])
        else:
            metainfo['classes'] = self._local_classes
        # Lazily, so that the categories can be watched while the annotations are read, and so that
        # metainfo is there on a machine without the data.
        cfg.update(metainfo=metainfo, lazy_init=True)
        if test_mode is not None:
            cfg['test_mode'] = test_mode
        return DATASETS.build(cfg)

    # -- reading the annotations -----------------------------------------------------------------

    def full_init(self) -> None:
        """Read the annotations and find the unified id of every label in them."""
        if self._fully_initialized:
            return
        self._watch_categories()
        asked = self._watch_names()
        try:
            self.dataset.full_init()
        except FileNotFoundError as error:
            raise FileNotFoundError(f'domain {self.domain!r}: {error}') from error
        finally:
            self.dataset.__dict__.pop('COCOAPI', None)
            if asked is not None:
                self.dataset._metainfo['classes'] = tuple(asked)
        if asked is not None and asked.missed and not self._classes_stated:
            # A class without a box may just be rare, unless its name looks like a dropped one.
            unseen = [name for name in self._local_classes if name not in asked.found]
            misspelt = [name for name in unseen if difflib.get_close_matches(name, asked.missed)]
            self._refuse_missing(misspelt, asked.found | asked.missed)
            self._refuse_unlisted(asked.missed)
        names = self._names_by_label()
        self._check_names(names)
        unified = dict(
            zip(self._local_classes, self.label_space.unified_ids(self.domain), strict=True)
        )
        self._unified = {label: unified[name] for label, name in names.items()}
        self._fully_initialized = True

    def _watch_categories(self) -> None:
        """Have the COCO reader of the dataset leave its categories with us.

        ``CocoDataset`` deletes the reader after use, and reading a large JSON twice costs minutes.
        """
        api = getattr(self.dataset, 'COCOAPI', None)
        if api is None or getattr(self.dataset, '_fully_initialized', False):
            return

        def watched(path: str) -> Any:
            coco = api(path)
            used = {ann['category_id'] for ann in coco.anns.values()}
            self._categories = {
                cat_id: (cat['name'], cat_id in used) for cat_id, cat in coco.cats.items()
            }
            return coco

        self.dataset.COCOAPI = watched

    def _watch_names(self) -> _AskedClasses | None:
        """Have ``XMLDataset`` leave the names with us that it does not know and drops."""
        if not isinstance(self.dataset, XMLDataset) or self.dataset._fully_initialized:
            return None
        asked = _AskedClasses(self.dataset._metainfo['classes'])
        self.dataset._metainfo['classes'] = asked
        return asked

    def _names_by_label(self) -> dict[int, str]:
        """The class name that each label of the wrapped dataset stands for."""
        cat2label = getattr(self.dataset, 'cat2label', None)
        if not cat2label:
            classes = self.dataset.metainfo['classes']
            return dict(enumerate(classes))
        if all(isinstance(key, str) for key in cat2label):
            return {label: name for name, label in cat2label.items()}
        if not self._categories:
            annotations = load(self.dataset.ann_file)
            used = {ann['category_id'] for ann in annotations.get('annotations', ())}
            self._categories = {
                cat['id']: (cat['name'], cat['id'] in used) for cat in annotations['categories']
            }
        return {label: self._categories[cat_id][0] for cat_id, label in cat2label.items()}

    # -- what a dataset whose classes do not match is told ----------------------------------------

    def _where(self) -> str:
        return getattr(self.dataset, 'ann_file', None) or type(self.dataset).__name__

    def _check_stated(self, classes: Sequence[str] | None) -> None:
        classes = list(classes or ())
        if set(classes) != set(self._local_classes) or len(classes) != len(self._local_classes):
            raise LabelSpaceError(
                f"domain {self.domain!r}: the dataset's metainfo has classes {classes}, the label "
                f'space {list(self._local_classes)}'
            )

    def _check_names(self, names: Mapping[int, str]) -> None:
        found = set(names.values())
        listed = found | {name for name, _ in self._categories.values()}
        self._refuse_missing([name for name in self._local_classes if name not in found], listed)
        unlisted = found - set(self._local_classes)
        if not self._classes_stated:
            unlisted |= {
                name
                for name, used in self._categories.values()
                if used and name not in self._local_classes
            }
        self._refuse_unlisted(unlisted)

    def _refuse_missing(self, missing: Sequence[str], known: set[str]) -> None:
        if not missing:
            return
        near = difflib.get_close_matches(missing[0], sorted(known), n=1)
        raise LabelSpaceError(
            f'domain {self.domain!r}: class {missing[0]!r} of the label space is not in '
            f'{self._where()}, which has {sorted(known)}'
            + (f'; did you mean {near[0]!r}?' if near else '')
        )

    def _refuse_unlisted(self, unlisted: set[str]) -> None:
        if unlisted:
            raise LabelSpaceError(
                f'domain {self.domain!r}: {self._where()} has boxes of {sorted(unlisted)}, which '
                'the label space does not list; add them to it, or state metainfo=dict(classes='
                f'{list(self._local_classes)}) in the dataset to leave them out'
            )

    # -- data, in unified labels -----------------------------------------------------------------

    def __len__(self) -> int:
        self.full_init()
        return len(self.dataset)

    def get_data_info(self, idx: int) -> dict:
        """The annotation of image ``idx``, its labels unified ids, tagged with its domain."""
        self.full_init()
        info = self.dataset.get_data_info(idx)
        for instance in info.get('instances', ()):
            instance['bbox_label'] = self._unified[instance['bbox_label']]
        info['domain'] = self.domain
        return info

    def get_cat_ids(self, idx: int) -> list[int]:
        """The unified ids of the objects in image ``idx``."""
        self.full_init()
        return [self._unified[label] for label in self.dataset.get_cat_ids(idx)]

    def get_subset(self, indices: Any) -> BaseDataset:
        raise NotImplementedError('give the wrapped dataset `indices` instead')

    get_subset_ = get_subset


class _AskedClasses(tuple):
    """Class names that note which names were looked for among them."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.found: set[str] = set()
        self.missed: set[str] = set()

    def __contains__(self, name: object) -> bool:
        known = super().__contains__(name)
        (self.found if known else self.missed).add(name)
        return known


def _plain(value: Any) -> Any:
    """Copy configs into plain dicts, so that a checkpoint of ours loads with weights_only=True."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value
