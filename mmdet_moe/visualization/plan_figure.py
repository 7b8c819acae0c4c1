"""The picture of an expert plan: affinity, relaxation and map, loads against capacity.

Needs matplotlib (imported when something is drawn) and a plan; no torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from mmdet_moe.visualization.drawing import clip as _clip
from mmdet_moe.visualization.drawing import save as _save
from mmdet_moe.visualization.drawing import short as _short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mmdet_moe.planning import ExpertPlan

#: Up to so many cells a side, heat maps carry names and numbers.
NAMED, NUMBERED = 40, 16
#: Largest height of a heat map, in inches.
MAX_HEIGHT = 12.0
#: Fills of a stacked bar's parts in turn; names stand beside them, colour only parts neighbours.
FILLS = ('#4878a8', '#8fb3d6')
CAPACITY_COLOR = '#c0392b'
MAP_COLOR = '#d95f02'


def draw_plan(
    plan: ExpertPlan,
    path: str | os.PathLike,
    title: str | None = None,
    unit: str | None = None,
) -> None:
    """Draws a plan into an image file.

    Three panels: the affinity w (m datasets x n experts), the relaxed optimum x*, both with the
    map outlined on top, and each expert's load, dataset by dataset, against its capacity. Rows are
    sorted by expert, so that datasets which share one stand together.

    Args:
        plan: The plan.
        path: Where to write; the suffix (``.png``, ``.pdf``, ``.svg``) says what. Written
            atomically.
        title: Line on top; by default the certificate in short.
        unit: What demands and capacities count ('images', ...), for the label.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
        ValueError: If matplotlib does not know the suffix.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _order(plan)
    m, n = len(rows), len(plan.experts)
    label = max(len(name) for name in plan.datasets) if m <= NAMED else 0
    width = float(np.clip(n * (0.62 if n <= NUMBERED else 0.22), 2.4, 9.0))
    height = max(m * (0.42 if m <= NUMBERED else 0.22), n * (0.3 if n <= NAMED else 0.12))
    height = float(np.clip(height, 2.4, MAX_HEIGHT))
    margin = 0.5 + 0.085 * min(label, 30)
    figure = Figure(figsize=(margin + 2 * width + 5.4, height + 1.5), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, width_ratios=[width, width, 3.8])
    _heat_map(figure, axes[0], plan, rows, plan.affinity[rows], 'affinity $w$', cmap='viridis')
    _heat_map(
        figure,
        axes[1],
        plan,
        rows,
        plan.fractional_matrix()[rows],
        'relaxation $x^*$',
        cmap='Blues',
        limits=(0, 1),
        named=False,
    )
    _loads(axes[2], plan, rows, unit)
    figure.suptitle(_certificate(plan) if title is None else title, fontsize=10)
    _save(figure, path)


def _order(plan: ExpertPlan) -> list[int]:
    """Rows sorted by the experts that serve them, then by name."""
    weights = plan.weights_matrix()
    served = [tuple(np.flatnonzero(row)) for row in weights]
    return sorted(range(len(plan.datasets)), key=lambda i: (served[i], plan.datasets[i]))


def _heat_map(
    figure: Figure,
    axis: Axes,
    plan: ExpertPlan,
    rows: list[int],
    values: np.ndarray,
    title: str,
    cmap: str,
    limits: tuple[float, float] | None = None,
    named: bool = True,
) -> None:
    from matplotlib.patches import Rectangle

    m, n = values.shape
    low, high = limits or (float(values.min()), float(values.max()))
    if high <= low:
        low, high = low - 0.5, high + 0.5
    image = axis.imshow(
        values, cmap=cmap, vmin=low, vmax=high, aspect='auto', interpolation='nearest'
    )
    chosen = plan.weights_matrix()[rows] > 0
    if max(m, n) <= NUMBERED:
        for i in range(m):
            for j in range(n):
                red, green, blue, _ = image.cmap(image.norm(values[i, j]))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
                quiet = values[i, j] == 0 and limits is not None
                axis.text(
                    j,
                    i,
                    _short(values[i, j]),
                    ha='center',
                    va='center',
                    fontsize=8,
                    color='0.7' if quiet else 'white' if dark else 'black',
                )
    for j, first, last in _runs(chosen, merge=m > NUMBERED):
        axis.add_patch(
            Rectangle(
                (j - 0.47, first - 0.47), 0.94, last - first + 0.94, fill=False, ec=MAP_COLOR, lw=2
            )
        )
    axis.set_title(f'{title}, map outlined', fontsize=9)
    if n <= NAMED:
        axis.set_xticks(range(n), plan.experts, fontsize=8, rotation=90 if n > NUMBERED else 0)
    else:
        axis.set_xlabel(f'{n} experts', fontsize=8)
    if not named:
        axis.set_yticks([])
    elif m <= NAMED:
        axis.set_yticks(range(m), [_clip(plan.datasets[i]) for i in rows], fontsize=8)
    else:
        axis.set_ylabel(f'{m} datasets, sorted by expert', fontsize=8)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def _runs(chosen: np.ndarray, merge: bool) -> list[tuple[int, int, int]]:
    """The map's cells as (column, first row, last row); neighbours in a column merged or not."""
    runs = []
    for j, column in enumerate(chosen.T):
        for i in np.flatnonzero(column).tolist():
            if merge and runs and runs[-1][0] == j and runs[-1][2] == i - 1:
                runs[-1] = (j, runs[-1][1], i)
            else:
                runs.append((j, i, i))
    return runs


def _loads(axis: Axes, plan: ExpertPlan, rows: list[int], unit: str | None) -> None:
    """Horizontal bars: what each expert carries, in parts, and a mark at its capacity."""
    chosen = plan.weights_matrix() > 0
    n = len(plan.experts)
    shown = np.where(np.isfinite(plan.capacity), plan.capacity, 0)
    limit = 1.06 * max(float(plan.loads().max()), float(shown.max()), 1e-12)
    loads = plan.loads()
    # Too many parts would be a hatch: then each load is one bar.
    whole = n > NAMED or int(chosen.sum(axis=0).max()) > 12
    for j in range(n):
        left = 0.0
        if whole:
            axis.barh(j, loads[j], color=FILLS[0], height=0.72)
            continue
        for part, i in enumerate(i for i in rows if chosen[i, j]):
            size = float(plan.demand[i, j])
            axis.barh(j, size, left=left, color=FILLS[part % 2], height=0.72)
            name = _clip(plan.datasets[i], 16)
            if n <= NUMBERED and size > limit * 0.017 * (len(name) + 1):
                axis.text(
                    left + size / 2,
                    j,
                    name,
                    ha='center',
                    va='center',
                    fontsize=7.5,
                    color='white' if part % 2 == 0 else 'black',
                )
            left += size
    for j, capacity in enumerate(plan.capacity.tolist()):
        axis.plot([capacity] * 2, [j - 0.45, j + 0.45], color=CAPACITY_COLOR, lw=2)
    axis.set_xlim(0, limit)
    axis.set_ylim(n - 0.5, -0.5)
    if n <= NAMED:
        axis.set_yticks(range(n), plan.experts, fontsize=8)
    else:
        axis.set_yticks([])
        axis.set_ylabel(f'{n} experts', fontsize=8)
    axis.tick_params(axis='y', length=0)
    axis.tick_params(axis='x', labelsize=7)
    of = f' in {unit}' if unit else ''
    axis.set_title(f'load{of} (bars) and capacity (red)', fontsize=9)
    for side in ('top', 'right', 'left'):
        axis.spines[side].set_visible(False)


def _certificate(plan: ExpertPlan) -> str:
    known: dict[str, Any] = plan.certificate
    proof = 'proven optimal' if known['optimal'] else f'gap {known["gap"]:.2%}'
    size = f'{len(plan.datasets)} datasets on {len(plan.experts)} experts'
    return f'{size}: value {known["value"]:.4g}, bound {known["upper_bound"]:.4g} ({proof})'
