"""The numbers on experts are those of their formulas."""

import math

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

from mmdet_moe.evaluation import expert_statistics

LN2 = math.log(2)


def test_shares_cv_and_living_experts():
    # Weight sums .75 + 1 + .25 = 2, .25 + 0 + .75 = 1, 0: shares 2/3, 1/3, 0, their mean 1/3.
    found = expert_statistics([[0.75, 0.25, 0], [1, 0, 0], [0.25, 0.75, 0]])
    assert found['share'] == pytest.approx([2 / 3, 1 / 3, 0])
    # Variance ((1/3)² + 0 + (1/3)²) / 3 = 2/27; sqrt(2/27) / (1/3) = sqrt(2/3).
    assert found['cv'] == pytest.approx(math.sqrt(2 / 3))
    assert found['living'] == 2 and found['items'] == 3
    assert expert_statistics([[0.985, 0.015]])['living'] == 2
    assert expert_statistics([[0.985, 0.015]], living=0.02)['living'] == 1


def test_collapse_has_the_cv_of_one_expert():
    # Shares 1, 0, 0, 0: mean 1/4, variance (9/16 + 3/16) / 4 = 3/16, CV sqrt(3) / 4 · 4.
    assert expert_statistics([[5.0, 0, 0, 0]])['cv'] == pytest.approx(math.sqrt(3))


def test_effective_k_counts_the_experts_an_item_really_has():
    # exp H: 2 for (1/2, 1/2), 1 for one expert, 3 for thirds, 0 for an item that was dropped: mean
    # 6/4. Weights need not add up to 1.
    weights = [[0.5, 0.5, 0], [0, 0.2, 0], [1, 1, 1], [0, 0, 0]]
    assert expert_statistics(weights)['effective_k'] == pytest.approx(6 / 4)


def test_an_expert_for_each_domain_knows_all_of_it_and_nothing_of_the_class():
    weights = [[1, 0], [1, 0], [0, 1], [0, 1]]
    found = expert_statistics(weights, ['ink', 'ink', 'heat', 'heat'], [0, 1, 0, 1])
    # I = H(domain) = ln 2; NMI = 2 ln 2 / (ln 2 + ln 2).
    assert found['mi_domain'] == pytest.approx(LN2) and found['nmi_domain'] == pytest.approx(1)
    assert found['mi_class'] == pytest.approx(0) and found['nmi_class'] == pytest.approx(0)


def test_soft_weights_count_by_their_weight():
    # Joint: ink (3/8, 1/8), heat (1/8, 3/8), margins 1/2:
    # I = 2 · 3/8 ln(3/8 / 1/4) + 2 · 1/8 ln(1/8 / 1/4) = 3/4 ln 1.5 - 1/4 ln 2; both H are ln 2.
    found = expert_statistics([[0.75, 0.25], [0.25, 0.75]], ['ink', 'heat'])
    expected = 0.75 * math.log(1.5) - 0.25 * LN2
    assert found['mi_domain'] == pytest.approx(expected)
    assert found['nmi_domain'] == pytest.approx(expected / LN2)
    assert 'mi_class' not in found


def test_one_expert_per_item_is_scikit_learns_mutual_information():
    rng = np.random.default_rng(0)
    experts, domains = rng.integers(0, 4, 200), rng.integers(0, 3, 200)
    found = expert_statistics(np.eye(4)[experts], domains)
    assert found['mi_domain'] == pytest.approx(mutual_info_score(domains, experts))
    assert found['nmi_domain'] == pytest.approx(normalized_mutual_info_score(domains, experts))


def test_one_expert_and_one_domain_know_nothing():
    found = expert_statistics([[1.0], [1.0]], ['ink', 'ink'])
    assert (found['cv'], found['mi_domain'], found['nmi_domain']) == (0, 0, 0)


@pytest.mark.parametrize(
    'weights, domains, message',
    [
        ([1.0, 2.0], None, r'shape \(items, experts\), got \(2,\)'),
        ([[1.0, -0.1]], None, 'finite, >= 0 and not all zero'),
        ([[0.0, 0.0]], None, 'finite, >= 0 and not all zero'),
        ([[1.0, math.nan]], None, 'finite, >= 0 and not all zero'),
        ([[1.0], [1.0]], ['ink'], r'1 domain labels of shape \(1,\) for 2 items'),
    ],
)
def test_what_has_no_statistics_is_refused(weights, domains, message):
    with pytest.raises(ValueError, match=message):
        expert_statistics(weights, domains)
