import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opentau_train.data.mixture import ends, normalize, stored, tally
from opentau_train.data.mixture.normalize import HeadStats, affine_of
from opentau_train.data.mixture.team import Team
from opentau_train.errors import UserError

METHODS = ["mean_std", "min_max", "quantiles"]


def compute(rows, num_rows: int, state_names, action_names, excluded=None) -> HeadStats:
    """Of rows in parts of one episode."""
    own = ends.make_ends(num_rows, (len(state_names), len(action_names)), [num_rows])
    names, parts = (tuple(state_names), tuple(action_names)), [tally.count([episode], own) for episode in rows]
    return tally.whole(parts, own, Team().gather, names, excluded or {})


def stats_of(actions: np.ndarray, parts: int = 3) -> HeadStats:
    pieces = np.array_split(actions.astype(np.float32), parts)
    rows = (("d", i, np.zeros((len(p), 0), np.float32), [p]) for i, p in enumerate(pieces) if len(p))
    return compute(rows, len(actions), [], [f"a{i}" for i in range(actions.shape[1])])


@given(st.integers(0, 2**31), st.floats(-1e5, 1e5), st.floats(1e-3, 1e3))
@settings(max_examples=40, deadline=None)
def test_moments_equal_numpy_on_all_rows_at_once(seed, offset, scale):
    x = (np.random.default_rng(seed).normal(size=(500, 3)) * scale + offset).astype(np.float32)
    found = stats_of(x).actions
    wide = x.astype(np.float64)
    np.testing.assert_allclose(found.mean, wide.mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.std, wide.std(0), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(found.q01, np.quantile(x, 0.01, axis=0), rtol=1e-6)
    assert (found.min == wide.min(0)).all() and (found.max == wide.max(0)).all() and found.count == 500


@pytest.mark.parametrize("method", METHODS)
def test_inverse_restores_the_data(method):
    x = np.random.default_rng(0).normal(3.0, 2.0, size=(400, 4)).astype(np.float32)
    affine = affine_of(stats_of(x).actions, method)
    np.testing.assert_allclose(affine.denormalize(affine.normalize(x)), x, atol=1e-5)


@pytest.mark.parametrize(("method", "low", "high"), [("min_max", -1.0, 1.0), ("mean_std", None, None)])
def test_ranges_after_normalisation(method, low, high):
    x = np.random.default_rng(1).uniform(5, 9, size=(400, 2)).astype(np.float32)
    z = affine_of(stats_of(x).actions, method).normalize(x)
    if method == "min_max":
        assert z.min() == pytest.approx(low, abs=1e-5) and z.max() == pytest.approx(high, abs=1e-5)
    else:
        assert abs(z.mean()) < 1e-5 and z.std() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_constant_dimension_is_zero_named_and_never_divided(method, value):
    x = np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32)
    x[:, 1] = value
    stats = stats_of(x)
    affine = affine_of(stats.actions, method)
    assert (affine.normalize(x)[:, 1] == 0).all()
    np.testing.assert_allclose(affine.denormalize(affine.normalize(x))[:, 1], value, rtol=1e-6)
    assert normalize.constant_dimensions(stats, method) == ["a1"]


@pytest.mark.parametrize("method", ["mean_std", "min_max", "quantiles"])
def test_a_dimension_that_only_rounding_moves_is_constant_too(method):
    """A hundred thousand and its float32 neighbour: divided by their distance, rounding would be all that there is."""
    value = np.float32(1e5)
    rows = np.array([[value], [np.nextafter(value, np.float32(2e5))]] * 50, np.float32)
    stats = stats_of(rows)
    assert affine_of(stats.actions, method).scale.tolist() == [0.0]


def test_nan_names_dataset_episode_and_dimension():
    x = np.zeros((5, 2), np.float32)
    x[3, 1] = np.nan
    rows = [("good", 0, np.zeros((5, 0)), [np.zeros((5, 2))]), ("bad", 17, np.zeros((5, 0)), [x])]
    with pytest.raises(UserError, match="y is nan in dataset 'bad', episode 17, frame 3"):
        compute(iter(rows), 10, [], ["x", "y"])


def test_a_dimension_that_is_never_finite_is_proposed_to_be_dropped():
    rows = np.ones((9, 3), np.float32)
    rows[:, 1] = np.nan
    two = [("d", e, rows, [rows[:, :2]]) for e in range(2)]
    with pytest.raises(UserError) as caught:
        compute(iter(two), 18, ["s[0]", "s[1]", "s.z"], ["a[0]", "a.y"])
    assert "s[1] is nan in dataset 'd', episode 0, frame 0 and all others" in str(caught.value)
    assert "data.sources.d.drop_dims=[s.1,a.y]" in caught.value.remedy


def test_a_dimension_without_values_in_some_episodes_leaves_these_out():
    good, bad = np.ones((9, 2), np.float32), np.full((9, 2), np.nan, np.float32)
    rows = [("d", e, values, [good]) for e, values in enumerate((good, bad, good, bad))]
    with pytest.raises(UserError) as caught:
        compute(iter(rows), 36, ["s[0]", "s[1]"], ["a[0]", "a[1]"], {"d": (7,)})
    assert "episode 1, frame 0 and all others; so are values of 1 other episodes" in caught.value.what
    assert caught.value.remedy.endswith("data.sources.d.exclude_episodes=[1,3,7]")


def test_quantiles_of_a_dimension_that_moves_in_few_rows_are_its_extremes():
    x = np.random.default_rng(0).uniform(-1, 1, size=(1000, 3)).astype(np.float32)
    x[:, 1], x[:, 2] = 0.0, 5.0
    x[:4, 1] = 1.0  # a gripper that closes in 0.4 % of the rows
    stats = stats_of(x)
    z = affine_of(stats.actions, "quantiles").normalize(x)
    assert set(z[:, 1].tolist()) == {-1.0, 1.0} and not z[:, 2].any()
    assert normalize.rare_dimensions(stats, "quantiles") == ["a1"]
    assert normalize.constant_dimensions(stats, "quantiles") == ["a2"]
    assert normalize.rare_dimensions(stats, "min_max") == []
    moments = stats.actions
    np.testing.assert_array_equal(
        z[:, 0], affine_of(replace(moments, min=moments.min - 9), "quantiles").normalize(x)[:, 0]
    )


def test_quantiles_of_a_stride_sample_stay_close(monkeypatch):
    monkeypatch.setattr(ends, "QUANTILE_ROWS", 1000)
    x = np.random.default_rng(0).normal(size=(30_000, 1))
    found = stats_of(x, parts=7).actions
    assert abs(found.q01[0] - np.quantile(x, 0.01)) < 0.3
    np.testing.assert_allclose(found.mean, x.astype(np.float32).astype(np.float64).mean(0), atol=1e-12)


def test_cache_is_keyed_by_content_and_survives_json(tmp_path):
    first = stats_of(np.random.default_rng(0).normal(size=(50, 2)))
    stored.write_one(tmp_path, ["content a"], first)
    again = stored.read_one(tmp_path, ["content a"])
    assert stored.read_one(tmp_path, ["content b"]) is None
    assert json.dumps(first.to_json()) == json.dumps(again.to_json())


@pytest.mark.parametrize("text", ["", '{"state": {"count"', "{}"])
def test_a_torn_cache_is_passed_over_with_a_warning_and_written_anew(text, tmp_path, caplog):
    stats = stats_of(np.random.default_rng(0).normal(size=(50, 2)))
    stored.write_one(tmp_path, ["content"], stats)
    (path,) = (tmp_path / "stats").iterdir()
    whole = path.read_text()
    path.write_text(text)
    assert stored.read_one(tmp_path, ["content"]) is None
    assert path.name in caplog.text
    stored.write_one(tmp_path, ["content"], stats)
    assert path.read_text() == whole and list((tmp_path / "stats").iterdir()) == [path]
