"""How a domain joins a trained model: what is trained, and what a new expert starts as."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmdet_moe.moe import MoELayer, PlanRouter
from mmdet_moe.moe.routers.plan import load_plan
from mmdet_moe.planning import ExpertPlan
from mmdet_moe.planning.checks import unknown_name
from mmdet_moe.structures import LabelSpace

NEAREST, MEAN = 'nearest', 'mean'


@dataclass(frozen=True)
class ExpertStart:
    """What the experts that a plan added to an earlier one start as.

    Attributes:
        names: The earlier plan's experts; the first of the new one's.
        new: New expert -> the numbers of those earlier ones that it is the mean of.
    """

    names: tuple[str, ...]
    new: dict[str, list[int]]

    @property
    def num_old(self) -> int:
        """Number of the earlier plan's experts."""
        return len(self.names)


@dataclass(frozen=True)
class Adaptation:
    """A model's ``adapt`` option: train what is one domain's, and nothing else.

    Attributes:
        domain: The domain.
        previous: The plan (file) that the checkpoint to load was trained with. Needed where the
            model's plan has more experts than that one: the old ones go where they were.
        start: What a new expert starts as: the old one that the plan says is ``'nearest'`` to the
            domain (largest affinity), the ``'mean'`` of all old ones, or one by name. A plan made
            by hand has no affinities: nearest is the mean there.
        train: Regular expressions (or one) of whole parameter names: what is trained besides.
    """

    domain: str
    previous: str | Mapping[str, Any] | ExpertPlan | None = None
    start: str = NEAREST
    train: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.train, str):
            object.__setattr__(self, 'train', (self.train,))

    def trained(self, layers: Mapping[str, MoELayer], space: LabelSpace | None) -> list[str]:
        """Regular expressions of the names of the domain's parameters: its experts' in each layer
        that a plan routes or teaches, and its class rows.

        Raises:
            ValueError: The domain is not in the label space, or not in the plan.
        """
        if space is not None:
            space.check_domain(self.domain)
        patterns = [rf'(.*\.)?newcomers\.{re.escape(self.domain)}\..*']
        for name, layer in layers.items():
            for router in layer.router.modules():
                if not isinstance(router, PlanRouter):
                    continue
                if self.domain not in router.datasets:
                    raise ValueError(
                        f'adapt: {router.source} has no experts for '
                        f'{unknown_name(self.domain, router.datasets, "dataset")}; plan again '
                        '(tools/plan_experts.py CONFIG)'
                    )
                for e in router.experts_of(self.domain):
                    patterns.append(rf'{re.escape(name)}\.experts\.{e}\..*')
        return patterns

    def expert_start(self, plan: Any) -> ExpertStart | None:
        """What the experts of ``plan`` that the previous plan lacks start as.

        Raises:
            ValueError: The previous plan's experts are not the first of this one's, or ``start``
                names none of them.
        """
        if plan is None or self.previous is None:
            return None
        now, before = load_plan(plan), load_plan(self.previous)
        old = tuple(before.experts)
        if tuple(now.experts[: len(old)]) != old:
            raise ValueError(
                f'adapt: the previous plan has experts {list(old)}, which are not the first of the '
                f"plan's {list(now.experts)}: the checkpoint's experts would change places"
            )
        return ExpertStart(old, {name: self._sources(now, old) for name in now.experts[len(old) :]})

    def _sources(self, plan: ExpertPlan, old: tuple[str, ...]) -> list[int]:
        row = plan.affinity[plan.datasets.index(self.domain), : len(old)]
        if self.start == MEAN or (self.start == NEAREST and not row.any()):
            return list(range(len(old)))
        if self.start == NEAREST:
            return [int(row.argmax())]
        if self.start not in old:
            raise ValueError(f'adapt: start: {unknown_name(self.start, [NEAREST, MEAN, *old], "")}')
        return [old.index(self.start)]
