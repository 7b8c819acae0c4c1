"""Output layers whose newcomers' class rows are parameters of their own.

A matrix product with more rows differs from one with fewer in the last bits. So a domain that joins
a trained model must not lengthen the weights of those before it: its rows are a block beside them,
computed by itself and put in its place afterwards. What the old rows give stays the same to the
bit, and what is frozen is a whole tensor.

Conventions: A anchors, C channels of one anchor (classes, and the background where there is one).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RowLayout:
    """Which of the C channels of an anchor stand in which block.

    Args:
        channels: C.
        blocks: Newcomer -> its channels. All others are the layer's own.
        first: The own channels that come first, in the order that they had before any newcomer;
            the rest of the own ones follow.
    """

    def __init__(
        self, channels: int, blocks: Mapping[str, Sequence[int]], first: Sequence[int] = ()
    ) -> None:
        self.channels = channels
        self.blocks = {name: tuple(rows) for name, rows in blocks.items()}
        taken = {*first, *(row for rows in self.blocks.values() for row in rows)}
        self.own = (*first, *(row for row in range(channels) if row not in taken))
        placed = [*self.own, *(row for rows in self.blocks.values() for row in rows)]
        #: For each channel its place in the own ones followed by the blocks'.
        self.order = tuple(placed.index(row) for row in range(channels))


class _Blocks(nn.Module):
    """The dense layer cut into its own rows and ``newcomers.<name>``, a layer with a block's."""

    def __init__(self, dense: nn.Module, layout: RowLayout) -> None:
        nn.Module.__init__(self)  # past the dense layer's, whose tensors are taken as they are
        own = _rows(dense, layout.own, layout.channels)
        self.__dict__.update(own.__dict__)
        self.layout = layout
        self.newcomers = nn.ModuleDict(
            {name: _rows(dense, rows, layout.channels) for name, rows in layout.blocks.items()}
        )

    def _place(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """Join the layers' outputs, A * n_i channels along ``dim`` each, to A * C."""
        sizes = [len(self.layout.own), *map(len, self.layout.blocks.values())]
        rows = [
            part.unflatten(dim, (-1, size)) for part, size in zip(parts, sizes, strict=True) if size
        ]
        inner = dim if dim < 0 else dim + 1
        joined = torch.cat(rows, inner)
        if self.layout.order != tuple(range(self.layout.channels)):
            order = torch.tensor(self.layout.order, device=joined.device)
            joined = joined.index_select(inner, order)
        outer = dim - 1 if dim < 0 else dim
        return joined.flatten(outer, inner)

    def joined(self, key: str) -> Tensor:
        """The rows of parameter ``key`` in the order of the channels, as the dense layer's."""
        parts = [getattr(self, key), *(getattr(block, key) for block in self.newcomers.values())]
        return self._place(parts, 0)


class BlockConv2d(_Blocks, nn.Conv2d):
    """A convolution to (B, A * C, H, W), channels anchor * C + class."""

    def forward(self, x: Tensor) -> Tensor:
        own = nn.Conv2d.forward(self, x)
        return self._place([own, *(block(x) for block in self.newcomers.values())], 1)


class BlockLinear(_Blocks, nn.Linear):
    """A linear layer to (..., C)."""

    def forward(self, x: Tensor) -> Tensor:
        own = nn.Linear.forward(self, x)
        return self._place([own, *(block(x) for block in self.newcomers.values())], -1)


class BlockEmbedding(_Blocks, nn.Embedding):
    """An embedding of labels 0 .. C - 1."""

    def forward(self, labels: Tensor) -> Tensor:
        return F.embedding(labels, self.joined('weight'))


def with_blocks(dense: nn.Module, layout: RowLayout) -> nn.Module:
    """``dense`` cut into blocks; itself where there is no block.

    Args:
        dense: A ``Conv2d``, ``Linear`` or ``Embedding`` whose rows are anchor * C + channel.
        layout: The blocks.
    """
    if not layout.blocks:
        return dense
    kinds = {nn.Conv2d: BlockConv2d, nn.Linear: BlockLinear, nn.Embedding: BlockEmbedding}
    for kind, blocks in kinds.items():
        if isinstance(dense, kind):
            return blocks(dense, layout)
    raise TypeError(f'class rows are those of a Conv2d, Linear or Embedding, got {type(dense)}')


def _rows(dense: nn.Module, rows: Sequence[int], channels: int) -> nn.Module:
    """A copy of ``dense`` with some channels of each anchor. What says how many outputs it has
    (``out_features``) stays the whole's, for DINO asks the layer."""
    part = copy.deepcopy(dense)
    for key, value in dense.named_parameters(recurse=False):
        kept = value.detach().unflatten(0, (-1, channels))[:, list(rows)].flatten(0, 1)
        setattr(part, key, nn.Parameter(kept.clone(), requires_grad=value.requires_grad))
    return part
