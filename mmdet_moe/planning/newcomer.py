"""A dataset joins a plan whose map is held: the experts of all others stay where they are."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmdet_moe.planning import checks
from mmdet_moe.planning.affinity import unit_rows
from mmdet_moe.planning.errors import InfeasibleError, PlanError
from mmdet_moe.planning.plan import LOAD_TOLERANCE, ExpertPlan, exact_loads

#: As ``expert``: one that the earlier plan has not.
NEW = 'new'


def add_newcomer(
    previous: ExpertPlan,
    name: str,
    prototypes: Mapping[str, Any],
    demand: float,
    expert: str | None = None,
) -> ExpertPlan:
    r"""The plan with one more dataset, every other dataset held on its experts.

    With all others held, the planner's problem has one row left, and its optimum is read off: the
    expert of the largest affinity among those with room. The affinity of the newcomer to an expert
    is the largest cosine of its mean embedding with those of the datasets the expert serves, both
    seen from the mean of the earlier datasets' means (from zero where there is one); -1 to an
    expert that serves nobody, 1 to a new one.

    Args:
        previous: The earlier plan, with prototypes.
        name: The newcomer.
        prototypes: Prototypes of the newcomer by the same embedder (``dataset_prototypes``).
        demand: What it takes of an expert, in the unit of the earlier demands.
        expert: The name of an earlier expert, ``'new'``, or None: the best earlier one with room,
            and a new one where none has.

    Returns:
        The plan; its experts are the earlier ones, in their order, and perhaps a new one, called
        by the first free of ``e0``, ``e1`` ..., whose capacity is the largest of the others', or
        the newcomer's demand where that is more.

    Raises:
        PlanError: The name is taken, the expert unknown, or the prototypes do not compare.
        InfeasibleError: The expert asked for has no room.
    """
    if name in previous.datasets:
        raise PlanError(f'{name!r} is in the earlier plan already: nothing is new')
    demand = checks.scalar(demand, f'demand of {name!r}', 0)
    similarity = _similarities(previous, name, prototypes)
    n = len(previous.experts)
    row = np.full(n + 1, 1.0)
    for j, known in enumerate(previous.experts):
        served = [i for i, d in enumerate(previous.datasets) if known in previous.assignment[d]]
        row[j] = max((similarity[i] for i in served), default=-1.0)
    chosen = _choose(previous, name, demand, row, expert)
    experts, capacity = previous.experts, previous.capacity
    affinity, demands = previous.affinity, previous.demand
    if chosen == NEW:
        chosen = next(e for e in (f'e{j}' for j in range(n + 1)) if e not in experts)
        experts = (*experts, chosen)
        capacity = np.append(capacity, max(float(capacity.max()), demand))
        affinity = np.column_stack([affinity, similarity])
        demands = np.column_stack([demands, demands.max(axis=1)])
    affinity = np.vstack([affinity, row[: len(experts)]])
    demands = np.vstack([demands, np.full(len(experts), demand)])
    assignment = {**previous.assignment, name: {chosen: 1.0}}
    served_by = np.array([[e in assignment[d] for e in experts] for d in assignment])
    value = math.fsum(affinity[served_by])
    numbers = dict.fromkeys(('upper_bound', 'lp_bound', 'value'), value)
    zeros = dict.fromkeys(('gap', 'gap_to_spread', 'move_cost', 'seconds'), 0.0)
    inputs = [previous.fingerprint, name, demand, expert, row.tolist()]
    return ExpertPlan(
        datasets=(*previous.datasets, name),
        experts=experts,
        assignment=assignment,
        fractional={**previous.fractional, name: {chosen: 1.0}},
        affinity=affinity,
        demand=demands,
        capacity=capacity,
        copies=np.append(previous.copies, 1),
        certificate={
            **numbers,
            **zeros,
            'loads': exact_loads(served_by, demands).tolist(),
            'duals': [0.0] * len(experts),
            'method': 'held',
            'optimal': True,
            'stopped': 'optimal',
            'moves': [],
            'seed': previous.certificate['seed'],
            'solver': 'none',
        },
        prototypes={
            **(previous.prototypes or {}),
            'mean': {**(previous.prototypes or {})['mean'], name: prototypes['mean'][name]},
        },
        fingerprint=hashlib.sha256(json.dumps(inputs).encode()).hexdigest(),
    )


def _similarities(previous: ExpertPlan, name: str, prototypes: Mapping[str, Any]) -> np.ndarray:
    """Cosine of the newcomer's mean with that of each earlier dataset, shape (m,)."""
    if previous.prototypes is None:
        raise PlanError(f'the earlier plan has no prototypes to compare {name!r} with')
    if prototypes['dimension'] != previous.prototypes['dimension']:
        raise PlanError(
            f'prototype of {name!r} has {prototypes["dimension"]} numbers, those of the earlier '
            f'plan {previous.prototypes["dimension"]}: use its embedder'
        )
    old = unit_rows(np.asarray([previous.prototypes['mean'][d] for d in previous.datasets], float))
    own = unit_rows(np.asarray([prototypes['mean'][name]], float))
    centre = old.mean(axis=0) if len(old) > 1 else np.zeros(old.shape[1])
    similarity: np.ndarray = unit_rows(old - centre) @ unit_rows(own - centre)[0]
    return similarity


def _choose(
    previous: ExpertPlan, name: str, demand: float, row: np.ndarray, expert: str | None
) -> str:
    """The newcomer's expert, or 'new'."""
    if expert == NEW:
        return NEW
    left = previous.capacity - previous.loads()
    room = left + previous.capacity * LOAD_TOLERANCE
    if expert is None:
        fits = [j for j in range(len(previous.experts)) if demand <= room[j]]
        return previous.experts[max(fits, key=lambda j: row[j])] if fits else NEW
    if expert not in previous.experts:
        raise PlanError(checks.unknown_name(expert, [NEW, *previous.experts], 'expert'))
    j = previous.experts.index(expert)
    if demand > room[j]:
        raise InfeasibleError(
            f'{name!r} needs {checks.number(demand)}, expert {expert!r} has room for '
            f'{checks.number(max(float(left[j]), 0.0))}; give it a new one'
        )
    return expert
