"""A plan as plain text: what serves what, how full the experts are, and what is proven."""

from __future__ import annotations

from collections.abc import Sequence

from mmdet_moe.planning.checks import number
from mmdet_moe.planning.plan import ExpertPlan


def summary_line(plan: ExpertPlan) -> str:
    """One line with value, bound, gap and loads."""
    proof = plan.certificate
    state = 'optimal' if proof['optimal'] else f'stopped by {proof["stopped"]}'
    shares = [
        f'{load / capacity:.0%}' if capacity > 0 else '-'
        for load, capacity in zip(proof['loads'], plan.capacity.tolist(), strict=True)
    ]
    if len(shares) > 16:
        shares = [*shares[:16], f'... ({len(shares)} experts)']
    return (
        f'value {number(proof["value"])}  bound {number(proof["upper_bound"])}  '
        f'gap {proof["gap"]:.3g} ({state})  loads {" ".join(shares)} of capacity'
    )


def plan_table(plan: ExpertPlan, rows: int = 200) -> str:
    """Tables of the map and of the experts, the moves, and the summary line.

    Args:
        plan: The plan.
        rows: Datasets to show before the rest is only counted.

    Returns:
        Text without a trailing newline.
    """
    proof = plan.certificate
    shown = []
    for i, name in enumerate(plan.datasets[:rows]):
        weights = plan.assignment[name]
        columns = [plan.experts.index(expert) for expert in weights]
        served = [
            expert if len(weights) == 1 else f'{expert} x {weight:.3g}'
            for expert, weight in weights.items()
        ]
        best = plan.experts[int(plan.affinity[i].argmax())]
        demand = ', '.join(dict.fromkeys(f'{plan.demand[i, j]:.6g}' for j in columns))
        worth = ', '.join(f'{plan.affinity[i, j]:.4g}' for j in columns)
        note = '' if best in weights else f'would like {best}'
        shown.append((name, ', '.join(served), demand, worth, note))
    parts = [text_table(('dataset', 'experts', 'demand', 'affinity', ''), shown)]
    if len(plan.datasets) > rows:
        parts.append(f'... and {len(plan.datasets) - rows} more datasets')
    members: dict[str, list[str]] = {expert: [] for expert in plan.experts}
    for name in plan.datasets:
        for expert in plan.assignment[name]:
            members[expert].append(name)
    experts = []
    for j, expert in enumerate(plan.experts):
        names = members[expert]
        listed = ', '.join(names[:6]) + (f' and {len(names) - 6} more' if len(names) > 6 else '')
        load, capacity = proof['loads'][j], float(plan.capacity[j])
        share = f'{load / capacity:.0%}' if capacity > 0 else '-'
        price = f'{proof["duals"][j]:.3g}'
        experts.append((expert, f'{load:.6g}', f'{capacity:.6g}', share, price, listed or '(idle)'))
    parts.append(text_table(('expert', 'load', 'capacity', '', 'price', 'datasets'), experts))
    if proof['moves']:
        moves = [
            (
                move['dataset'],
                ', '.join(move['from']),
                ', '.join(move['to']),
                '-' if move['gain'] is None else f'{move["gain"]:+.4g}',
            )
            for move in proof['moves']
        ]
        parts.append(text_table(('moved', 'from', 'to', 'gain'), moves))
    parts.append(summary_line(plan))
    return '\n\n'.join(parts)


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """``rows`` under ``head`` in aligned columns, without a trailing newline."""
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
    lines = [head, ['-' * width for width in widths], *rows]
    return '\n'.join(
        '  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
