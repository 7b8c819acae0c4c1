"""The plan file, schema 1: which experts serve which dataset, and the proof that goes with it.

The file is JSON (never pickle), written atomically and checked strictly when read; see
``docs/planner.md`` for every field.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmdet_moe.planning import checks
from mmdet_moe.planning.errors import PlanError

SCHEMA = 1
#: Relative tolerance of a load against its capacity, in plans as made and as read.
LOAD_TOLERANCE = 1e-9

_KEYS = (
    'schema',
    'datasets',
    'experts',
    'assignment',
    'fractional',
    'affinity',
    'demand',
    'capacity',
    'copies',
    'certificate',
    'prototypes',
    'fingerprint',
)
_CERTIFICATE_NUMBERS = (
    'upper_bound',
    'lp_bound',
    'value',
    'gap',
    'gap_to_spread',
    'move_cost',
    'seconds',
)
_CERTIFICATE_KEYS = (
    *_CERTIFICATE_NUMBERS,
    'loads',
    'duals',
    'method',
    'optimal',
    'stopped',
    'moves',
    'seed',
    'solver',
)
_PROTOTYPE_KEYS = ('embedder', 'dimension', 'mean', 'concentration')


@dataclass(eq=False)
class ExpertPlan:
    """An expert map with its certificate.

    Attributes:
        datasets: The m dataset names.
        experts: The n expert names.
        assignment: Per dataset the combine weights of its experts; positive, summing to 1.
        fractional: Per dataset the non-zero entries of the LP optimum x*; they sum to ``copies``.
        affinity: Array of shape (m, n), larger is better.
        demand: Array of shape (m, n): what dataset i takes of expert j (a list of m numbers in
            the file where it does not depend on the expert).
        capacity: Array of shape (n,), in the units of the demand.
        copies: Integer array of shape (m,): the number of experts that serve each dataset.
        certificate: Bounds, value, gaps, loads, duals, method ... (see ``docs/planner.md``).
        prototypes: What ``nearest`` and ``mixture`` routing of unknown domains needs, or None.
        fingerprint: SHA-256 of the planner's inputs.

    Raises:
        PlanError: If anything is missing, not finite, of the wrong length, unknown by name, or
            if an expert's load exceeds its capacity.
    """

    datasets: tuple[str, ...]
    experts: tuple[str, ...]
    assignment: dict[str, dict[str, float]]
    fractional: dict[str, dict[str, float]]
    affinity: np.ndarray
    demand: np.ndarray
    capacity: np.ndarray
    copies: np.ndarray
    certificate: dict[str, Any]
    prototypes: dict[str, Any] | None = None
    fingerprint: str = ''

    def __post_init__(self) -> None:
        self.datasets = checks.names_of(self.datasets, 'datasets')
        self.experts = checks.names_of(self.experts, 'experts')
        self.affinity = checks.matrix(self.affinity, self.datasets, self.experts, 'affinity')
        self.demand = demand_matrix(self.demand, self.datasets, self.experts)
        self.capacity = checks.vector(self.capacity, self.experts, 'capacity', 'expert', 0)
        self.copies = checks.integers(
            checks.vector(self.copies, self.datasets, 'copies', 'dataset', 1),
            self.datasets,
            'copies',
        )
        self.fractional = self._entries(self.fractional, 'fractional', zero_ok=True)
        self.assignment = self._entries(self.assignment, 'assignment', zero_ok=False)
        for name, copies in zip(self.datasets, self.copies.tolist(), strict=True):
            weights = self.assignment[name]
            total = math.fsum(weights.values())
            if abs(total - 1) > 1e-6:
                raise PlanError(
                    f'assignment of {name!r}: weights sum to {checks.number(total)}, not to 1'
                )
            if len(weights) != copies:
                raise PlanError(
                    f'assignment of {name!r} has {len(weights)} experts, copies says {copies}'
                )
            total = math.fsum(self.fractional[name].values())
            if abs(total - copies) > 1e-5:
                raise PlanError(
                    f'fractional of {name!r} sums to {checks.number(total)}, '
                    f'not to its copies, {copies}'
                )
        self._check_loads()
        self._check_certificate()
        self._check_prototypes()
        if not isinstance(self.fingerprint, str):
            raise PlanError(f'fingerprint must be a string, got {self.fingerprint!r}')

    # ------------------------------------------------------------------ reading and writing
    @classmethod
    def load(cls, path: str | os.PathLike) -> ExpertPlan:
        """Reads and checks a plan file.

        Raises:
            PlanError: If the file cannot be read, is not JSON or is not a valid plan; the
                message starts with the path.
        """
        data = checks.read_json(path, 'plan file')
        try:
            return cls.from_dict(data)
        except PlanError as error:
            raise PlanError(f'{os.fspath(path)}: {error}') from None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExpertPlan:
        """Builds a plan from the plan file's JSON object."""
        if isinstance(data, Mapping) and data.get('schema', SCHEMA) != SCHEMA:
            raise PlanError(f'plan has schema {data["schema"]!r}; this version reads {SCHEMA}')
        checks.check_keys(data, _KEYS, (), 'plan')
        return cls(**{key: data[key] for key in _KEYS if key != 'schema'})

    @classmethod
    def from_assignment(
        cls,
        assignment: Mapping[str, str | Sequence[str] | Mapping[str, float]],
        experts: Sequence[str] | int | None = None,
        prototypes: dict[str, Any] | None = None,
    ) -> ExpertPlan:
        """A plan made by hand, as DAMEX's table is: nothing is optimised and nothing is claimed.

        Args:
            assignment: Per dataset its expert, its experts (equal weights), or weights that sum
                to 1.
            experts: The experts' names in order, or their number (``e0``, ``e1`` ...). Default:
                those named in ``assignment``, sorted.
            prototypes: As in the plan file.

        Example:
            >>> ExpertPlan.from_assignment({'kitti': 'e0', 'lisa': 'e0', 'coco': 'e1'}).experts
            ('e0', 'e1')
        """
        weights: dict[str, dict[str, float]] = {}
        for name, given in assignment.items():
            if isinstance(given, str):
                given = [given]
            if not isinstance(given, Mapping):
                given = {expert: 1.0 / len(given) for expert in given}
            weights[name] = dict(given)
        if experts is None:
            experts = sorted({expert for given in weights.values() for expert in given})
        names = expert_names(experts)
        copies = [len(given) for given in weights.values()]
        index = {expert: j for j, expert in enumerate(names)}
        loads = [0.0] * len(names)
        for given in weights.values():
            for expert in given:
                if expert in index:
                    loads[index[expert]] += 1.0
        return cls(
            datasets=tuple(weights),
            experts=names,
            assignment=weights,
            fractional={name: dict.fromkeys(given, 1.0) for name, given in weights.items()},
            affinity=np.zeros((len(weights), len(names))),
            demand=np.ones(len(weights)),
            capacity=np.array(loads),
            copies=np.array(copies),
            certificate={
                'upper_bound': 0.0,
                'lp_bound': 0.0,
                'value': 0.0,
                'gap': 0.0,
                'gap_to_spread': 0.0,
                'loads': loads,
                'duals': [0.0] * len(names),
                'method': 'by hand',
                'optimal': False,
                'stopped': 'nodes',
                'moves': [],
                'move_cost': 0.0,
                'seed': 0,
                'solver': 'none',
                'seconds': 0.0,
            },
            prototypes=prototypes,
            fingerprint='by hand',
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan file's JSON object."""
        constant = (self.demand == self.demand[:, :1]).all()
        return {
            'schema': SCHEMA,
            'datasets': list(self.datasets),
            'experts': list(self.experts),
            'assignment': {name: dict(self.assignment[name]) for name in self.datasets},
            'fractional': {name: dict(self.fractional[name]) for name in self.datasets},
            'affinity': self.affinity.tolist(),
            'demand': (self.demand[:, 0] if constant else self.demand).tolist(),
            'capacity': self.capacity.tolist(),
            'copies': self.copies.tolist(),
            'certificate': dict(self.certificate),
            'prototypes': self.prototypes,
            'fingerprint': self.fingerprint,
        }

    def save(self, path: str | os.PathLike) -> None:
        """Writes the plan file atomically."""
        checks.write_atomically(path, json.dumps(self.to_dict(), allow_nan=False) + '\n')

    # ------------------------------------------------------------------ reading the map
    def experts_of(self, name: str) -> dict[str, float]:
        """The combine weights of one dataset, expert name to weight.

        Raises:
            KeyError: If the plan has no such dataset; lists those it has.
        """
        if name not in self.assignment:
            raise KeyError(f'the plan has no dataset {name!r}; it has {", ".join(self.datasets)}')
        return dict(self.assignment[name])

    def weights_matrix(self) -> np.ndarray:
        """Combine weights as an array of shape (m, n): ``datasets`` by ``experts``."""
        column = {expert: j for j, expert in enumerate(self.experts)}
        weights = np.zeros((len(self.datasets), len(self.experts)))
        for i, name in enumerate(self.datasets):
            for expert, weight in self.assignment[name].items():
                weights[i, column[expert]] = weight
        return weights

    def fractional_matrix(self) -> np.ndarray:
        """The LP optimum x* as an array of shape (m, n)."""
        column = {expert: j for j, expert in enumerate(self.experts)}
        x = np.zeros((len(self.datasets), len(self.experts)))
        for i, name in enumerate(self.datasets):
            for expert, value in self.fractional[name].items():
                x[i, column[expert]] = value
        return x

    def loads(self) -> np.ndarray:
        """Exactly summed load of every expert, shape (n,): sum of its datasets' demands."""
        return exact_loads(self.weights_matrix() > 0, self.demand)

    # ------------------------------------------------------------------ checks
    def _entries(self, data: Any, what: str, zero_ok: bool) -> dict[str, dict[str, float]]:
        if not isinstance(data, Mapping):
            raise PlanError(f'{what} must map every dataset to its experts, got {data!r}')
        known = set(self.datasets)
        for name in data:
            if name not in known:
                raise PlanError(checks.unknown_name(name, self.datasets, f'{what}: dataset'))
        missing = [name for name in self.datasets if name not in data]
        if missing:
            raise PlanError(f'{what} lacks {checks.short(missing)}')
        experts = set(self.experts)
        result = {}
        for name in self.datasets:
            row = data[name]
            if not isinstance(row, Mapping) or not row:
                raise PlanError(f'{what} of {name!r} must map experts to numbers, got {row!r}')
            for expert, value in row.items():
                if expert not in experts:
                    raise PlanError(
                        checks.unknown_name(expert, self.experts, f'{what} of {name!r}: expert')
                    )
                entry = f'{what} of {name!r} at {expert!r}'
                value = checks.scalar(value, entry, 0)
                if value > 1 + 1e-6 or (value == 0 and not zero_ok):
                    raise PlanError(f'{entry} must be in (0, 1], got {checks.number(value)}')
            result[name] = {expert: float(value) for expert, value in row.items()}
        return result

    def _check_loads(self) -> None:
        for expert, load, capacity in zip(
            self.experts, self.loads().tolist(), self.capacity.tolist(), strict=True
        ):
            if load > capacity * (1 + LOAD_TOLERANCE):
                raise PlanError(
                    f'expert {expert!r} carries {checks.number(load)}, '
                    f'its capacity is {checks.number(capacity)}'
                )

    def _check_certificate(self) -> None:
        certificate = self.certificate
        checks.check_keys(certificate, _CERTIFICATE_KEYS, (), 'certificate')
        for key in _CERTIFICATE_NUMBERS:
            checks.scalar(certificate[key], f'certificate: {key}')
        for key in ('loads', 'duals'):
            checks.vector(certificate[key], self.experts, f'certificate: {key}', 'expert')
        for key in ('method', 'solver'):
            if not isinstance(certificate[key], str):
                raise PlanError(f'certificate: {key} must be a string, got {certificate[key]!r}')
        if not isinstance(certificate['optimal'], bool):
            raise PlanError(
                f'certificate: optimal must be true or false, got {certificate["optimal"]!r}'
            )
        if certificate['stopped'] not in ('optimal', 'nodes', 'time'):
            raise PlanError(
                "certificate: stopped must be 'optimal', 'nodes' or 'time', "
                f'got {certificate["stopped"]!r}'
            )
        if not isinstance(certificate['moves'], (list, tuple)):
            raise PlanError(f'certificate: moves must be a list, got {certificate["moves"]!r}')
        checks.integer(certificate['seed'], 'certificate: seed', 0)

    def _check_prototypes(self) -> None:
        prototypes = self.prototypes
        if prototypes is None:
            return
        checks.check_keys(prototypes, _PROTOTYPE_KEYS, (), 'prototypes')
        if not isinstance(prototypes['embedder'], Mapping):
            raise PlanError(f'prototypes: embedder must be a dict, got {prototypes["embedder"]!r}')
        dimension = checks.integer(prototypes['dimension'], 'prototypes: dimension', 1)
        if checks.scalar(prototypes['concentration'], 'prototypes: concentration', 0) == 0:
            raise PlanError('prototypes: concentration must be positive, got 0')
        mean = prototypes['mean']
        if not isinstance(mean, Mapping):
            raise PlanError(f'prototypes: mean must map datasets to vectors, got {mean!r}')
        for name in mean:
            if name not in self.assignment:
                raise PlanError(
                    checks.unknown_name(name, self.datasets, 'prototypes: mean: dataset')
                )
        missing = [name for name in self.datasets if name not in mean]
        if missing:
            raise PlanError(f'prototypes: mean lacks {checks.short(missing)}')
        for name, values in mean.items():
            what = f'prototypes: mean of {name!r}'
            if not isinstance(values, (Sequence, np.ndarray)) or len(values) != dimension:
                raise PlanError(f'{what} must be a list of {dimension} numbers (dimension)')
            checks.vector(values, [str(k) for k in range(dimension)], what, 'dimension')


def expert_names(experts: Any) -> tuple[str, ...]:
    """Expert names from a list of them, or ``e0`` ... ``e{n-1}`` from their number n."""
    if checks.is_scalar(experts):
        count = checks.integer(experts, 'experts (their number)', 1)
        return tuple(f'e{j}' for j in range(count))
    return checks.names_of(experts, 'experts')


def demand_matrix(demand: Any, datasets: Sequence[str], experts: Sequence[str]) -> np.ndarray:
    """Demands as a float array (m, n), from one number, one per dataset, or one per pair."""
    nested = isinstance(demand, (Sequence, np.ndarray)) and any(
        isinstance(row, (Sequence, np.ndarray)) and not isinstance(row, str) for row in demand[:1]
    )
    if nested:
        return checks.matrix(demand, datasets, experts, 'demand', 0)
    per_dataset = checks.vector(demand, datasets, 'demand', 'dataset', 0)
    return np.repeat(per_dataset[:, None], len(experts), axis=1)


def exact_loads(chosen: np.ndarray, demand: np.ndarray) -> np.ndarray:
    """Load of every expert, summed without rounding error.

    Args:
        chosen: Boolean array of shape (m, n).
        demand: Array of shape (m, n).

    Returns:
        Array of shape (n,): load_j = sum of demand_ij over the chosen i, correctly rounded, so
        it does not depend on the order of the rows.
    """
    return np.array([math.fsum(demand[rows, j]) for j, rows in enumerate(chosen.T)])
