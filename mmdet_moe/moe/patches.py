r"""Maps cut into a g x g grid of patches that are routed separately, as in PatchConvMoE.

**What is cut.** Output rows and columns are shared out as evenly as they go, patch i of n places
takes :math:`[\lfloor i n/g \rfloor, \lfloor (i+1) n/g \rfloor)`: any size of at least g works.
A patch comes with what its outputs depend on: a halo of r input places on each side, r the reach of
the expert's convolutions. Windows that would stick out are moved inside, where all have one size:
the window's border is then either the map's own, at which the expert pads as the dense module does,
or r places away from any output that is kept. So equal experts compute what the dense module does,
padding and strides (s divides every offset) included; norms in evaluation mode, that is, for batch
statistics are of the windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Patches:
    """A g x g grid.

    Attributes:
        grid: g.
        halo: r, in input places.
        stride: s of the experts: n input places become ceil(n / s) outputs.
    """

    grid: int
    halo: int = 0
    stride: int = 1

    @property
    def per_image(self) -> int:
        """Patches per map."""
        return self.grid**2

    def cut(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) to (B·g·g, C, h, w), image-major, then by row; halos included."""
        return _windows(maps, self.grid, self.halo, self.stride)

    def cut_bare(self, maps: Tensor) -> Tensor:
        """The patches without their halos, for the router. Where g does not divide a side, those
        that would be smaller by one place overlap a neighbour."""
        return _windows(maps, self.grid, 0, 1)

    def join(self, patches: Tensor, maps: Tensor) -> Tensor:
        """The experts' outputs (B·g·g, C', h', w') put together to (B, C', H', W').

        Args:
            patches: Outputs for :meth:`cut`'s windows.
            maps: What was cut.
        """
        sides = [spans(size, self.grid, self.halo, self.stride) for size in maps.shape[-2:]]
        kept = [
            [slice(a - start // self.stride, b - start // self.stride) for start, a, b in side]
            for side, _ in sides
        ]
        parts = patches.reshape(-1, self.grid, self.grid, *patches.shape[1:])
        rows = [
            torch.cat([parts[:, i, j, :, y, x] for j, x in enumerate(kept[1])], dim=-1)
            for i, y in enumerate(kept[0])
        ]
        return torch.cat(rows, dim=-2)


def spans(
    size: int, grid: int, halo: int = 0, stride: int = 1
) -> tuple[list[tuple[int, int, int]], int]:
    """Where the windows of one side are.

    Args:
        size: Input places of the side.
        grid: g.
        halo: r.
        stride: s.

    Returns:
        For each patch the first input place of its window, and the outputs [a, b) it gives; then
        the length of every window.

    Raises:
        ValueError: If there are fewer outputs than patches.

    Example:
        >>> spans(9, grid=2, halo=1)  # outputs 0-3 and 4-8; windows 0-6 and 2-8
        ([(0, 0, 4), (2, 4, 9)], 7)
    """
    outputs = -(-size // stride)
    if outputs < grid:
        raise ValueError(
            f'grid={grid} cannot cut {outputs} places ({size} with stride {stride}) into patches'
        )
    bounds = [i * outputs // grid for i in range(grid + 1)]
    pieces = list(zip(bounds, bounds[1:], strict=False))
    # Aligned to the stride, so that the window's outputs are the map's.
    firsts = [(a * stride - halo) // stride * stride for a, _ in pieces]
    ends = [(b - 1) * stride + halo + 1 for _, b in pieces]
    length = max(end - first for first, end in zip(firsts, ends, strict=True))
    length = min(size, length + (size - length) % stride)
    starts = [min(max(0, first), size - length) for first in firsts]
    return [(start, a, b) for start, (a, b) in zip(starts, pieces, strict=True)], length


def _windows(maps: Tensor, grid: int, halo: int, stride: int) -> Tensor:
    (rows, height), (columns, width) = (spans(size, grid, halo, stride) for size in maps.shape[-2:])
    windows = [maps[:, :, y : y + height, x : x + width] for y, _, _ in rows for x, _, _ in columns]
    return torch.stack(windows, dim=1).flatten(0, 1)
