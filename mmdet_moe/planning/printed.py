"""GEM's Algorithm 1 as printed, with its fallback: a documented baseline, not the default.

    bits b_ij^l = floor(2^l x*_ij) mod 2,  l = 1 .. L,  L = ceil(log2 m)
    for l = 1 .. L: candidates with b_ij^l = 1 become assignments within the remaining capacity
    fallback (Algorithm 2): what is left goes to the best expert that still has room

The fraction bits of x* = 1 are all zero, so the loop drops exactly the certain assignments: with
m = 3, n = 2, c = (2, 2) and w = [[1, 0], [1, 0], [0, 1]] it returns the empty map, where the
optimum is 3. And since the unit problem's constraints are totally unimodular, every vertex of its
relaxation is 0/1, so that this is the normal case and the fallback does all the work.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import sparse

from mmdet_moe.planning.plan import LOAD_TOLERANCE


def printed_rounding(
    x: sparse.csr_matrix,
    worth: np.ndarray,
    demand: np.ndarray,
    capacity: np.ndarray,
    copies: np.ndarray,
    fallback: bool = True,
) -> np.ndarray:
    """Algorithm 1 as printed.

    Args:
        x: (m, n) fractional map.
        worth: (m, n); candidates of one level go in order of falling worth.
        demand: (m, n), ``capacity`` (n,), ``copies`` (m,).
        fallback: Whether Algorithm 2 assigns what Algorithm 1 leaves.

    Returns:
        Boolean array (m, n). Rows may be short of their copies: without the fallback, and with it
        where no expert has room left.
    """
    m, n = worth.shape
    chosen = np.zeros((m, n), dtype=bool)
    room = capacity * (1 + LOAD_TOLERANCE)
    left = copies.copy()

    def assign(i: int, j: int) -> None:
        chosen[i, j] = True
        room[j] -= demand[i, j]
        left[i] -= 1

    entries = sparse.coo_matrix(x)
    for level in range(1, max(1, math.ceil(math.log2(m))) + 1 if m > 1 else 1):
        bit = np.floor(entries.data * 2.0**level).astype(np.int64) % 2 == 1
        rows, columns = entries.row[bit], entries.col[bit]
        for k in np.lexsort((columns, rows, -worth[rows, columns])).tolist():
            i, j = int(rows[k]), int(columns[k])
            if left[i] and not chosen[i, j] and demand[i, j] <= room[j]:
                assign(i, j)
    if fallback:
        for i in np.flatnonzero(left).tolist():
            for j in np.argsort(-worth[i], kind='stable').tolist():
                if left[i] and not chosen[i, j] and demand[i, j] <= room[j]:
                    assign(i, j)
    return chosen
