"""Quantiles from the two ends of the values are those of all values, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opentau_train.data.mixture.ends import QUANTILES, Ends
from opentau_train.data.mixture.team import Team

gather = Team().gather
KINDS = {
    "normal": lambda x: x,
    "few values": np.round,
    "rising": lambda x: np.sort(x, axis=0),
    "falling": lambda x: np.sort(x, axis=0)[::-1],
    "a gripper at rest": lambda x: np.where(x < 2, np.float32(-0.0), x),
    "subnormal": lambda x: x * np.float32(1e-40),
}


@given(st.integers(1, 3000), st.sampled_from(sorted(KINDS)), st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_quantiles_are_numpys_of_all_rows_whatever_they_are_cut_into(num_rows, kind, num_pieces, seed):
    x = np.random.default_rng(seed).normal(size=(num_rows, 2)).astype(np.float32)
    x = np.ascontiguousarray(KINDS[kind](x))
    ends = Ends(num_rows, 2)
    for piece in np.array_split(x, num_pieces):
        ends.add(piece.T)
    np.testing.assert_array_equal(ends.quantiles(gather), np.quantile(x, QUANTILES, axis=0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fiftieth_of_the_values_is_kept_and_while_adding_twice_that(kind):
    x = KINDS[kind](np.random.default_rng(0).normal(size=(40_000, 1)).astype(np.float32))
    ends, most = Ends(len(x), 1), 0
    for piece in np.array_split(x, 400):
        ends.add(piece.T)
        kept = sum(sum(map(len, least._kept)) for least in (*ends._least, *ends._greatest))
        most = max(most, kept)
    assert most <= 4 * (len(x) // 99 + 3)
    np.testing.assert_array_equal(ends.quantiles(gather), np.quantile(x, QUANTILES, axis=0))


def test_no_dimension_has_no_quantiles():
    ends = Ends(5, 0)
    ends.add(np.zeros((0, 5), np.float32))
    assert ends.quantiles(gather).shape == (2, 0)
