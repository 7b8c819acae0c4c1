"""Average precision against shots: a newcomer's, and what its coming cost those before it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import drawing

#: In the place of a number of shots: every object of the training set.
ALL = 'all'


@dataclass(frozen=True)
class Adapted:
    """What a model detects after adapting.

    Attributes:
        new: AP of the newcomer, 0 to 1.
        old: AP after adapting, of each domain before it; empty where they were not tested.
    """

    new: float
    old: Mapping[str, float]

    @property
    def mean_old(self) -> float | None:
        """Mean AP of the domains before it."""
        return sum(self.old.values()) / len(self.old) if self.old else None


def draw_shots(
    runs: Mapping[str, Mapping[str, Adapted]],
    before: Mapping[str, Mapping[str, float]],
    newcomer: str,
    path: str | os.PathLike,
) -> None:
    """Draw the newcomer's AP (left) and the mean AP of the others (right) against shots.

    Args:
        runs: Model -> shots (``'1'``, ``'5'``, ... ``'all'``) -> what it detects.
        before: Model -> AP of each domain before adapting.
        newcomer: The domain's name.
        path: Picture to write.
    """
    from matplotlib.figure import Figure

    shots: Sequence[str] = list(dict.fromkeys(k for of in runs.values() for k in of))
    figure = Figure(figsize=(8.4, 3.4), layout='constrained')
    left, right = figure.subplots(1, 2)
    for number, (model, of) in enumerate(runs.items()):
        places = [shots.index(k) for k in of]
        style = dict(marker='o', color=f'C{number}')
        left.plot(places, [100 * found.new for found in of.values()], label=model, **style)
        after = [(shots.index(k), x.mean_old) for k, x in of.items() if x.mean_old is not None]
        right.plot([x for x, _ in after], [100 * ap for _, ap in after], **style)
        mean = sum(before[model].values()) / len(before[model])
        right.axhline(100 * mean, color=f'C{number}', linestyle=':', linewidth=1)
    left.set_ylabel(f'AP of {newcomer}')
    right.set_ylabel('mean AP of the domains before')
    right.set_title('dotted: before adapting', fontsize=9)
    for axes in (left, right):
        axes.set_xticks(range(len(shots)), shots)
        axes.set_xlabel(f'shots per class of {newcomer}')
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    left.legend(frameon=False)
    drawing.save(figure, path)
