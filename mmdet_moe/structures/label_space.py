"""The label space: the classes of every domain, by name, in one unified order.

It stands once in a config and is used by the dataset (local labels -> unified labels), the model
(which classes an image may be scored on) and the evaluator (unified labels -> the domain's own),
and it is saved in the checkpoint. Everything goes by name and never by position, so leaving a
domain out, testing on one alone or adding one at the end never shifts an id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

RESERVED_DOMAINS = ('macro',)


class LabelSpaceError(ValueError):
    """A label space that cannot be, or a domain or class that is not in it."""


class LabelSpace:
    """Ordered domains with their class names, and the unified space they span.

    Let :math:`C_d` be the classes of domain d in their own order, and ``canonical`` the map that
    synonyms define (the identity on every other name). The unified space is the list of
    ``canonical(c)`` over all domains d in order and c in :math:`C_d` in order, every name once, at
    its first appearance. With ``merge=False`` no two domains share a class: the unified name is
    ``'<domain>/<class>'`` and synonyms have no effect (the concatenated head).

    Args:
        domains: Domain name -> its class names, in the order of its local labels.
        synonyms: Class name -> the name it is to be one with, ``{'aeroplane': 'airplane'}``. A key
            ``'<domain>/<class>'`` speaks of that domain's class only. Chains are followed.
        merge: Whether classes of the same (canonical) name are one class.

    Raises:
        LabelSpaceError: No domain, a domain without classes, duplicate names, a synonym of a class
            that no domain has, synonyms in a circle, or two classes of one domain merged into one.

    Example:
        >>> space = LabelSpace(dict(voc=['cat', 'aeroplane'], coco=['airplane', 'dog']),
        ...                    synonyms=dict(aeroplane='airplane'))
        >>> space.classes
        ('cat', 'airplane', 'dog')
        >>> space.unified_ids('coco')
        (1, 2)
    """

    def __init__(
        self,
        domains: Mapping[str, Sequence[str]],
        synonyms: Mapping[str, str] | None = None,
        merge: bool = True,
    ) -> None:
        self._local = _checked_domains(domains)
        self._synonyms = dict(synonyms or {})
        self._merge = bool(merge)
        self._check_synonyms()
        ids: dict[str, int] = {}
        self._unified_ids: dict[str, tuple[int, ...]] = {}
        for domain, classes in self._local.items():
            seen: dict[str, str] = {}
            for name in classes:
                unified = self.unified_name(domain, name)
                if unified in seen:
                    raise LabelSpaceError(
                        f'domain {domain!r}: the synonyms make classes {seen[unified]!r} and '
                        f'{name!r} both {unified!r}; two classes of one domain cannot be merged'
                    )
                seen[unified] = name
                ids.setdefault(unified, len(ids))
            self._unified_ids[domain] = tuple(ids[unified] for unified in seen)
        self._classes = tuple(ids)
        self._ids = ids

    # -- what it holds ---------------------------------------------------------------------------

    @property
    def domains(self) -> tuple[str, ...]:
        """The domain names, in order."""
        return tuple(self._local)

    @property
    def classes(self) -> tuple[str, ...]:
        """The unified class names; a class's position is its unified id."""
        return self._classes

    @property
    def num_classes(self) -> int:
        """The number of unified classes."""
        return len(self._classes)

    @property
    def synonyms(self) -> dict[str, str]:
        """The synonyms as given."""
        return dict(self._synonyms)

    @property
    def merge(self) -> bool:
        """Whether domains share the classes they name alike."""
        return self._merge

    def local_classes(self, domain: str) -> tuple[str, ...]:
        """The class names of ``domain``, in the order of its local labels."""
        return self._local[self.check_domain(domain)]

    def unified_ids(self, domain: str) -> tuple[int, ...]:
        """The unified id of each local class of ``domain``, in local order (local -> unified)."""
        return self._unified_ids[self.check_domain(domain)]

    def local_ids(self, domain: str) -> tuple[int, ...]:
        """For each unified id the local label in ``domain``, -1 where it lacks that class."""
        table = [-1] * self.num_classes
        for local, unified in enumerate(self.unified_ids(domain)):
            table[unified] = local
        return tuple(table)

    def unified_name(self, domain: str, name: str) -> str:
        """The unified name of class ``name`` of ``domain``.

        Raises:
            LabelSpaceError: ``domain`` is unknown, or has no class of that name.
        """
        if name not in self.local_classes(domain):
            raise LabelSpaceError(
                f'domain {domain!r} has no class {name!r}; its classes are '
                f'{list(self._local[domain])}'
            )
        if not self._merge:
            return f'{domain}/{name}'
        scoped = self._synonyms.get(f'{domain}/{name}')
        name = name if scoped is None else scoped
        while name in self._synonyms:
            name = self._synonyms[name]
        return name

    def unified_id(self, name: str) -> int:
        """The id of the unified class ``name``."""
        try:
            return self._ids[name]
        except KeyError:
            raise LabelSpaceError(
                f'no unified class {name!r}; the classes are {list(self._classes)}'
            ) from None

    def check_domain(self, domain: str) -> str:
        """Return ``domain`` if it is one of this space's.

        Raises:
            LabelSpaceError: It is not; the message lists those that are.
        """
        if domain not in self._local:
            raise LabelSpaceError(
                f'unknown domain {domain!r}; the label space has {list(self._local)}'
            )
        return domain

    # -- to and from configs and checkpoints -----------------------------------------------------

    @classmethod
    def from_config(cls, cfg: LabelSpace | Mapping[str, Any]) -> LabelSpace:
        """Build from ``dict(domains=..., synonyms=..., merge=...)``, or pass one through."""
        if isinstance(cfg, cls):
            return cfg
        if not isinstance(cfg, Mapping):
            raise TypeError(
                'label_space must be a LabelSpace or dict(domains=..., synonyms=..., merge=...), '
                f'got {type(cfg).__name__}'
            )
        unknown = sorted(set(cfg) - {'domains', 'synonyms', 'merge'})
        if unknown or 'domains' not in cfg:
            what = f'has unknown keys {unknown}' if unknown else 'lacks the key "domains"'
            raise LabelSpaceError(
                f'label_space {what}; its keys are "domains", "synonyms" and "merge"'
            )
        return cls(**cfg)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :meth:`from_config` reads back (JSON and checkpoints)."""
        return dict(
            domains={domain: list(classes) for domain, classes in self._local.items()},
            synonyms=dict(self._synonyms),
            merge=self._merge,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LabelSpace):
            return NotImplemented
        return (
            list(self._local.items()) == list(other._local.items())
            and self._classes == other._classes
            and self._unified_ids == other._unified_ids
        )

    def __hash__(self) -> int:
        return hash((tuple(self._local.items()), self._classes))

    def __repr__(self) -> str:
        return (
            f'LabelSpace({self.num_classes} classes, '
            + ', '.join(f'{domain}: {len(classes)}' for domain, classes in self._local.items())
            + ('' if self._merge else ', merge=False')
            + ')'
        )

    # -- checks ----------------------------------------------------------------------------------

    def _check_synonyms(self) -> None:
        known = {name for classes in self._local.values() for name in classes}
        known |= {f'{domain}/{name}' for domain, names in self._local.items() for name in names}
        for alias, canonical in self._synonyms.items():
            if not isinstance(canonical, str) or not canonical:
                raise LabelSpaceError(
                    f'synonym of {alias!r} must be a class name, got {canonical!r}'
                )
            if alias not in known and alias not in self._synonyms.values():
                raise LabelSpaceError(f'synonym {alias!r}: no domain has a class of that name')
            chain = [alias]
            while chain[-1] in self._synonyms:
                chain.append(self._synonyms[chain[-1]])
                if chain[-1] in chain[:-1]:
                    raise LabelSpaceError(f'synonyms go in a circle: {" -> ".join(chain)}')


def _checked_domains(domains: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    if not isinstance(domains, Mapping):
        raise TypeError(
            f'domains must map names to lists of class names, got {type(domains).__name__}'
        )
    if not domains:
        raise LabelSpaceError('a label space needs at least one domain')
    checked = {}
    for domain, classes in domains.items():
        # Domains become prefixes of metric keys, '<domain>/<metric>'.
        if not isinstance(domain, str) or not domain or '/' in domain:
            raise LabelSpaceError(
                f'domain names are non-empty strings without a slash, got {domain!r}'
            )
        if domain in RESERVED_DOMAINS:
            raise LabelSpaceError(f'{domain!r} names the average over domains; rename the domain')
        if isinstance(classes, str) or not isinstance(classes, Sequence):
            raise TypeError(
                f'domain {domain!r}: classes must be a list of names, got {classes!r} '
                f'({type(classes).__name__})'
            )
        if not classes:
            raise LabelSpaceError(f'domain {domain!r} has no classes')
        wrong = [name for name in classes if not isinstance(name, str) or not name]
        if wrong:
            raise LabelSpaceError(f'domain {domain!r}: {wrong[0]!r} is not a class name')
        twice = sorted({name for name in classes if list(classes).count(name) > 1})
        if twice:
            raise LabelSpaceError(f'domain {domain!r} names {twice} more than once')
        checked[domain] = tuple(classes)
    return checked
