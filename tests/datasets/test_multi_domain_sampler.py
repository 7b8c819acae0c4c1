"""The stream of samples is a function of (seed, position, rank)."""

import itertools
from collections import Counter

import numpy as np
import pytest
from mmdet.datasets import AspectRatioBatchSampler

import mmdet_moe.datasets.sampler as module
from mmdet_moe.datasets import MultiDomainSampler
from mmdet_moe.registry import DATA_SAMPLERS, DATASETS

SIZES = {'large': 80, 'small': 10, 'tiny': 3}
ENDS = np.cumsum(list(SIZES.values()))


class Dataset:
    """As much of a MultiDomainDataset as a sampler asks for."""

    domain_sizes = SIZES

    def __len__(self):
        return sum(SIZES.values())


def domain(index):
    return list(SIZES)[int(np.searchsorted(ENDS, index, side='right'))]


def draw(number, rank=0, world_size=1, skip=0, **kwargs):
    kwargs.setdefault('seed', 1)
    info = module.get_dist_info
    module.get_dist_info = lambda: (rank, world_size)
    try:
        sampler = MultiDomainSampler(Dataset(), **kwargs)
    finally:
        module.get_dist_info = info
    if skip:
        sampler.skip(skip)
    return list(itertools.islice(sampler, number))


def shares(indices):
    counts = Counter(map(domain, indices))
    return {name: counts[name] / len(indices) for name in SIZES}


def test_every_image_comes_once_before_any_comes_twice():
    drawn = draw(4000, weights='uniform')
    for name in SIZES:
        mine = [index for index in drawn if domain(index) == name]
        size = SIZES[name]
        for start in range(0, len(mine) - size, size):
            assert len(set(mine[start : start + size])) == size
        assert mine[:size] != mine[size : 2 * size]  # shuffled anew


@pytest.mark.parametrize(
    'weights, expected',
    [
        # sizes 80, 10, 3: sum 93
        (None, (80 / 93, 10 / 93, 3 / 93)),
        ('size', (80 / 93, 10 / 93, 3 / 93)),
        # roots 8.944, 3.162, 1.732: sum 13.839
        ('sqrt', (0.6463, 0.2285, 0.1252)),
        (2.0, (0.6463, 0.2285, 0.1252)),
        ('uniform', (1 / 3, 1 / 3, 1 / 3)),
        ({'large': 1, 'small': 3, 'tiny': 0}, (0.25, 0.75, 0)),
        # a share of 1/1001 a block of 64 must not vanish by rounding
        ({'large': 1000, 'small': 1, 'tiny': 0}, (1000 / 1001, 1 / 1001, 0)),
    ],
)
def test_domains_get_their_share(weights, expected):
    drawn = draw(64 * 300, weights=weights)
    for (_, share), wanted in zip(shares(drawn).items(), expected, strict=True):
        # Systematic sampling: within one draw of the share in each of the 300 blocks, on average
        # exact; the sum of 300 independent roundings spreads by at most 0.5 * sqrt(300) = 8.7.
        assert abs(share - wanted) * len(drawn) < 4 * 8.7 + 1
    block = Counter(map(domain, drawn[:64]))
    for name, wanted in zip(SIZES, expected, strict=True):
        assert abs(block[name] - 64 * wanted) < 1


@pytest.mark.parametrize('batch', [{}, {'single_domain_batches': True, 'batch_size': 4}])
@pytest.mark.parametrize('world_size', [1, 3])
def test_it_resumes_at_any_position(batch, world_size):
    for rank in range(world_size):
        settings = dict(rank=rank, world_size=world_size, weights='sqrt', **batch)
        whole = draw(500, **settings)
        for position in (0, 1, 63, 64, 130, 499):
            assert draw(500 - position, skip=position, **settings) == whole[position:]


def test_ranks_share_one_stream():
    alone = draw(600)
    for rank in range(3):
        assert draw(200, rank=rank, world_size=3) == alone[rank::3]


def test_the_seed_decides():
    assert draw(100, seed=1) == draw(100, seed=1) != draw(100, seed=2)


def test_batches_may_be_of_a_single_domain():
    settings = dict(weights='uniform', single_domain_batches=True, batch_size=4)
    drawn = draw(1200, **settings)
    batches = [drawn[start : start + 4] for start in range(0, len(drawn), 4)]
    assert all(len({domain(index) for index in batch}) == 1 for batch in batches)
    assert len({domain(batch[0]) for batch in batches}) == 3
    # Rank r of two sees every second batch, whole.
    for rank in range(2):
        assert draw(600, rank=rank, world_size=2, **settings) == sum(batches[rank::2], [])


def test_the_order_within_a_domain_does_not_depend_on_the_others():
    class Fewer(Dataset):
        domain_sizes = {'small': 10}

        def __len__(self):
            return 10

    fewer = list(itertools.islice(MultiDomainSampler(Fewer(), seed=1), 30))
    among = [index - 80 for index in draw(3000) if domain(index) == 'small'][:30]
    assert fewer == among


@pytest.mark.parametrize(
    'kwargs, message',
    [
        ({'weights': 'root'}, "got 'root'"),
        ({'weights': {'large': 1}}, r"no weight for \['small', 'tiny'\]"),
        ({'weights': {**SIZES, 'smal': 1}}, r"unknown domains \['smal'\]"),
        ({'weights': dict.fromkeys(SIZES, 0)}, 'all are zero'),
        ({'weights': {**SIZES, 'tiny': -1}}, "'tiny': -1"),
        ({'weights': {**SIZES, 'tiny': float('nan')}}, "'tiny': nan"),
        ({'weights': 0.0}, 'a temperature must be finite and > 0, got 0.0'),
        ({'single_domain_batches': True}, 'batch_size=None'),
        ({'skip': -1}, 'must not be negative, got -1'),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        draw(1, **kwargs)


def test_an_empty_domain_gets_no_weight():
    class Empty(Dataset):
        domain_sizes = {'large': 80, 'void': 0}

        def __len__(self):
            return 80

    assert MultiDomainSampler(Empty(), weights='uniform', seed=0).probabilities == {
        'large': 1.0,
        'void': 0.0,
    }
    with pytest.raises(ValueError, match="'void' has no images"):
        MultiDomainSampler(Empty(), weights={'large': 1, 'void': 1}, seed=0)


def test_another_dataset_is_refused():
    with pytest.raises(TypeError, match='needs a MultiDomainDataset.*got list'):
        MultiDomainSampler([1, 2, 3], seed=0)


@pytest.mark.parametrize('outer', ['RepeatDataset', 'ClassBalancedDataset'])
def test_it_sees_through_wrappers(tiny_dataset, mmdet_moe_scope, outer):
    extra = {'times': 2} if outer == 'RepeatDataset' else {'oversample_thr': 0.5}
    dataset = DATASETS.build({'type': outer, 'dataset': tiny_dataset(), **extra})
    sampler = DATA_SAMPLERS.build(
        {'type': 'MultiDomainSampler', 'weights': 'uniform'},
        default_args={'dataset': dataset, 'seed': 0},
    )
    drawn = list(itertools.islice(sampler, 64))
    counts = Counter(dataset[index]['data_samples'].domain for index in drawn)
    assert set(counts.values()) <= {21, 22}  # 64 / 3


def test_aspect_ratio_batches_work_on_top(tiny_dataset, mmdet_moe_scope):
    dataset = DATASETS.build(tiny_dataset())
    batches = AspectRatioBatchSampler(MultiDomainSampler(dataset, seed=0), batch_size=2)
    assert all(len(batch) == 2 for batch in itertools.islice(batches, 20))
