"""A camera's statistics are those of all its pixels, whole or put together from parts."""

from __future__ import annotations

import numpy as np
import pytest

from opentau_train.data.builtin.colours import QUANTILES, Colours


def pictures(num: int, low: int, high: int) -> np.ndarray:
    return np.random.default_rng(num).integers(low, high, (num, 5, 7, 3), np.uint8)


def test_statistics_are_numpys_over_the_pixels_of_each_channel():
    frames = pictures(4, 10, 200) // np.array([1, 2, 3], np.uint8)
    told, pixels = Colours.of(frames).statistics(), frames.reshape(-1, 3) / 255
    for kind in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(np.array(told[kind])[:, 0, 0], getattr(pixels, kind)(0), rtol=1e-12)
    for name, quantile in QUANTILES.items():
        expected = np.quantile(pixels, quantile, axis=0, method="inverted_cdf")
        np.testing.assert_allclose(np.array(told[name])[:, 0, 0], expected, rtol=1e-12)
    assert told["count"] == [4]


def test_parts_together_are_the_whole():
    one, other = pictures(3, 0, 100), pictures(5, 90, 256)
    together = Colours.total([Colours.of(one), Colours.of(other)])
    assert together.statistics() == Colours.of(np.concatenate([one, other])).statistics()


@pytest.mark.parametrize("value", [0, 7, 255])
def test_pictures_of_one_colour_vary_by_nothing(value):
    told = Colours.of(np.full((2, 4, 4, 3), value, np.uint8)).statistics()
    assert told["min"] == told["max"] == told["q50"] == np.full((3, 1, 1), value / 255).tolist()
    assert np.abs(told["std"]).max() < 1e-12
