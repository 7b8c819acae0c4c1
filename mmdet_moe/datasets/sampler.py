"""Infinite sampling from several domains, a pure function of (seed, position, rank)."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import Sampler

from mmdet_moe.registry import DATA_SAMPLERS

_BLOCK = 64  # draws between two reshufflings of the order of domains


@DATA_SAMPLERS.register_module()
class MultiDomainSampler(Sampler):
    r"""Draw domains by weight and go through each domain's images in shuffled passes.

    The stream is over *units*: single samples, or whole batches of one domain with
    ``single_domain_batches``. Domain d has probability :math:`p_d \propto w_d`. Units come in
    blocks of 64; in block b the domains are those at the 64 evenly spaced points
    :math:`(i + u_b) / 64` of the cumulative p, in shuffled order (systematic sampling). So each
    domain has, in every block, its exact share rounded down or up, and its exact share on average
    however small it is. A domain's n-th draw is element ``n mod N_d`` of its
    ``n div N_d``-th shuffling: none of its images comes up twice before all of them did.

    Unit u of the stream goes to rank ``u mod world_size``. Everything depends on (seed, position,
    rank) only, so that :meth:`skip` resumes anywhere without reading data.

    Args:
        dataset: A ``MultiDomainDataset``, also inside ``RepeatDataset`` or
            ``ClassBalancedDataset``.
        weights: Domain name -> weight (of every domain; 0 leaves one out), or ``'size'`` (the
            number of images, the default: as if all were one dataset), ``'sqrt'`` (its square
            root), ``'uniform'``, or a temperature :math:`T > 0` for :math:`w_d = N_d^{1/T}`
            (1 is 'size', 2 is 'sqrt', large is uniform).
        seed: The seed; drawn and shared by all ranks if None.
        single_domain_batches: Whether all images of a batch (per rank) come from one domain.
        batch_size: The dataloader's batch size per rank, needed for single-domain batches.

    Raises:
        ValueError: Weights that are negative, all zero, or of unknown or missing domains; an empty
            domain with a weight; single-domain batches without a batch size.
    """

    def __init__(
        self,
        dataset: Any,
        weights: Mapping[str, float] | str | float | None = None,
        seed: int | None = None,
        single_domain_batches: bool = False,
        batch_size: int | None = None,
    ) -> None:
        self.rank, self.world_size = get_dist_info()
        self.seed = int(sync_random_seed() if seed is None else seed)
        if single_domain_batches and (batch_size is None or batch_size < 1):
            raise ValueError(
                'single_domain_batches needs the batch_size of the dataloader (per process), got '
                f'batch_size={batch_size}'
            )
        self.unit = int(batch_size) if single_domain_batches else 1
        self.dataset = dataset  # AspectRatioBatchSampler looks for it here
        self.size = len(dataset)
        indices = _indices_by_domain(dataset)
        self.probabilities = _probabilities(
            weights, {name: len(members) for name, members in indices.items()}
        )
        # A domain is shuffled by its name, not its place in the list.
        self._domains = [
            (zlib.crc32(name.encode()), indices[name])
            for name, share in self.probabilities.items()
            if share > 0
        ]
        self._cumulative = np.cumsum([p for p in self.probabilities.values() if p > 0])
        self._position = 0

    def skip(self, num_samples: int) -> None:
        """Continue behind the first ``num_samples`` samples of this rank.

        Absolute, counted from the start of the stream, as mmengine's ``InfiniteSampler.skip``.

        Raises:
            ValueError: ``num_samples`` is negative.
        """
        if num_samples < 0:
            raise ValueError(f'num_samples must not be negative, got {num_samples}')
        self._position = int(num_samples)

    def __iter__(self) -> Iterator[int]:
        first, within = divmod(self._position, self.unit)
        for batch in self._units(first * self.world_size + self.rank):
            yield from batch[within:]
            within = 0

    def __len__(self) -> int:
        """The number of images of the dataset (the stream itself does not end)."""
        return self.size

    def set_epoch(self, epoch: int) -> None:
        """The stream knows no epochs."""

    # -- the stream ------------------------------------------------------------------------------

    def _units(self, unit: int) -> Iterator[list[int]]:
        """The units of this rank from number ``unit`` of the common stream on."""
        drawn = np.zeros(len(self._domains), dtype=np.int64)  # units of each domain so far
        block = 0
        for block in range(unit // _BLOCK):
            drawn += np.bincount(self._block(block), minlength=len(drawn))
        block = unit // _BLOCK
        passes = [ShuffledPasses(members, self.seed, key) for key, members in self._domains]
        while True:
            domains = self._block(block)
            for offset, domain in enumerate(domains):
                number = block * _BLOCK + offset
                if number >= unit and number % self.world_size == self.rank:
                    start = int(drawn[domain]) * self.unit
                    yield [passes[domain][start + step] for step in range(self.unit)]
                drawn[domain] += 1
            block += 1

    def _block(self, block: int) -> np.ndarray:
        """The domains of the 64 units of a block, shape (64,)."""
        rng = np.random.default_rng((self.seed, 0, block))
        points = (np.arange(_BLOCK) + rng.random()) / _BLOCK
        domains = np.searchsorted(self._cumulative, points * self._cumulative[-1], side='right')
        return rng.permutation(np.minimum(domains, len(self._domains) - 1))


class ShuffledPasses:
    """An endless sequence of ``members``: each of them once, in one order, then in another.

    Draw n is element ``n mod N`` of the ``n div N``-th shuffling, a function of (seed, key, n).
    """

    def __init__(self, members: np.ndarray, seed: int, key: int) -> None:
        self.members = members
        self.seed = (seed, 1, key)
        self._pass = (-1, members)

    def __getitem__(self, number: int) -> int:
        turn, place = divmod(number, len(self.members))
        if self._pass[0] != turn:
            rng = np.random.default_rng((*self.seed, turn))
            self._pass = (turn, rng.permutation(self.members))
        return int(self._pass[1][place])


@DATA_SAMPLERS.register_module()
class DomainBatchSampler(Sampler):
    """Batches with the same number of images of every domain, without end.

    As ``batch_sampler`` of a data loader over a data set whose data infos have ``domain``, such as
    :class:`DGDataset`. ``batch_size`` counts the images of *each* domain; a batch has them domain
    after domain. Each domain goes through its images in shuffled passes of its own (see
    :class:`ShuffledPasses`), so that a small domain comes round more often.

    Args:
        sampler: The data loader's sampler, which gives the data set and the seed. Which one it is
            does not matter otherwise.
        batch_size: Images per domain, batch and process.
        drop_last: Without meaning here, there is no last batch.

    Example:
        >>> train_dataloader = dict(
        ...     batch_size=32,  # of each domain
        ...     sampler=dict(type='InfiniteSampler', shuffle=True),
        ...     batch_sampler=dict(type='mmdet_moe.DomainBatchSampler'), ...)
    """

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool = False) -> None:
        if batch_size < 1:
            raise ValueError(f'batch_size must be at least 1 image per domain, got {batch_size}')
        self.sampler = sampler
        self.images_per_domain = int(batch_size)
        self.rank, self.world_size = get_dist_info()
        dataset = sampler.dataset
        members: dict[str, list[int]] = {}
        for index in range(len(dataset)):
            members.setdefault(dataset.get_data_info(index)['domain'], []).append(index)
        self._domains = {name: np.array(indices) for name, indices in sorted(members.items())}
        self._position = 0

    def skip_batches(self, number: int) -> None:
        """Continue behind the first ``number`` batches of this rank, counted from the start of the
        stream. ``RandomStateHook`` calls it on resume, so that nothing is loaded again."""
        self._position = int(number)

    def __iter__(self) -> Iterator[list[int]]:
        passes = [
            ShuffledPasses(members, int(self.sampler.seed), zlib.crc32(name.encode()))
            for name, members in self._domains.items()
        ]
        for batch in itertools.count(self._position):
            start = (batch * self.world_size + self.rank) * self.images_per_domain
            numbers = range(start, start + self.images_per_domain)
            yield [domain[number] for domain in passes for number in numbers]

    def __len__(self) -> int:
        """Batches until the largest domain was gone through once (the stream does not end)."""
        largest = max(len(members) for members in self._domains.values())
        return math.ceil(largest / (self.images_per_domain * self.world_size))


def _indices_by_domain(dataset: Any) -> dict[str, np.ndarray]:
    """The indices of each domain's images in ``dataset``."""
    if hasattr(dataset, 'domain_sizes'):
        ends = np.cumsum([0, *dataset.domain_sizes.values()])
        return {
            name: np.arange(start, end)
            for name, start, end in zip(dataset.domain_sizes, ends[:-1], ends[1:], strict=True)
        }
    if hasattr(dataset, 'dataset') and hasattr(dataset, '_get_ori_dataset_idx'):
        inner = _indices_by_domain(dataset.dataset)
        owner = np.empty(len(dataset.dataset), dtype=np.int64)
        for place, members in enumerate(inner.values()):
            owner[members] = place
        owners = owner[[dataset._get_ori_dataset_idx(index) for index in range(len(dataset))]]
        return {name: np.flatnonzero(owners == place) for place, name in enumerate(inner)}
    raise TypeError(
        'MultiDomainSampler needs a MultiDomainDataset, also inside RepeatDataset or '
        f'ClassBalancedDataset, got {type(dataset).__name__}'
    )


def _probabilities(
    weights: Mapping[str, float] | str | float | None, sizes: Mapping[str, int]
) -> dict[str, float]:
    if weights is None or isinstance(weights, str):
        powers = {None: 1.0, 'size': 1.0, 'sqrt': 0.5, 'uniform': 0.0}
        if weights not in powers:
            raise ValueError(
                "weights must be 'size', 'sqrt', 'uniform', a temperature or a dict, "
                f'got {weights!r}'
            )
        weights = {name: size ** powers[weights] if size else 0.0 for name, size in sizes.items()}
    elif isinstance(weights, Mapping):
        unknown = [name for name in weights if name not in sizes]
        missing = [name for name in sizes if name not in weights]
        if unknown or missing:
            what = f'unknown domains {unknown}' if unknown else f'no weight for {missing}'
            raise ValueError(f'weights: {what}; the dataset has {list(sizes)}')
        weights = {name: float(weights[name]) for name in sizes}
        empty = [name for name, weight in weights.items() if weight > 0 and not sizes[name]]
        if empty:
            raise ValueError(f'weights: domain {empty[0]!r} has no images; give it weight 0')
    else:
        temperature = float(weights)
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f'weights: a temperature must be finite and > 0, got {weights}')
        weights = {name: size ** (1 / temperature) if size else 0.0 for name, size in sizes.items()}
    bad = {name: w for name, w in weights.items() if not (w >= 0 and math.isfinite(w))}
    total = sum(weights.values())
    if bad or not total > 0:
        what = f'{bad}' if bad else 'all are zero'
        raise ValueError(f'weights must be finite, >= 0 and not all zero: {what}')
    return {name: weight / total for name, weight in weights.items()}
