"""The planning problem: who is to be served, by whom, at what worth and within what limits.

    maximise    sum_ij w_ij x_ij - move_penalty * (number of experts a dataset is moved to)
    subject to  sum_j x_ij = r_i                        r_i experts serve dataset i (``copies``)
                l_j <= sum_i s_ij x_ij <= c_j           ``min_load``, ``demand``, ``capacity``
                sum_{i in G} x_ij <= 1                  for each group G of ``separate``, all j
                x_ij = x_kj                             for i, k in one group of ``together``
                x_ij in {0, 1}

The paper (arXiv 2604.18842) has s = 1, r = 1 and integer c, where the LP relaxation is already
0/1; demands, copies, floors and groups are what make it a planning problem.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmdet_moe.planning import checks
from mmdet_moe.planning.checks import number
from mmdet_moe.planning.errors import InfeasibleError, PlanError
from mmdet_moe.planning.plan import LOAD_TOLERANCE, ExpertPlan, demand_matrix, expert_names

_REQUIRED = ('datasets', 'experts', 'affinity')
_OPTIONAL = (
    'demand',
    'capacity',
    'min_load',
    'copies',
    'separate',
    'together',
    'previous',
    'move_penalty',
)


@dataclass(eq=False)
class PlanningProblem:
    """A checked planning problem. Plain lists and numbers are taken and turned into arrays.

    Args:
        datasets: The m names of what is to be served (datasets, or classes).
        experts: The n names of the experts, or their number (``e0``, ``e1`` ...).
        affinity: (m, n) finite numbers, larger is better.
        demand: s: one number, m numbers or (m, n) numbers, none negative. Default 1.
        capacity: c: one number, n numbers, or None for the default rule: ceil(sum r / n) where
            every demand is the same; otherwise the first of max(even share, largest demand) x
            1.10, 1.15, 1.20 ... that has a map.
        min_load: l: one number or n numbers, default 0.
        copies: r: how many experts serve a dataset, one whole number or m of them, default 1.
        separate: Groups of datasets no two of which may share an expert.
        together: Groups of datasets that must be served by the same experts.
        previous: The plan to move away from as little as pays (a plan, its dict, or its path).
        move_penalty: p >= 0: affinity that serving a dataset of ``previous`` with one expert it
            did not have must gain to be worth it.

    After construction ``affinity`` and ``demand`` have shape (m, n), ``min_load`` (n,),
    ``copies`` (m,) int64, and ``capacity`` is (n,) or None.

    Raises:
        PlanError: If an input is bad; names the culprit.

    Example:
        >>> problem = PlanningProblem(['a', 'b', 'c'], 2, [[1, 0], [1, 0], [0, 1]])
        >>> problem.experts
        ('e0', 'e1')
    """

    # the types are those after construction; what is taken is in the docstring
    datasets: tuple[str, ...]
    experts: tuple[str, ...]
    affinity: np.ndarray
    demand: np.ndarray = 1.0  # type: ignore[assignment]
    capacity: np.ndarray | None = None
    min_load: np.ndarray = 0.0  # type: ignore[assignment]
    copies: np.ndarray = 1  # type: ignore[assignment]
    separate: tuple[tuple[str, ...], ...] = ()
    together: tuple[tuple[str, ...], ...] = ()
    previous: ExpertPlan | None = None
    move_penalty: float = 0.0

    def __post_init__(self) -> None:
        self.datasets = checks.names_of(self.datasets, 'datasets')
        self.experts = expert_names(self.experts)
        self.affinity = checks.matrix(self.affinity, self.datasets, self.experts, 'affinity')
        with np.errstate(over='ignore'):
            spread = self.affinity.max() - self.affinity.min()
        if not np.isfinite(spread):
            raise PlanError('affinity: the spread between its entries is too large for a float')
        self.demand = demand_matrix(
            1.0 if self.demand is None else self.demand, self.datasets, self.experts
        )
        if self.capacity is not None:
            self.capacity = checks.vector(self.capacity, self.experts, 'capacity', 'expert', 0)
        self.min_load = checks.vector(
            0.0 if self.min_load is None else self.min_load,
            self.experts,
            'min_load',
            'expert',
            0,
        )
        self.copies = self._checked_copies(1 if self.copies is None else self.copies)
        self.separate = self._groups(self.separate, 'separate')
        self.together = self._groups(self.together, 'together')
        self._check_contradictions()
        self.previous = self._read_previous(self.previous)
        self.move_penalty = checks.scalar(
            0.0 if self.move_penalty is None else self.move_penalty, 'move_penalty', 0
        )

    # ------------------------------------------------------------------ reading and writing
    @classmethod
    def from_file(cls, path: str | os.PathLike) -> PlanningProblem:
        """Reads a problem file; a relative ``previous`` is looked for beside it first.

        Raises:
            PlanError: If the file cannot be read, is not JSON or is not a valid problem.
        """
        data = checks.read_json(path, 'problem file')
        if isinstance(data, Mapping) and isinstance(data.get('previous'), str):
            beside = Path(path).parent / data['previous']
            if beside.exists():
                data = {**data, 'previous': str(beside)}
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PlanningProblem:
        """Builds a problem from the problem file's JSON object."""
        checks.check_keys(data, _REQUIRED, _OPTIONAL, 'problem')
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """The problem file's JSON object (a previous plan is put in whole)."""
        constant = (self.demand == self.demand[:, :1]).all()
        return {
            'datasets': list(self.datasets),
            'experts': list(self.experts),
            'affinity': self.affinity.tolist(),
            'demand': (self.demand[:, 0] if constant else self.demand).tolist(),
            'capacity': None if self.capacity is None else self.capacity.tolist(),
            'min_load': self.min_load.tolist(),
            'copies': self.copies.tolist(),
            'separate': [list(group) for group in self.separate],
            'together': [list(group) for group in self.together],
            'previous': self.previous.to_dict() if self.previous is not None else None,
            'move_penalty': self.move_penalty,
        }

    def fingerprint(self) -> str:
        """SHA-256 of the problem, the same in whatever order its names are listed."""
        rows = sorted(range(len(self.datasets)), key=lambda i: self.datasets[i])
        columns = sorted(range(len(self.experts)), key=lambda j: self.experts[j])
        previous = None
        if self.previous is not None:
            previous = {
                name: sorted(self.previous.assignment[name]) for name in self.previous.datasets
            }
        digest = hashlib.sha256()
        names = {
            'datasets': [self.datasets[i] for i in rows],
            'experts': [self.experts[j] for j in columns],
            'capacity': self.capacity is not None,
            'separate': sorted(sorted(group) for group in self.separate),
            'together': sorted(sorted(group) for group in self.together),
            'previous': previous,
            'move_penalty': self.move_penalty,
        }
        digest.update(json.dumps(names, sort_keys=True).encode())
        capacity = np.zeros(0) if self.capacity is None else self.capacity[columns]
        for array in (
            self.affinity[np.ix_(rows, columns)],
            self.demand[np.ix_(rows, columns)],
            capacity,
            self.min_load[columns],
            self.copies[rows],
        ):
            # + 0 turns -0.0 into 0.0; '<' fixes the byte order on every machine
            digest.update(np.ascontiguousarray(array + 0).astype('<f8').tobytes())
        return digest.hexdigest()

    # ------------------------------------------------------------------ checks
    def _checked_copies(self, copies: Any) -> np.ndarray:
        names = self.datasets
        result = checks.integers(
            checks.vector(copies, names, 'copies', 'dataset', 1), names, 'copies'
        )
        n = len(self.experts)
        for name, r in zip(names, result.tolist(), strict=True):
            if r > n:
                raise PlanError(f'copies of {name!r} is {r}, but there are only {n} experts')
        return result

    def _groups(self, groups: Any, what: str) -> tuple[tuple[str, ...], ...]:
        if groups is None:
            return ()
        if isinstance(groups, (str, Mapping)) or not isinstance(groups, Sequence):
            raise PlanError(f'{what} must be a list of groups of dataset names, got {groups!r}')
        known = set(self.datasets)
        result = []
        for group in groups:
            if isinstance(group, (str, Mapping)) or not isinstance(group, Sequence):
                raise PlanError(f'{what}: each group must be a list of names, got {group!r}')
            for name in group:
                if not isinstance(name, str) or name not in known:
                    raise PlanError(checks.unknown_name(name, self.datasets, f'{what}: dataset'))
            if len(set(group)) != len(group):
                raise PlanError(f'{what}: the group {list(group)} lists a dataset twice')
            if len(group) < 2:
                raise PlanError(f'{what}: the group {list(group)} needs at least two datasets')
            result.append(tuple(group))
        return tuple(result)

    def merged(self) -> list[list[str]]:
        """Datasets as ``together`` merges them: lists of names, sorted within and among."""
        leader = {name: name for name in self.datasets}

        def find(name: str) -> str:
            while leader[name] != name:
                leader[name] = leader[leader[name]]
                name = leader[name]
            return name

        for group in self.together:
            for name in group[1:]:
                a, b = sorted((find(group[0]), find(name)))
                leader[b] = a
        members: dict[str, list[str]] = {}
        for name in sorted(self.datasets):
            members.setdefault(find(name), []).append(name)
        return [members[name] for name in sorted(members)]

    def _check_contradictions(self) -> None:
        copies = dict(zip(self.datasets, self.copies.tolist(), strict=True))
        leader = {}
        for members in self.merged():
            for name in members:
                leader[name] = members[0]
                if copies[name] != copies[members[0]]:
                    raise PlanError(
                        f'together: {members[0]!r} wants {copies[members[0]]} copies and '
                        f'{name!r} {copies[name]}; datasets kept together need the same number'
                    )
        for group in self.separate:
            seen: dict[str, str] = {}
            for name in group:
                other = seen.setdefault(leader[name], name)
                if other != name:
                    raise PlanError(
                        f'{other!r} and {name!r} are to be kept separate and together: '
                        'separate and together contradict each other'
                    )

    @staticmethod
    def _read_previous(previous: Any) -> ExpertPlan | None:
        if previous is None or isinstance(previous, ExpertPlan):
            return previous
        try:
            if isinstance(previous, Mapping):
                return ExpertPlan.from_dict(previous)
            if isinstance(previous, (str, os.PathLike)):
                return ExpertPlan.load(previous)
        except PlanError as error:
            raise PlanError(f'previous: {error}') from None
        raise PlanError(f'previous must be a plan file, got {previous!r}')

    def check_possible(self, capacity: np.ndarray) -> None:
        """Names the binding constraint of a problem that plain arithmetic proves impossible.

        Args:
            capacity: Array of shape (n,), the capacities to plan with.

        Raises:
            InfeasibleError: If no map exists for a reason that one line can give.
        """
        room = capacity * (1 + LOAD_TOLERANCE)
        for expert, low, high, limit in zip(
            self.experts,
            self.min_load.tolist(),
            capacity.tolist(),
            room.tolist(),
            strict=True,
        ):
            if low > limit:
                raise InfeasibleError(
                    f'expert {expert!r} must carry at least {number(low)} (min_load), '
                    f'its capacity is {number(high)}'
                )
        index = {name: i for i, name in enumerate(self.datasets)}
        n = len(capacity)
        least, most = 0.0, 0.0
        for members in self.merged():
            rows = [index[name] for name in members]
            need = self.demand[rows].sum(axis=0)
            copies = int(self.copies[rows[0]])
            fits = int((need <= room).sum())
            who = ' + '.join(map(repr, members[:4])) + (' ...' if len(members) > 4 else '')
            if fits == 0:
                raise InfeasibleError(
                    f'{who} needs {number(need.min())}, more than any expert can hold '
                    f'(the largest capacity is {number(capacity.max())})'
                )
            if fits < copies:
                raise InfeasibleError(
                    f'{who} wants {copies} copies, but fits on only {fits} of {n} experts'
                )
            ordered = np.sort(need)
            least += math.fsum(ordered[:copies])
            most += math.fsum(ordered[n - copies :])
        total = math.fsum(capacity)
        if least > total * (1 + LOAD_TOLERANCE):
            raise InfeasibleError(
                f'capacity {number(total)} in total, demand {number(least)}: '
                'the datasets do not fit on the experts'
            )
        floors = math.fsum(self.min_load)
        if floors > most * (1 + LOAD_TOLERANCE):
            raise InfeasibleError(
                f'min_load {number(floors)} in total, demand {number(most)}: '
                'there is not enough to give every expert its minimum'
            )
        for group in self.separate:
            wanted = sum(int(self.copies[index[name]]) for name in group)
            if wanted > n:
                raise InfeasibleError(
                    f'separate: the group {checks.short(group)} wants {wanted} different experts, '
                    f'there are {n}'
                )
