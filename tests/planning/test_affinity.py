"""Affinity from embeddings and from files, with small cases worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mmdet_moe.planning import PlanError
from mmdet_moe.planning.affinity import (
    _frechet,
    _gaussian,
    dataset_prototypes,
    frechet_affinity,
    load_affinity,
    prototype_affinity,
)


def _cloud(direction: int, images: int, noise: float = 0.3, dimension: int = 6, seed: int = 0):
    """Images around one axis."""
    rng = np.random.default_rng([seed, direction, images])
    return np.eye(dimension)[direction] + noise * rng.standard_normal((images, dimension))


def _four() -> dict[str, np.ndarray]:
    """Two kinds of datasets: a and c look alike, b and d look alike."""
    return {
        'a': _cloud(0, 40),
        'b': _cloud(1, 30),
        'c': _cloud(0, 20, seed=1),
        'd': _cloud(1, 10, seed=1),
    }


def test_cosine_of_axes_by_hand():
    # Dataset a lies on the first axis, b on the second; each is its own prototype:
    # cos = 1 to the own, 0 to the other.
    found = prototype_affinity({'a': [[2.0, 0.0]] * 4, 'b': [[0.0, 3.0]] * 4}, 2, center=False)
    np.testing.assert_allclose(found.matrix, [[1, 0], [0, 1]], atol=1e-12)
    np.testing.assert_allclose(found.shares, [[1, 0], [0, 1]], atol=1e-12)


def test_centring_by_hand():
    # Unit vectors (1, 0) and (0, 1), grand mean (1/2, 1/2): seen from there they are
    # (1/2, -1/2) and (-1/2, 1/2), opposite directions: cosine -1.
    found = prototype_affinity({'a': [[2.0, 0.0]] * 4, 'b': [[0.0, 3.0]] * 4}, 2)
    np.testing.assert_allclose(found.matrix, [[1, -1], [-1, 1]], atol=1e-12)


def test_every_dataset_weighs_the_same_in_the_grand_mean():
    # 4 images of a and 1 of b have the same grand mean, (1/2, 1/2), as above.
    found = prototype_affinity({'a': [[2.0, 0.0]] * 4, 'b': [[0.0, 3.0]]}, 2)
    np.testing.assert_allclose(found.matrix, [[1, -1], [-1, 1]], atol=1e-12)


def test_a_mixed_prototype_by_hand():
    # One expert, both datasets: its prototype is (1, 1) / sqrt 2, at cosine 1 / sqrt 2 to each.
    found = prototype_affinity({'a': [[1.0, 0.0]], 'b': [[0.0, 1.0]]}, 1, center=False)
    np.testing.assert_allclose(found.matrix, [[1 / math.sqrt(2)]] * 2)


def test_datasets_that_look_alike_share_a_prototype():
    for affinity in (prototype_affinity, frechet_affinity):
        best = affinity(_four(), 2).matrix.argmax(axis=1)
        assert best[0] == best[2] != best[1] == best[3], affinity.__name__


def test_prototypes_keep_to_the_room_of_the_experts():
    # Demands 4, 3, 2, 1 sum to 10. With room for 5.2 each, a and c (6 together) do not fit.
    demand = [4.0, 3.0, 2.0, 1.0]
    shares = prototype_affinity(_four(), 2, demand=demand, capacity=5.2).shares
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    loads = demand @ shares
    assert (loads <= 5.2 * (1 + 1e-6)).all()
    # With room for 6, whole datasets fit: {a, c} and {b, d}.
    shares = prototype_affinity(_four(), 2, demand=demand, capacity=6).shares
    assert (shares.max(axis=1) > 0.9).all()
    np.testing.assert_array_equal(shares.argmax(axis=1), [0, 1, 0, 1])


def test_default_room_is_what_the_planner_tries_first():
    # 3 equal demands on 2 experts: ceil(3 / 2) = 2 datasets, so two alike may share wholly.
    three = {'a': _cloud(0, 20, 0.1), 'b': _cloud(1, 20, 0.1), 'c': _cloud(0, 20, 0.1, seed=1)}
    shares = prototype_affinity(three, 2).shares
    np.testing.assert_allclose(shares, [[1, 0], [0, 1], [1, 0]], atol=1e-6)
    # Demands 5, 4, 3: max(12 / 2, 5) * 1.1 = 6.6 < 5 + 3, so a and c cannot.
    shares = prototype_affinity(three, 2, demand=[5, 4, 3]).shares
    assert (np.array([5, 4, 3]) @ shares <= 6.6 * (1 + 1e-6)).all()


def test_capacities_that_differ_stay_with_their_experts():
    two = {'a': _cloud(0, 20, 0.1), 'b': _cloud(1, 20, 0.1)}
    shares = prototype_affinity(two, 2, demand=[1, 3], capacity=[3, 1]).shares
    np.testing.assert_allclose(shares, [[0, 1], [1, 0]], atol=1e-6)


@pytest.mark.parametrize('affinity', [prototype_affinity, frechet_affinity])
def test_listing_order_does_not_matter(affinity):
    data = _four()
    demand = {'a': 4.0, 'b': 3.0, 'c': 2.0, 'd': 1.0}
    one = affinity(data, 3, demand=[demand[k] for k in data])
    turned = dict(reversed(data.items()))
    two = affinity(turned, 3, demand=[demand[k] for k in turned])
    assert one.datasets == tuple('abcd') and two.datasets == tuple('dcba')
    assert np.array_equal(one.matrix, two.matrix[::-1])


def test_same_seed_same_affinity_and_scale_of_embeddings_is_ignored():
    one = prototype_affinity(_four(), 3, seed=5).matrix
    assert np.array_equal(one, prototype_affinity(_four(), 3, seed=5).matrix)
    scaled = {name: 7 * array for name, array in _four().items()}
    np.testing.assert_allclose(prototype_affinity(scaled, 3, seed=5).matrix, one, atol=1e-9)


def test_more_experts_than_datasets_and_identical_images_work():
    same = {'a': [[1.0, 0.0]] * 5, 'b': [[0.0, 1.0]] * 5}
    for affinity in (prototype_affinity, frechet_affinity):
        matrix = affinity(same, 4).matrix
        assert matrix.shape == (2, 4) and np.isfinite(matrix).all()


def test_a_single_dataset_works():
    assert prototype_affinity({'a': _cloud(0, 10)}, 2).matrix.shape == (1, 2)


# ------------------------------------------------------------------ Fréchet distance
def test_frechet_distance_of_gaussians_by_hand():
    # means 3 apart; standard deviations (1, 2) and (2, 2), axes aligned:
    # 9 + (1 - 2)^2 + (2 - 2)^2 = 10
    a = np.array([0.0, 0.0]), np.diag([1.0, 2.0])
    b = np.array([3.0, 0.0]), np.diag([2.0, 2.0])
    assert _frechet(a, b) == pytest.approx(10)
    assert _frechet(a, a) == pytest.approx(0, abs=1e-12)


def test_shrunk_covariance_by_hand():
    # Four images at (+-2, 0), (0, +-1): covariance S = diag(2, 1/2); tr S = 5/2, tr S^2 = 17/4.
    # OAS with k = 2, N = 4: ((1 - 1) tr S^2 + tr^2 S) / ((4 + 1 - 1) (tr S^2 - tr^2 S / 2))
    #   = (25/4) / (4 (17/4 - 25/8)) = (25/4) / (9/2) = 25/18 > 1, so all is shrunk: 5/4 I.
    z = np.array([[2.0, 0], [-2.0, 0], [0, 1.0], [0, -1.0]])
    mean, root = _gaussian(z, np.ones(4))
    np.testing.assert_allclose(mean, 0, atol=1e-12)
    np.testing.assert_allclose(root @ root, 1.25 * np.eye(2))
    # Ten times the images (N = 40): (25/4) / (40 * 9/8) = 5/36; diag(2, 1/2) -> 31/36 of it + ...
    _, root = _gaussian(np.repeat(z, 10, axis=0), np.ones(40))
    shrink = 5 / 36
    np.testing.assert_allclose(
        root @ root, (1 - shrink) * np.diag([2, 0.5]) + shrink * 1.25 * np.eye(2), atol=1e-12
    )


def test_frechet_affinity_is_never_positive_and_sees_spread():
    narrow, wide = _cloud(0, 60, noise=0.05), _cloud(0, 60, noise=1.0)
    matrix = frechet_affinity({'narrow': narrow, 'wide': wide}, 1).matrix
    assert (matrix <= 0).all()
    pair = frechet_affinity({'narrow': narrow, 'wide': wide, 'far': _cloud(1, 60)}, 3).matrix
    assert (pair.max(axis=1) > pair.min(axis=1)).all()


# ------------------------------------------------------------------ dataset prototypes
def test_dataset_prototypes_are_unit_means_in_the_plan_format():
    found = dataset_prototypes({'b': [[0.0, 2.0]] * 3, 'a': [[3.0, 0.0], [0.0, 1.0]]}, {'size': 8})
    assert list(found) == ['embedder', 'dimension', 'mean', 'concentration']
    assert found['dimension'] == 2 and found['embedder'] == {'size': 8}
    np.testing.assert_allclose(found['mean']['a'], [math.sqrt(0.5)] * 2, atol=1e-6)
    np.testing.assert_allclose(found['mean']['b'], [0, 1])
    json.dumps(found, allow_nan=False)


def test_concentration_is_higher_where_datasets_are_further_apart():
    def kappa(noise: float) -> float:
        data = {'a': _cloud(0, 200, noise), 'b': _cloud(1, 200, noise)}
        return dataset_prototypes(data, {})['concentration']

    assert 1.0 <= kappa(2.0) < kappa(0.6) <= 1000.0


def test_concentration_makes_posteriors_that_are_right_as_often_as_they_say():
    data = {'a': _cloud(0, 400, 0.8), 'b': _cloud(1, 400, 0.8), 'c': _cloud(2, 400, 0.8)}
    fresh = {k: _cloud(i, 2000, 0.8, seed=9) for i, k in enumerate(data)}
    found = dataset_prototypes(data, {})
    means = np.array([found['mean'][k] for k in data])
    said, right = [], []
    for i, array in enumerate(fresh.values()):
        z = array / np.linalg.norm(array, axis=1, keepdims=True)
        p = np.exp(found['concentration'] * z @ means.T)
        p /= p.sum(axis=1, keepdims=True)
        said.append(p.max(axis=1).mean())
        right.append((p.argmax(axis=1) == i).mean())
    assert np.mean(said) == pytest.approx(np.mean(right), abs=0.03)


def test_prototypes_do_not_depend_on_listing_order():
    data = _four()
    one = dataset_prototypes(data, {})
    two = dataset_prototypes(dict(reversed(data.items())), {})
    assert one == two


# ------------------------------------------------------------------ bad embeddings
@pytest.mark.parametrize(
    ('embeddings', 'message'),
    [
        ({}, 'embeddings is empty'),
        ({'a': [[1.0, 0.0]], 'b': np.zeros((0, 2))}, "embeddings of 'b' must have shape"),
        ({'a': [[1.0, 0.0]], 'b': [[1.0]]}, "embeddings of 'b' have 1 dimensions"),
        ({'a': [[1.0, float('nan')]]}, "embeddings of 'a' hold NaN"),
        ({'a': [[0.0, 0.0]]}, "embeddings of 'a' hold a zero vector"),
        ({'a': [[1.0, 0.0]]}, '2 experts need at least 2 embedded images, got 1'),
    ],
)
def test_bad_embeddings_name_the_culprit(embeddings, message):
    with pytest.raises(PlanError, match=message):
        prototype_affinity(embeddings, 2)


def test_too_little_room_is_said_in_numbers():
    with pytest.raises(PlanError, match='capacity 40 in total, demand 52'):
        prototype_affinity(_four(), 2, demand=[13] * 4, capacity=20)


def test_a_dataset_without_demand_gets_an_affinity_too():
    found = prototype_affinity(_four(), 2, demand=[4, 3, 0, 1])
    assert np.isfinite(found.matrix).all()
    assert found.matrix[2].argmax() == found.matrix[0].argmax(), 'c looks like a'
    with pytest.raises(PlanError, match='demand is 0 for every dataset'):
        prototype_affinity(_four(), 2, demand=0)


# ------------------------------------------------------------------ files
def test_csv_is_read_by_name(tmp_path):
    path = tmp_path / 'w.csv'
    path.write_text('dataset,e0,e1\nb, 3, 4\na,1,2.5\n\n')
    matrix, experts = load_affinity(path, ['a', 'b'])
    assert matrix.tolist() == [[1, 2.5], [3, 4]] and experts == ('e0', 'e1')


@pytest.mark.parametrize(
    ('data', 'experts'),
    [
        ({'b': [3, 4], 'a': [1, 2]}, None),
        ({'b': {'x': 3, 'y': 4}, 'a': {'y': 2, 'x': 1}}, ('x', 'y')),
        ({'datasets': ['b', 'a'], 'affinity': [[3, 4], [1, 2]]}, None),
        (
            {'datasets': ['b', 'a'], 'experts': ['x', 'y'], 'affinity': [[3, 4], [1, 2]]},
            ('x', 'y'),
        ),
        ({'datasets': ['b', 'a'], 'experts': 2, 'affinity': [[3, 4], [1, 2]]}, ('e0', 'e1')),
    ],
)
def test_json_is_read_by_name_in_all_its_forms(tmp_path, data, experts):
    path = tmp_path / 'w.json'
    path.write_text(json.dumps(data))
    matrix, found = load_affinity(path, ['a', 'b'])
    assert matrix.tolist() == [[1, 2], [3, 4]] and found == experts


def test_npy_is_read_in_the_order_asked_for(tmp_path):
    path = tmp_path / 'w.npy'
    np.save(path, np.array([[1.0, 2.0], [3.0, 4.0]]))
    assert load_affinity(path, ['a', 'b'])[0].tolist() == [[1, 2], [3, 4]]


def test_a_pickle_in_npy_clothes_is_refused(tmp_path):
    path = tmp_path / 'w.npy'
    np.save(path, np.array([{'a': 1}], dtype=object), allow_pickle=True)
    with pytest.raises(PlanError, match='not a plain .npy'):
        load_affinity(path, ['a'])


@pytest.mark.parametrize(
    ('name', 'text', 'message'),
    [
        ('w.txt', '', 'must end in .csv, .json, .npy'),
        ('w.csv', 'dataset,e0\n', 'needs a header line'),
        ('w.csv', 'dataset,e0\na,1\n', 'no row for b'),
        ('w.csv', 'dataset,e0\na,1\nb,1\nc,1\n', "dataset 'c' is unknown"),
        ('w.csv', 'dataset,e0\na,1\na,1\nb,1\n', "lists 'a' twice"),
        ('w.csv', 'dataset,e0\na,1\nb,1,2\n', "row 'b' has 2 numbers for 1 experts"),
        ('w.csv', 'dataset,e0\na,1\nb,x\n', "row 'b' at 'e0': 'x' is not a number"),
        ('w.csv', 'dataset,e0\na,1\nb,nan\n', 'affinity'),
        ('w.json', '[1]', 'must be an object'),
        ('w.json', '{"a": [1], "b": [1, 2]}', 'affinity'),
        ('w.json', '{"a": {"x": 1}, "b": {"y": 1}}', "row 'b' does not have the experts x"),
        ('w.json', '{"a": 1, "b": 2}', 'affinity'),
        ('w.json', '{', 'is not JSON'),
        ('gone.csv', None, 'cannot be read'),
    ],
)
def test_bad_files_name_the_culprit_and_the_file(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(PlanError, match=message) as error:
        load_affinity(path, ['a', 'b'])
    assert name in str(error.value)
