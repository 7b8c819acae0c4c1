"""Pictures of what experts do. Arrays in, an image file out; matplotlib is imported when drawing.

Axes: E experts, R groups (classes, domains, levels, sizes). Experts are called e0, e1, ... and keep
their colour in all pictures; the colours differ for colour-blind eyes, and the name always stands
beside them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmdet_moe.visualization.drawing import clip, save, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's colours without yellow and black, then Tol's muted ones.
COLORS = (
    '#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#7F7F7F', '#332288',
    '#999933', '#882255', '#44AA99', '#AA4499', '#117733', '#DDCC77', '#661100', '#88CCEE',
)  # fmt: skip
DASHES = ('-', '--', ':', '-.')
#: Numbers stand in the cells of heat maps of so many rows and columns at most.
NUMBERED_ROWS, NUMBERED_COLUMNS = 40, 16
THUMB = 48

Path = str | os.PathLike


def expert_color(expert: int) -> str:
    """The colour of an expert; there are sixteen."""
    return COLORS[expert % len(COLORS)]


def expert_names(count: int) -> list[str]:
    """e0, e1, ..."""
    return [f'e{e}' for e in range(count)]


# --------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------


def draw_utilisation(
    path: Path, mean_weight: Sequence[float], utilisation: Sequence[float], title: str
) -> None:
    """Bars per expert: mean combine weight, and the share of items that took it.

    Args:
        path: Where to write.
        mean_weight: (E,).
        utilisation: (E,).
        title: On top.
    """
    count = len(mean_weight)
    figure = _figure(max(5.8, 1.8 + 0.55 * count), 3.2)
    axis = figure.subplots()
    x = np.arange(count)
    colors = [expert_color(e) for e in range(count)]
    axis.bar(x - 0.2, mean_weight, 0.38, color=colors, label='mean weight')
    axis.bar(
        x + 0.2,
        utilisation,
        0.38,
        color='white',
        edgecolor=colors,
        hatch='///',
        label='share of items that took it',
    )
    even = sum(mean_weight) / count
    axis.axhline(even, color='0.3', lw=1, ls='--', label=f'even weight {short(even)}')
    axis.set_xticks(x, expert_names(count))
    axis.set_ylim(0, max(*mean_weight, *utilisation, 1e-6) * 1.08)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc='outside lower center', ncols=3)
    _plain(axis, title)
    save(figure, path)


def draw_pairs(path: Path, pairs: np.ndarray, title: str) -> None:
    """How often two experts take one item, as a share of the items of the row's expert.

    Args:
        path: Where to write.
        pairs: (E, E) numbers of items; on the diagonal, of each expert.
        title: On top.
    """
    pairs = np.asarray(pairs, dtype=np.float64)
    own = np.diag(pairs)
    share = pairs / np.maximum(own, 1)[:, None]
    np.fill_diagonal(share, np.nan)
    names = expert_names(len(pairs))
    rows = [f'{name} ({int(n)})' for name, n in zip(names, own, strict=True)]
    figure = _figure(2.6 + 0.5 * len(pairs), 1.5 + 0.42 * len(pairs))
    axis = figure.subplots()
    _heat(figure, axis, share, rows, names, limits=(0, 1))
    axis.set_xlabel('also takes it', fontsize=8)
    axis.set_ylabel('expert (its items)', fontsize=8)
    axis.set_title(title, fontsize=9)
    save(figure, path)


def draw_groups(
    path: Path,
    names: Sequence[str],
    mean: np.ndarray,
    number: Sequence[float],
    special: Sequence[float],
    title: str,
) -> None:
    """Mean weight of each group's members, sorted by specialisation, and that as bars.

    Groups stand with the expert that they take more than others do, the most special first.

    Args:
        path: Where to write.
        names: R names.
        mean: (R, E) mean weights.
        number: (R,) members.
        special: (R,) specialisation in nats.
        title: On top.
    """
    mean = np.asarray(mean, dtype=np.float64)
    order = specialised_order(mean, number, special)
    rows = [f'{clip(names[r], 24)} ({_count(number[r])})' for r in order]
    height = max(1.9, 1.0 + len(rows) * (0.24 if len(rows) <= NUMBERED_ROWS else 0.135))
    label = 0.075 * max(len(row) for row in rows)
    columns = mean.shape[1]
    figure = _figure(label + 3.4 + 0.42 * columns, height)
    axis, bars = figure.subplots(1, 2, width_ratios=[0.42 * columns + 0.6, 1.5], sharey=True)
    _heat(figure, axis, mean[order], rows, expert_names(columns))
    bars.barh(range(len(rows)), np.asarray(special)[order], color='0.45', height=0.7)
    bars.tick_params(axis='y', length=0, labelleft=False)
    bars.tick_params(axis='x', labelsize=7)
    bars.set_xlabel('specialisation (nats)', fontsize=8)
    bars.set_xlim(0, max(*special, 1e-3) * 1.1)
    for side in ('top', 'right'):
        bars.spines[side].set_visible(False)
    figure.suptitle(title, fontsize=9)
    save(figure, path)


def specialised_order(
    mean: np.ndarray, number: Sequence[float], special: Sequence[float]
) -> list[int]:
    """Rows by the expert with the largest excess over the average, the most special first.

    Args:
        mean: (R, E) mean weights.
        number: (R,) members.
        special: (R,) specialisation.
    """
    counts = np.asarray(number, dtype=np.float64)[:, None]
    average = (mean * counts).sum(0) / max(counts.sum(), 1e-300)
    expert = (mean - average).argmax(1)
    return sorted(range(len(mean)), key=lambda r: (expert[r], -special[r], r))


def draw_sizes(
    path: Path, panels: Mapping[str, tuple[Sequence[str], np.ndarray]], title: str
) -> None:
    """Heat maps side by side, rows as they come: expert x level beside expert x area.

    Args:
        path: Where to write.
        panels: Short title -> (R names, (R, E) mean weights).
        title: On top.
    """
    columns = next(iter(panels.values()))[1].shape[1]
    cell = 0.44 if columns <= 8 else 0.34
    # The long panel below the others where a row of three would be too wide for a page.
    lines = [list(panels)] if columns <= 8 else [list(panels)[:2], list(panels)[2:]]
    lines = [line for line in lines if line]
    label = 0.07 * max(len(name) for names, _ in panels.values() for name in names)
    most = [max(len(panels[name][0]) for name in line) for line in lines]
    width = len(lines[0]) * (1.1 + cell * columns + label)
    figure = _figure(width, 0.8 + sum(0.7 + 0.27 * max(rows, 4) for rows in most))
    axes = figure.subplot_mosaic(
        [[line[i * len(line) // len(lines[0])] for i in range(len(lines[0]))] for line in lines],
        height_ratios=[max(rows, 4) for rows in most],
    )
    high = max(float(np.nanmax(values)) for _, values in panels.values())
    for name, (rows, values) in panels.items():
        bar = any(name == line[-1] for line in lines)
        _heat(figure, axes[name], values, rows, expert_names(columns), limits=(0, high), bar=bar)
        axes[name].set_title(name, fontsize=8.5)
    figure.suptitle(title, fontsize=9)
    save(figure, path)


def draw_training(path: Path, iterations: Sequence[int], shares: np.ndarray, title: str) -> None:
    """Each expert's share of the importance over training.

    Args:
        path: Where to write.
        iterations: n numbers.
        shares: (n, E).
        title: On top.
    """
    figure = _figure(7.0, 3.2)
    axis = figure.subplots()
    count = shares.shape[1]
    marker = 'o' if len(iterations) < 3 else None
    for e in range(count):
        dash = DASHES[e // 4 % len(DASHES)]
        axis.plot(
            iterations,
            shares[:, e],
            color=expert_color(e),
            ls=dash,
            lw=1.6,
            marker=marker,
            label=f'e{e}',
        )
    axis.axhline(1 / count, color='0.6', lw=0.8)
    axis.set_ylim(0, None)
    axis.set_xlabel('iteration', fontsize=8)
    axis.set_ylabel('share of importance', fontsize=8)
    figure.legend(fontsize=8, frameon=False, loc='outside right center', ncols=1 + (count > 8))
    _plain(axis, title)
    save(figure, path)


def draw_ablation(
    path: Path,
    metric: str,
    learned: float,
    single: Mapping[str, float],
    equal: float | None,
    best: Mapping[int, float],
    own_k: Sequence[int] = (),
) -> None:
    """Each expert alone, equal weights, and the k best, against the router's own choice.

    Args:
        path: Where to write.
        metric: Name of what is shown.
        learned: With the router's own choice.
        single: Expert -> value.
        equal: With equal weights.
        best: k -> value.
        own_k: The routers' own k, to be marked.
    """
    panels = bool(single or equal is not None) + bool(best)
    count = len(single) + (equal is not None)
    figure = _figure(1.6 + 0.48 * (count + len(best)) + 1.2 * (panels - 1), 3.2)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    values = [learned, *single.values(), *best.values(), *([] if equal is None else [equal])]
    top = max(*values, 1e-9)
    if single or equal is not None:
        axis = axes[0]
        bars = {**single, **({} if equal is None else {'equal': equal})}
        colors = [expert_color(i) for i in range(len(single))] + ['0.6']
        axis.bar(range(len(bars)), bars.values(), color=colors[: len(bars)], width=0.7)
        axis.set_xticks(range(len(bars)), [f'{name}\n{_value(v)}' for name, v in bars.items()])
        axis.axhline(learned, color='0.2', lw=1, ls='--')
        axis.set_ylim(0, top * 1.06)
        axis.set_ylabel(metric, fontsize=8)
        _plain(axis, f'each expert alone (dashed: as routed, {_value(learned)})')
    if best:
        axis = axes[-1]
        axis.plot(list(best), list(best.values()), 'o-', color='#332288')
        axis.axhline(learned, color='0.2', lw=1, ls='--')
        for k in own_k:
            axis.axvline(k, color='0.8', lw=6, zorder=0)
        axis.set_xticks(list(best), [f'{k}\n{_value(v)}' for k, v in best.items()])
        axis.set_xlim(min(best) - 0.5, max(best) + 0.5)
        axis.set_ylim(0, top * 1.06)
        axis.set_xlabel('k' + (' (band: as trained)' if own_k else ''), fontsize=8)
        axis.set_ylabel(metric, fontsize=8)
        _plain(axis, 'the k best experts')
    save(figure, path)


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------


def thumbnail(image: np.ndarray, size: int = THUMB) -> np.ndarray:
    """The middle square of an RGB image (H, W, 3), shrunk to (size, size, 3)."""
    from PIL import Image

    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(np.ascontiguousarray(image[top : top + side, left : left + side]))
    return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))


def on_grid(points: np.ndarray) -> tuple[np.ndarray, int]:
    """A cell of a square grid for each of n points, each its own, as near to its place as possible.

    The assignment of least total squared distance, points scaled to the grid.

    Returns:
        (n, 2) row and column, and the number of cells a side.
    """
    from scipy.optimize import linear_sum_assignment

    side = math.ceil(math.sqrt(len(points) * 1.25))
    low, high = points.min(0), points.max(0)
    scaled = (points - low) / np.maximum(high - low, 1e-12) * (side - 1)
    rows, columns = np.divmod(np.arange(side * side), side)
    # y grows upwards, rows downwards.
    cells = np.stack([columns, side - 1 - rows], 1)
    cost = ((scaled[:, None] - cells[None]) ** 2).sum(2)
    _, chosen = linear_sum_assignment(cost)
    return np.stack([rows[chosen], columns[chosen]], 1), side


def draw_mosaic(
    path: Path, thumbs: Sequence[np.ndarray], points: np.ndarray, top: Sequence[int], title: str
) -> None:
    """Thumbnails at their place in the plane, framed in the colour of their top expert.

    Args:
        path: Where to write.
        thumbs: n images (s, s, 3).
        points: (n, 2) their coordinates.
        top: n experts.
        title: On top.
    """
    cells, side = on_grid(np.asarray(points, dtype=np.float64))
    frame = THUMB // 12
    step = THUMB + 2 * frame
    canvas = np.full((side * step, side * step, 3), 255, dtype=np.uint8)
    for thumb, (row, column), expert in zip(thumbs, cells.tolist(), top, strict=True):
        tile = np.empty((step - 1, step - 1, 3), dtype=np.uint8)
        tile[:] = _rgb(expert_color(expert))
        tile[frame : frame + THUMB, frame : frame + THUMB] = thumb
        canvas[row * step : (row + 1) * step - 1, column * step : (column + 1) * step - 1] = tile
    size = float(np.clip(0.36 * side, 3.5, 9.0))
    figure = _figure(size + 0.9, size + 0.5)
    axis = figure.subplots()
    axis.imshow(canvas)
    axis.set_axis_off()
    axis.set_title(title, fontsize=9)
    _expert_legend(figure, sorted(set(top)))
    save(figure, path)


def draw_preferred(
    path: Path, rows: Mapping[int, Sequence[tuple[np.ndarray, float]]], title: str
) -> None:
    """The images that each expert prefers, a row each, with their weight.

    Args:
        path: Where to write.
        rows: Expert -> (thumbnail, weight) of its images, best first; may be empty.
        title: On top.
    """
    columns = max(1, *(len(row) for row in rows.values()))
    figure = _figure(0.8 + 0.72 * columns, 0.5 + 0.86 * len(rows))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (expert, images) in zip(axes, rows.items(), strict=True):
        for place, axis in enumerate(line):
            axis.set_xticks([])
            axis.set_yticks([])
            if place < len(images):
                axis.imshow(images[place][0])
                axis.set_title(short(images[place][1]), fontsize=7, pad=2)
            for spine in axis.spines.values():
                spine.set_visible(place < len(images))
                spine.set(color=expert_color(expert), lw=2)
        text = f'e{expert}' if images else f'e{expert}: none'
        line[0].set_ylabel(text, rotation=0, ha='right', va='center', fontsize=9)
    figure.suptitle(title, fontsize=9)
    save(figure, path)


@dataclass
class BoxedImage:
    """Detections on an image.

    Attributes:
        image: RGB, (H, W, 3).
        boxes: (n, 4) x1, y1, x2, y2.
        experts: (n,) top expert of each.
        title: Above it.
    """

    image: np.ndarray
    boxes: np.ndarray
    experts: Sequence[int]
    title: str = ''


def draw_boxes(path: Path, images: Sequence[BoxedImage], title: str) -> None:
    """Detections in the colour of their top expert.

    Args:
        path: Where to write.
        images: What to show.
        title: On top.
    """
    from matplotlib.patches import Rectangle

    columns = min(4, len(images))
    lines = math.ceil(len(images) / columns)
    figure = _figure(0.9 + 3.0 * columns, 0.5 + 2.6 * lines)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, shown in zip(axes, images, strict=False):
        axis.imshow(shown.image)
        axis.set_title(shown.title, fontsize=7.5, pad=2)
        for (left, up, right, down), expert in zip(shown.boxes, shown.experts, strict=True):
            color = expert_color(expert)
            axis.add_patch(
                Rectangle((left, up), right - left, down - up, fill=False, ec=color, lw=1.4)
            )
            # In a crowd a name on each box hides the boxes.
            if len(shown.boxes) <= 12:
                axis.text(
                    left,
                    up,
                    f'e{expert}',
                    fontsize=6,
                    color='white',
                    va='bottom',
                    bbox=dict(facecolor=color, edgecolor='none', pad=0.6),
                    clip_on=True,
                )
    _expert_legend(figure, sorted({e for shown in images for e in shown.experts}))
    figure.suptitle(title, fontsize=9)
    save(figure, path)


# --------------------------------------------------------------------------------------------------
# Parts
# --------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def _heat(
    figure: Figure,
    axis: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    limits: tuple[float, float] | None = None,
    bar: bool = True,
) -> None:
    """A heat map with names and, where there is room, numbers; NaN stays empty."""
    low, high = limits or (0.0, float(np.nanmax(values)))
    high = high if high > low else low + 1.0
    image = axis.imshow(values, cmap='viridis', vmin=low, vmax=high, aspect='auto')
    small = len(rows) > NUMBERED_ROWS
    if not small and len(columns) <= NUMBERED_COLUMNS:
        for (r, c), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = (value - low) / (high - low) < 0.6
                color = 'white' if dark else 'black'
                axis.text(c, r, _cell(value), ha='center', va='center', fontsize=7, color=color)
    axis.set_xticks(range(len(columns)), columns, fontsize=8)
    axis.set_yticks(range(len(rows)), rows, fontsize=6.5 if small else 8)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    if bar:
        scale = figure.colorbar(
            image, ax=axis, fraction=0.05, pad=0.02, aspect=8 * figure.get_figheight()
        )
        scale.ax.tick_params(labelsize=7)
        scale.outline.set_visible(False)


def _expert_legend(figure: Figure, experts: Sequence[int]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=expert_color(e), label=f'e{e}') for e in experts]
    if handles:
        figure.legend(handles=handles, fontsize=8, frameon=False, loc='outside right center')


def _plain(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=8)
    for side in ('top', 'right'):
        axis.spines[side].set_visible(False)


def _rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.uint8)


def _cell(value: float) -> str:
    """Two decimals without the leading zero."""
    return f'{value:.2f}'.replace('0.', '.', 1) if value >= 0.005 else '0'


def _value(value: float) -> str:
    """Three digits: APs of experts differ in the third."""
    return f'{value:.3f}' if abs(value) < 1 else f'{value:.3g}'


def _count(number: Any) -> str:
    return f'{number / 1000:.0f}k' if number >= 10000 else f'{number:.0f}'
