"""Hierarchical (bit-scale) rounding of a fractional map, with Shmoys-Tardos slots.

GEM rounds x* bit by bit (arXiv 2604.18842, Algorithm 1); as printed that loses every entry that
is exactly 1 (see :mod:`mmdet_moe.planning.printed`). This is a bit-scale rounding that keeps its
promises:

1. Entries equal to 1 are fixed. The others are quantised, row by row, to whole numbers of units
   (2^30 units are 1) that sum to what the row still needs.
2. Each expert's entries, in order of falling demand, are cut into *slots* of 2^30 units (Shmoys
   and Tardos, Mathematical Programming 62, 1993). An entry that straddles two slots becomes a node
   of its own, row -> (row, expert) -> slots, so that a row with several copies cannot take the
   same expert twice.
3. For l = 0 ... 29, from the smallest bit up: the edges whose bit l is set form a graph in which
   every row and (row, expert) node has even degree. Walk it in trails and push 2^l units along
   each, in the direction that does not lose worth. Afterwards bit l is clear everywhere.

Rows keep their sums, a slot ends with at most one row, worth never falls. Since a slot's entry
demands at most what the slot before it averages,

    worth of the rounded map >= worth of x*   and   load_j <= sum_i s_ij x*_ij + max_i s_ij;

where the demand is the same for all rows a load ends at the floor or the ceiling of its
fractional load (in rows), so whole capacities are kept strictly.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

BITS = 30
UNIT = 1 << BITS


def hierarchical_rounding(
    x: sparse.csr_matrix, worth: np.ndarray, demand: np.ndarray, copies: np.ndarray
) -> np.ndarray:
    """Rounds a fractional map to 0/1.

    Args:
        x: (m, n) entries in [0, 1], rows summing to ``copies`` (up to solver tolerance).
        worth: (m, n), larger is better.
        demand: (m, n).
        copies: (m,) int64.

    Returns:
        Boolean array (m, n) with exactly ``copies`` true entries in each row, all where x > 0.
    """
    entries = sparse.coo_matrix(x)
    order = np.lexsort((entries.col, entries.row))
    rows, columns, values = entries.row[order], entries.col[order], entries.data[order]
    chosen = np.zeros(x.shape, dtype=bool)
    whole = values >= 1
    chosen[rows[whole], columns[whole]] = True
    rows, columns, values = rows[~whole], columns[~whole], values[~whole]
    need = copies - chosen.sum(axis=1)
    units = quantise(rows, values, worth[rows, columns], need)
    full = units == UNIT
    chosen[rows[full], columns[full]] = True
    keep = (units > 0) & ~full
    rows, columns, units = rows[keep], columns[keep], units[keep]
    if len(rows):
        taken = _round_slots(
            rows, columns, units, worth[rows, columns], demand[rows, columns], x.shape[0]
        )
        chosen[rows[taken], columns[taken]] = True
    return chosen


def quantise(
    rows: np.ndarray, values: np.ndarray, worth: np.ndarray, need: np.ndarray
) -> np.ndarray:
    """Whole units per entry, rows summing to ``need[row] * 2^30``, no entry above 2^30.

    Entries are rounded down and what is left goes to a row's best entries: no worth is lost.

    Args:
        rows: (k,) sorted row indices.
        values: (k,) in [0, 1).
        worth: (k,).
        need: (m,) whole numbers.

    Returns:
        (k,) int64.
    """
    sums = np.bincount(rows, weights=values, minlength=len(need))
    scale = np.divide(need, sums, out=np.ones(len(need)), where=sums > 0)
    units = np.minimum(np.floor(values * scale[rows] * UNIT), UNIT).astype(np.int64)
    done = np.zeros(len(need), dtype=np.int64)
    np.add.at(done, rows, units)
    left = need.astype(np.int64) * UNIT - done
    for k in np.lexsort((-worth, rows)).tolist():  # per row, best first
        row = rows[k]
        if left[row]:
            # left < 0 where scaling up overshot: take back from the best (they are the largest)
            change = min(max(left[row], -units[k]), UNIT - units[k])
            units[k] += change
            left[row] -= change
    return units


def _round_slots(
    rows: np.ndarray,
    columns: np.ndarray,
    units: np.ndarray,
    worth: np.ndarray,
    demand: np.ndarray,
    m: int,
) -> np.ndarray:
    """Which of the fractional entries are taken (steps 2 and 3 of the module's docstring)."""
    # cut every expert's entries into slots, largest demand first
    order = np.lexsort((rows, -demand, columns))
    first_of_expert = np.r_[True, columns[order][1:] != columns[order][:-1]]
    total = np.cumsum(units[order])
    start = total - units[order]
    base = np.maximum.accumulate(np.where(first_of_expert, start, 0))
    start, stop = start - base, total - base
    first_slot, last_slot = start // UNIT, (stop - 1) // UNIT
    slots_before = np.cumsum(np.where(first_of_expert, np.r_[0, last_slot[:-1] + 1], 0))

    # nodes: rows, then slots, then one for each straddling entry
    tails: list[int] = []
    heads: list[int] = []
    value: list[int] = []
    weight: list[float] = []
    entry_edge = [0] * len(rows)
    slots = int(slots_before[-1] + last_slot[-1] + 1)
    node = m + slots
    for position, k in enumerate(order.tolist()):
        entry_edge[k] = len(tails)
        tails.append(int(rows[k]))
        value.append(int(units[k]))
        weight.append(float(worth[k]))
        slot = m + int(slots_before[position] + first_slot[position])
        if first_slot[position] == last_slot[position]:
            heads.append(slot)
            continue
        heads.append(node)
        before = int((first_slot[position] + 1) * UNIT - start[position])
        for target, amount in ((slot, before), (slot + 1, int(units[k]) - before)):
            tails.append(node)
            heads.append(target)
            value.append(amount)
            weight.append(0.0)
        node += 1

    incident: list[list[int]] = [[] for _ in range(node)]
    for edge, (a, b) in enumerate(zip(tails, heads, strict=True)):
        incident[a].append(edge)
        incident[b].append(edge)
    for bit in range(BITS):
        _clear_bit(1 << bit, tails, heads, value, weight, incident)
    return np.array([value[entry_edge[k]] == UNIT for k in range(len(rows))])


def _clear_bit(
    step: int,
    tails: list[int],
    heads: list[int],
    value: list[int],
    weight: list[float],
    incident: list[list[int]],
) -> None:
    """Pushes ``step`` units along trails of the edges that have this bit, until none has."""
    odd = [edge for edge, units in enumerate(value) if units & step]
    if not odd:
        return
    unused = set(odd)
    degree: dict[int, int] = {}
    for edge in odd:
        for node in (tails[edge], heads[edge]):
            degree[node] = degree.get(node, 0) + 1
    position: dict[int, int] = {}

    def walk(node: int) -> None:
        # one trail: forward along an edge adds to it, backward takes away, so that every node
        # passed keeps its balance
        trail: list[tuple[int, int]] = []
        gain = 0.0
        while True:
            edges = incident[node]
            at = position.get(node, 0)
            while at < len(edges) and edges[at] not in unused:
                at += 1
            position[node] = at
            if at == len(edges):
                break
            edge = edges[at]
            unused.remove(edge)
            sign = 1 if tails[edge] == node else -1
            trail.append((edge, sign))
            gain += sign * weight[edge]
            degree[node] -= 1
            node = heads[edge] if sign == 1 else tails[edge]
            degree[node] -= 1
        direction = step if gain >= 0 else -step
        for edge, sign in trail:
            value[edge] += sign * direction

    # trails between nodes of odd degree (slots) first; what is left then closes on itself
    for node in [node for node, d in degree.items() if d % 2]:
        if degree[node] % 2:
            walk(node)
    for edge in odd:
        if edge in unused:
            walk(tails[edge])
