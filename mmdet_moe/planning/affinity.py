"""How well each expert would suit each dataset, from embeddings or from a file.

The paper (arXiv 2604.18842) computes the affinity ``w`` on a frozen backbone and leaves open how.
Here an expert stands for a *prototype*, a direction in the space of image embeddings, and::

    w_ij = mean over the images x of dataset i of   <z(x), p_j>           (prototype)
    w_ij = -FD(images of dataset i, members of prototype j)               (frechet)

with ``z`` the unit embeddings about their grand mean (see :func:`prototype_affinity`), ``p_j`` the
unit prototypes and FD the Fréchet distance of two Gaussians (:func:`frechet_affinity`).

The prototypes come from a balanced k-means over the pooled images: dataset i brings its demand,
spread over its images, and prototype j has room for what expert j has room for. So the prototypes
are groups of datasets that *could* be served together, and the affinity leads to them. (Equal
shares instead would tear datasets up to fill every prototype: measured on five datasets, that
paired the two least similar ones; see docs/planning_from_data.md.)

Axis letters: P pooled images, N_i images of dataset i, m datasets, n experts, d dimension.

Everything here is sorted by dataset name first and seeded: the listing order does not matter.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special
from numpy.typing import NDArray

from mmdet_moe.planning import checks
from mmdet_moe.planning.errors import InfeasibleError, PlanError
from mmdet_moe.planning.plan import ExpertPlan
from mmdet_moe.planning.pricing import solve_transport_lp

Floats = NDArray[np.float64]

#: Lloyd steps of one restart; balanced assignments settle in 5 to 15.
MAX_STEPS = 50
#: Principal components the Fréchet distance is taken in.
FRECHET_COMPONENTS = 64
#: Range of the concentration kappa that :func:`dataset_prototypes` fits.
CONCENTRATIONS = (1.0, 1000.0)


@dataclass(frozen=True)
class Affinity:
    """An affinity matrix with the prototypes it was computed from.

    Attributes:
        datasets: The m dataset names, in the order they were given.
        matrix: w, shape (m, n), larger is better.
        shares: Shape (m, n): which share of dataset i's images belongs to prototype j; rows sum
            to 1.
    """

    datasets: tuple[str, ...]
    matrix: Floats
    shares: Floats


def prototype_affinity(
    embeddings: Mapping[str, Any],
    num_experts: int,
    seed: int = 0,
    *,
    demand: Any = None,
    capacity: Any = None,
    center: bool = True,
    restarts: int = 8,
) -> Affinity:
    """Mean cosine similarity of each dataset's images to each expert's prototype.

    Args:
        embeddings: Dataset name -> array of shape (N_i, d), any scale (rows are brought to
            length 1).
        num_experts: n, the number of prototypes.
        seed: Of the k-means starts.
        demand: What each dataset takes of an expert, m numbers in the order of ``embeddings``;
            equal by default.
        capacity: What each prototype has room for, one number or n, in units of the demand. By
            default the first that the planner tries: ceil(m / n) for equal demands, otherwise
            1.1 times the larger of the even share and the largest demand.
        center: Subtract the grand mean (the mean of the datasets' means) from the unit embeddings
            and bring them to length 1 again. What all images share (on a rectified layer that is
            most of the cosine) then no longer hides what sets them apart.
        restarts: Starts of the k-means; the one with the largest mean cosine is kept.

    Returns:
        The affinity, entries in [-1, 1]. Experts of equal capacity are numbered by the datasets
        that fill them, in name order.

    Raises:
        PlanError: On embeddings that are empty, ragged, not finite or zero; on fewer images than
            experts.

    Example:
        >>> right, up = [[1.0, 0.0]] * 4, [[0.0, 1.0]] * 4
        >>> prototype_affinity({'a': right, 'b': up}, 2, center=False).matrix.round(3).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    pool = _Pool(embeddings, center, demand)
    membership = _balanced_prototypes(pool, num_experts, capacity, seed, restarts)
    prototypes = unit_rows(membership.T @ (pool.mass[:, None] * pool.z))
    matrix = pool.per_dataset(pool.z @ prototypes.T)
    return Affinity(pool.given, pool.as_given(matrix), pool.as_given(pool.per_dataset(membership)))


def frechet_affinity(
    embeddings: Mapping[str, Any],
    num_experts: int,
    seed: int = 0,
    *,
    demand: Any = None,
    capacity: Any = None,
    center: bool = True,
    restarts: int = 8,
) -> Affinity:
    r"""Negative Fréchet distance of each dataset to the members of each expert's prototype.

    With means :math:`\mu` and covariances :math:`\Sigma` of the dataset's images and of the
    prototype's members (each image weighted by its membership)::

        FD = |mu_i - mu_j|^2 + tr(S_i) + tr(S_j) - 2 tr((S_i^1/2 S_j S_i^1/2)^1/2)

    (Dowson and Landau 1982). The last trace is the nuclear norm of ``S_i^1/2 S_j^1/2``. The
    covariances are shrunk towards a multiple of the identity by the oracle approximating rule
    (Chen, Wiesel, Eldar, Hero, IEEE TSP 58(10), 2010), since there are often fewer images than
    dimensions, in the leading principal components of the pooled images (at most 64).

    Unlike the cosine it sees spread: a narrow dataset inside a wide one is not at distance 0.

    Args, returns and raises as :func:`prototype_affinity`; entries are at most 0.
    """
    pool = _Pool(embeddings, center, demand)
    membership = _balanced_prototypes(pool, num_experts, capacity, seed, restarts)
    mean = pool.weight @ pool.z
    scatter = (pool.z - mean).T @ (pool.weight[:, None] * (pool.z - mean))
    axes = np.linalg.eigh(scatter)[1][:, ::-1][:, :FRECHET_COMPONENTS]
    z = (pool.z - mean) @ axes
    groups = [_gaussian(z, pool.weight * (pool.row == i)) for i in range(len(pool.names))]
    member_mass = pool.mass[:, None] * membership
    # A prototype that stayed empty is as far from a dataset as all the images together are.
    empty = member_mass.sum(axis=0) <= 1e-9 * pool.mass.sum()
    member_mass[:, empty] = pool.weight[:, None]
    members = [_gaussian(z, weight) for weight in member_mass.T]
    matrix = np.array([[-_frechet(a, b) for b in members] for a in groups])
    return Affinity(pool.given, pool.as_given(matrix), pool.as_given(pool.per_dataset(membership)))


def dataset_prototypes(
    embeddings: Mapping[str, Any], embedder: Mapping[str, Any]
) -> dict[str, Any]:
    r"""What a plan keeps to route images of unknown domain (``prototypes`` in the plan file).

    The posterior over datasets of an image with unit embedding z is taken as
    :math:`p_i \propto \exp(\kappa \langle z, \mu_i\rangle)`: a mixture of von Mises-Fisher
    densities of one concentration and equal weights. :math:`\mu_i` is the unit mean of dataset i.
    :math:`\kappa` maximises the likelihood of the images' own datasets, every dataset counting the
    same, where

    * an image is compared with the mean of the *other* images of its dataset (leave one out), and
    * the target is smoothed by Laplace's rule, (N + 1) / (N + m) for the own dataset of N images:
      datasets that are perfectly apart would otherwise ask for an infinite kappa.

    Args:
        embeddings: Dataset name -> array of shape (N_i, d), as the embedder gives them.
        embedder: The embedder's config as plain data.

    Returns:
        ``{'embedder', 'dimension': d, 'mean': {name: [d floats]}, 'concentration': kappa}``.
    """
    pool = _Pool(embeddings, center=False)
    m = len(pool.names)
    sums = np.array([pool.z[pool.row == i].sum(axis=0) for i in range(m)])
    means = unit_rows(sums)
    cosine = pool.z @ means.T
    count = np.bincount(pool.row, minlength=m).astype(float)
    many = count[pool.row] > 1
    others = unit_rows(sums[pool.row] - pool.z)
    own = np.arange(len(pool.z)), pool.row
    cosine[own] = np.where(many, (pool.z * others).sum(axis=1), cosine[own])
    target = np.repeat((1.0 / (count + m))[pool.row][:, None], m, axis=1)
    target[own] *= count[pool.row] + 1

    def loss(log_kappa: float) -> float:
        log_p = scipy.special.log_softmax(np.exp(log_kappa) * cosine, axis=1)
        return -float(pool.weight @ (target * log_p).sum(axis=1))

    kappa = 1.0
    if m > 1:
        low, high = np.log(CONCENTRATIONS)
        found = scipy.optimize.minimize_scalar(loss, bounds=(low, high), method='bounded')
        kappa = float(np.exp(found.x))
    by_name = dict(zip(pool.names, means, strict=True))
    return {
        'embedder': dict(embedder),
        'dimension': pool.z.shape[1],
        # Six digits hold every cosine to 1e-6 and keep the plan file readable.
        'mean': {name: [float(f'{v:.6g}') for v in by_name[name]] for name in pool.given},
        'concentration': float(f'{kappa:.6g}'),
    }


def load_affinity(
    path: str | os.PathLike, datasets: Sequence[str]
) -> tuple[Floats, tuple[str, ...] | None]:
    """Reads a user's own affinity matrix.

    * ``.csv``: a header ``<anything>,expert,expert,...`` and a row ``dataset,number,...`` each.
    * ``.json``: ``{"dataset": [numbers], ...}``, ``{"dataset": {"expert": number}, ...}``, or an
      object with ``datasets``, ``affinity`` and perhaps ``experts`` (as a problem or plan file).
    * ``.npy``: a bare (m, n) array; it has no names, so its rows are in the order of ``datasets``.

    Args:
        path: The file.
        datasets: The names wanted, and their order in the result.

    Returns:
        The matrix of shape (m, n), rows in the order of ``datasets``, and the experts' names where
        the file has them.

    Raises:
        PlanError: If the file cannot be read, or its names or numbers do not fit; names the
            culprit and the file.
    """
    datasets = checks.names_of(datasets, 'datasets')
    suffix = Path(path).suffix.lower()
    readers = {'.csv': _read_csv, '.json': _read_json, '.npy': _read_npy}
    if suffix not in readers:
        raise PlanError(
            f'affinity file {os.fspath(path)!r}: the name must end in {", ".join(readers)}'
        )
    try:
        names, experts, rows = readers[suffix](path, datasets)
        names = checks.names_of(names, 'affinity: datasets')
        for name in names:
            if name not in datasets:
                raise PlanError(checks.unknown_name(name, datasets, 'dataset'))
        missing = [name for name in datasets if name not in names]
        if missing:
            raise PlanError(f'no row for {checks.short(missing)}')
        if len(rows) != len(names):
            raise PlanError(f'{len(rows)} rows for {len(names)} datasets')
        if experts is None:
            width = len(rows[0]) if hasattr(rows[0], '__len__') else 0
            columns = tuple(f'e{j}' for j in range(width))
        else:
            columns = checks.names_of(experts, 'experts')
        by_name = dict(zip(names, rows, strict=True))
        matrix = checks.matrix([by_name[name] for name in datasets], datasets, columns, 'affinity')
    except PlanError as error:
        raise PlanError(f'affinity file {os.fspath(path)!r}: {error}') from None
    return matrix, None if experts is None else columns


def match_experts(
    matrix: Floats,
    datasets: Sequence[str],
    experts: Sequence[str],
    previous: ExpertPlan,
    capacity: Floats | None = None,
) -> Floats:
    """Gives prototypes to the experts of an earlier plan whose datasets they suit best.

    Prototypes computed anew come in an order of their own; without this, planning again after a
    dataset was added would move every dataset for nothing.

    Args:
        matrix: Affinity of shape (m, n).
        datasets: The m names of its rows.
        experts: The n names of its columns.
        previous: The earlier plan.
        capacity: Shape (n,): only experts of equal capacity may change places.

    Returns:
        ``matrix`` with its columns permuted: of all permutations the one in which the datasets and
        experts of the earlier plan have the largest affinity in sum.
    """
    n = len(experts)
    column = {expert: j for j, expert in enumerate(experts)}
    worth = np.zeros((n, n))  # of giving expert j prototype k
    for row, name in zip(matrix, datasets, strict=True):
        for expert, weight in previous.assignment.get(name, {}).items():
            if expert in column:
                worth[column[expert]] += weight * row
    if capacity is not None:
        worth[capacity[:, None] != capacity[None, :]] = -1e9 * (1 + np.abs(worth).max())
    # Among equals the permutation that changes least: experts without a past keep their place.
    worth += 1e-9 * (1 + np.abs(matrix).max()) * np.eye(n)
    _, order = scipy.optimize.linear_sum_assignment(worth, maximize=True)
    return matrix[:, order]


# ---------------------------------------------------------------------- the pooled images
class _Pool:
    """All images in one array, sorted by dataset name, with their masses.

    Attributes:
        z: Unit embeddings, shape (P, d), about the grand mean where asked for.
        row: Number of each image's dataset in ``names``, shape (P,).
        mass: Demand of each image's dataset over its images, shape (P,).
        weight: The same with every dataset of weight 1 / m, shape (P,).
    """

    def __init__(self, embeddings: Mapping[str, Any], center: bool, demand: Any = None) -> None:
        self.given = checks.names_of(embeddings, 'embeddings')
        self.names = tuple(sorted(self.given))
        arrays: list[Floats] = []
        for name in self.names:
            array = np.asarray(embeddings[name], dtype=np.float64)
            if array.ndim != 2 or 0 in array.shape:
                raise PlanError(
                    f'embeddings of {name!r} must have shape (images, dimension), at least one '
                    f'each, got {array.shape}'
                )
            if arrays and array.shape[1] != arrays[0].shape[1]:
                raise PlanError(
                    f'embeddings of {name!r} have {array.shape[1]} dimensions, '
                    f'those of {self.names[0]!r} {arrays[0].shape[1]}'
                )
            if not np.isfinite(array).all():
                raise PlanError(f'embeddings of {name!r} hold NaN or infinite numbers')
            if not (array != 0).any(axis=1).all():
                raise PlanError(
                    f'embeddings of {name!r} hold a zero vector, which has no direction'
                )
            arrays.append(unit_rows(array))
        counts = np.array([len(array) for array in arrays])
        given = checks.vector(1.0 if demand is None else demand, self.given, 'demand', 'dataset', 0)
        by_name = dict(zip(self.given, given.tolist(), strict=True))
        self.demand = np.array([by_name[name] for name in self.names])
        self.row = np.repeat(np.arange(len(arrays)), counts)
        self.mass = (self.demand / counts)[self.row]
        self.weight = (1 / (len(arrays) * counts))[self.row]
        self.z = np.concatenate(arrays)
        if center:
            self.z = unit_rows(self.z - self.weight @ self.z)

    def room(self, capacity: Any, n: int) -> Floats:
        """Shape (n,): what each prototype has room for; enough for all in all."""
        total = float(self.demand.sum())
        if total <= 0:
            raise PlanError('demand is 0 for every dataset: there is nothing to share out')
        if capacity is None:
            if (self.demand == self.demand[0]).all():
                capacity = float(self.demand[0]) * -(-len(self.names) // n)
            else:
                capacity = 1.1 * max(total / n, float(self.demand.max()))
        room = checks.vector(capacity, [f'e{j}' for j in range(n)], 'capacity', 'expert', 0)
        if room.sum() < total:
            raise InfeasibleError(
                f'capacity {checks.number(room.sum())} in total, demand {checks.number(total)}: '
                'the datasets do not fit on the experts'
            )
        return room

    def per_dataset(self, values: Floats) -> Floats:
        """Means of the rows of ``values`` (P, k) over each dataset's images, shape (m, k)."""
        return np.array([values[self.row == i].mean(axis=0) for i in range(len(self.names))])

    def as_given(self, rows: Floats) -> Floats:
        """Rows from name order to the caller's order."""
        position = {name: i for i, name in enumerate(self.names)}
        return rows[[position[name] for name in self.given]]


def unit_rows(a: Floats) -> Floats:
    """Rows brought to length 1; a zero row stays zero (nothing is similar to it)."""
    length = np.linalg.norm(a, axis=1, keepdims=True)
    return np.divide(a, length, out=np.zeros_like(a), where=length > 1e-12)


# ---------------------------------------------------------------------- balanced k-means
def _balanced_prototypes(
    pool: _Pool, num_experts: int, capacity: Any, seed: int, restarts: int
) -> Floats:
    """Spherical k-means in which every prototype has limited room.

    Alternates the optimal assignment within the rooms (a transport problem) with prototypes = unit
    means, from k-means++ starts. Both steps can only raise the mean cosine, so it ends.

    Returns:
        The membership of shape (P, n): rows sum to 1; all but about n rows belong to a single
        prototype.
    """
    n = checks.integer(num_experts, 'num_experts', 1)
    checks.integer(seed, 'seed', 0)
    if len(pool.z) < n:
        raise PlanError(f'{n} experts need at least {n} embedded images, got {len(pool.z)}')
    room = pool.room(capacity, n)
    best = np.zeros((len(pool.z), n))
    best_score = -np.inf
    for restart in range(max(1, restarts)):
        prototypes = _plus_plus(pool, n, np.random.default_rng([seed, restart]))
        membership, score = best, -np.inf
        for _ in range(MAX_STEPS):
            trial = _assign(pool.z @ prototypes.T, pool.mass, room)
            sums = trial.T @ (pool.mass[:, None] * pool.z)
            new = float(np.linalg.norm(sums, axis=1).sum() / pool.mass.sum())
            if new <= score + 1e-9:
                break
            score, membership = new, trial
            prototypes = unit_rows(sums)
        # A later start must be clearly better, or rounding would choose among equal ones.
        if score > best_score + 1e-6:
            best_score, best = score, membership
    share = pool.per_dataset(best)
    # Prototypes of equal room are interchangeable: number them by what fills them.
    order = np.arange(n)
    for size in np.unique(room):
        equal = np.flatnonzero(room == size)
        order[equal] = sorted(equal, key=lambda j: tuple(np.round(-share[:, j], 6)))
    return best[:, order]


def _plus_plus(pool: _Pool, n: int, rng: np.random.Generator) -> Floats:
    """n starting prototypes by k-means++ (Arthur and Vassilvitskii 2007), images by their mass."""
    weight, distance, chosen = pool.mass, np.full(len(pool.z), np.inf), []
    for _ in range(n):
        if weight.sum() <= 1e-12 * pool.mass.sum():  # fewer distinct images than prototypes
            weight = pool.weight
        chosen.append(int(rng.choice(len(pool.z), p=weight / weight.sum())))
        distance = np.minimum(distance, ((pool.z - pool.z[chosen[-1]]) ** 2).sum(axis=1))
        weight = pool.mass * distance
    return pool.z[chosen]


def _assign(cosine: Floats, mass: Floats, room: Floats) -> Floats:
    """The assignment of largest mean cosine within the rooms.

    Args:
        cosine: Shape (P, n).
        mass: Shape (P,).
        room: Shape (n,), at least as much in all as the masses.

    Returns:
        Membership of shape (P, n), rows sum to 1.
    """
    if cosine.shape[1] == 1:
        return np.ones_like(cosine)
    scale = 1 / mass.mean()  # to mean 1, for the solver's tolerances
    # What an image brings is mass * cosine. The hair of room keeps rounding from closing the door.
    solution = solve_transport_lp(
        (mass * scale)[:, None] * cosine, mass * scale, room * scale * (1 + 1e-7)
    )
    membership = np.clip(np.asarray(solution.x.todense(), dtype=np.float64), 0, 1)
    return membership / membership.sum(axis=1, keepdims=True)


# ---------------------------------------------------------------------- Fréchet distance
def _gaussian(z: Floats, weight: Floats) -> tuple[Floats, Floats]:
    """Weighted mean (k,) and square root (k, k) of the shrunk weighted covariance of z (P, k)."""
    weight = weight / weight.sum()
    mean = weight @ z
    covariance = (z - mean).T @ (weight[:, None] * (z - mean))
    k = len(mean)
    images = 1.0 / float((weight**2).sum())  # the effective number
    trace, square = float(np.trace(covariance)), float((covariance**2).sum())
    spread = (images + 1 - 2 / k) * (square - trace**2 / k)
    shrinkage = 1.0
    if spread > 0:
        shrinkage = min(1.0, ((1 - 2 / k) * square + trace**2) / spread)
    covariance = (1 - shrinkage) * covariance + shrinkage * trace / k * np.eye(k)
    values, vectors = np.linalg.eigh(covariance)
    return mean, (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def _frechet(a: tuple[Floats, Floats], b: tuple[Floats, Floats]) -> float:
    """Fréchet distance (squared) of two Gaussians given by mean and covariance root."""
    (mean_a, root_a), (mean_b, root_b) = a, b
    cross = float(np.linalg.svd(root_a @ root_b, compute_uv=False).sum())
    distance = float(((mean_a - mean_b) ** 2).sum())
    distance += float((root_a**2).sum() + (root_b**2).sum()) - 2 * cross
    return max(distance, 0.0)


# ---------------------------------------------------------------------- files
_Table = tuple[Sequence[str], Sequence[str] | None, Any]


def _read_csv(path: str | os.PathLike, datasets: Sequence[str]) -> _Table:
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:
            lines = [line for line in csv.reader(file) if any(cell.strip() for cell in line)]
    except OSError as error:
        raise PlanError(f'cannot be read: {error.strerror}') from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise PlanError(f'is not CSV: {error}') from None
    if len(lines) < 2:
        raise PlanError('needs a header line (name,expert,...) and a line per dataset')
    experts = [cell.strip() for cell in lines[0][1:]]
    names, rows = [], []
    for line in lines[1:]:
        name = line[0].strip()
        names.append(name)
        if len(line) - 1 != len(experts):
            raise PlanError(f'row {name!r} has {len(line) - 1} numbers for {len(experts)} experts')
        row = []
        for expert, cell in zip(experts, line[1:], strict=True):
            try:
                row.append(float(cell))
            except ValueError:
                raise PlanError(f'row {name!r} at {expert!r}: {cell!r} is not a number') from None
        rows.append(row)
    return names, experts, rows


def _read_json(path: str | os.PathLike, datasets: Sequence[str]) -> _Table:
    data = checks.read_json(path, 'file')
    if not isinstance(data, Mapping) or not data:
        raise PlanError('must be an object: dataset -> row')
    if 'affinity' in data and 'datasets' in data:
        experts = data.get('experts')
        if isinstance(experts, int):
            experts = [f'e{j}' for j in range(experts)]
        return checks.names_of(data['datasets'], 'datasets'), experts, data['affinity']
    rows = list(data.values())
    if not isinstance(rows[0], Mapping):
        return list(data), None, rows
    experts = list(rows[0])
    for name, row in data.items():
        if not isinstance(row, Mapping) or set(row) != set(experts):
            raise PlanError(f'row {name!r} does not have the experts {checks.short(experts)}')
    return list(data), experts, [[row[expert] for expert in experts] for row in rows]


def _read_npy(path: str | os.PathLike, datasets: Sequence[str]) -> _Table:
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise PlanError(f'cannot be read: {error.strerror or error}') from None
    except (ValueError, EOFError) as error:
        raise PlanError(f'is not a plain .npy array: {error}') from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or 0 in array.shape:
        raise PlanError(f'must hold an array (datasets, experts), got {np.shape(array)}')
    if len(array) != len(datasets):
        raise PlanError(
            f'{len(array)} rows for {len(datasets)} datasets ({checks.short(datasets)})'
        )
    return datasets, None, array
