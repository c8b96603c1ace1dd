import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from opentau_train import rng


@given(st.integers(), st.integers())
def test_seeds_and_counters_are_never_added(a, b):
    assert rng.key(a, b) != rng.key(a + 1, b - 1)


def test_key_boundaries_and_types_matter():
    assert rng.key("a", "bc") != rng.key("ab", "c")
    assert rng.key(1) != rng.key("1")


def test_keys_are_the_same_on_every_machine_and_version():
    assert rng.key(7, "order", "droid", 0) == 5906108682020329909
    assert rng.fold(5, np.array([1, 2])).tolist() == [12773366489153039575, 10754009927501035530]


def test_fold_of_many_rows_equals_each_row_alone():
    a, b = np.arange(50) - 25, np.arange(50) * 3
    together = rng.fold(9, a, b)
    assert [int(rng.fold(9, x, y)) for x, y in zip(a, b)] == together.tolist()
    assert len(set(together.tolist())) == 50


def kolmogorov_distance(values: np.ndarray, cdf: np.ndarray) -> float:
    """Largest gap between the values' empirical distribution and `cdf` at the sorted values, in units of 1/sqrt(n):
    above 1.95 in one of a thousand samples of the right distribution."""
    steps = np.arange(len(values) + 1) / len(values)
    return float(np.maximum(np.abs(cdf - steps[1:]), np.abs(cdf - steps[:-1])).max() * math.sqrt(len(values)))


def test_uniform_and_normal_have_their_distributions():
    keys = rng.fold(1, np.arange(20_000))
    uniform = np.sort(rng.uniform(keys, 3).ravel())
    normal = np.sort(rng.normal(keys, 3).ravel().astype(np.float64))
    assert kolmogorov_distance(uniform, uniform) < 1.95
    assert kolmogorov_distance(normal, 0.5 * (1 + np.vectorize(math.erf)(normal / math.sqrt(2)))) < 1.95
    assert kolmogorov_distance(uniform, uniform**1.05) > 1.95


def test_normal_rows_depend_on_their_own_key_only():
    keys = rng.fold(1, np.arange(8))
    np.testing.assert_array_equal(rng.normal(keys, 5)[3], rng.normal(keys[3], 5))
    assert np.isfinite(rng.normal(keys, 5)).all()


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4))
def test_the_hash_of_one_row_equals_the_hash_of_many(base, columns):
    assert rng.fold_one(base, *columns) == int(rng.fold(base, *columns))
    assert [rng.uniform_at(base, i) for i in range(5)] == rng.uniform(base, 5).tolist()
