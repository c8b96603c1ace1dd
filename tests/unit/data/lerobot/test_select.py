"""What the settings choose of a real dataset: successes only, chunks and histories at another rate."""

from dataclasses import replace

import numpy as np
import pytest

from opentau_train.config.data import SourceSettings
from opentau_train.config.typed import build
from opentau_train.data.mixture import open as mixture
from opentau_train.errors import UserError
from opentau_train.types import WindowSpec
from tests.lerobot_writer import DEFAULT_COLUMNS, Camera, Dataset, write

ROWS_ONLY = Dataset(cameras={})


def open_source(root, **settings):
    return mixture.open_source("main", build(SourceSettings, {"root": str(root), **settings}, "data.sources.main"))


def flag(values):
    return {"dtype": "bool", "shape": [1], "names": None}, values


GOOD = (True, False, True, False, True)


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_success_only_asks_the_episodes_metadata(version, tmp_path):
    columns = {"success": GOOD if version == "v3.0" else [int(g) for g in GOOD]}
    root = write(tmp_path / "set", replace(ROWS_ONLY, version=version, episode_columns=columns))
    source = open_source(root, success_only=True, success_column="success", exclude_episodes=(4,))
    assert source.episodes.episode_index.tolist() == [0, 2]


def test_success_only_asks_the_last_row_where_the_metadata_say_nothing(tmp_path):
    def rows(e, f):
        return GOOD[e] if f == ROWS_ONLY.lengths[e] - 1 else not GOOD[e]

    root = write(tmp_path / "set", replace(ROWS_ONLY, columns={**DEFAULT_COLUMNS, "next.success": flag(rows)}))
    assert open_source(root, success_only=True).episodes.episode_index.tolist() == [0, 2, 4]
    assert len(open_source(root).episodes) == 5


def test_success_of_an_unknown_column_or_of_texts_is_an_error(tmp_path):
    columns = {"outcome": ["good", "bad", "good", "bad", "good"]}
    root = write(tmp_path / "set", replace(ROWS_ONLY, episode_columns=columns))
    with pytest.raises(UserError, match=r"'next\.success' is no column"):
        open_source(root, success_only=True)
    with pytest.raises(UserError, match="did you mean 'outcome'"):
        open_source(root, success_only=True, success_column="outcom")
    with pytest.raises(UserError, match="'good', which is neither true nor false"):
        open_source(root, success_only=True, success_column="outcome")
    root = write(tmp_path / "gaps", replace(ROWS_ONLY, episode_columns={"outcome": [1.0, float("nan"), 0.0, 1.0, 1.0]}))
    with pytest.raises(UserError, match="nan, which is neither true nor false"):
        open_source(root, success_only=True, success_column="outcome")


def test_no_success_at_all_is_an_error(tmp_path):
    root = write(tmp_path / "set", replace(ROWS_ONLY, episode_columns={"success": [False] * 5}))
    with pytest.raises(UserError, match="no episode is left"):
        open_source(root, success_only=True, success_column="success")


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    """30 fps, one camera; the last action is a flag of every second row."""
    feature, values = DEFAULT_COLUMNS["action"]
    grip = {"dtype": "int64", "shape": [1], "names": None}, lambda e, f: f % 2
    columns = {"observation.state": DEFAULT_COLUMNS["observation.state"], "action": (feature, values)}
    dataset = Dataset(
        lengths=(24, 9), cameras={"observation.images.front": Camera()}, columns={**columns, "action.grip": grip}
    )
    return write(tmp_path_factory.mktemp("filmed") / "set", dataset)


def read_all(source, window, frames, episode=0):
    factory = source.cursors(window)
    cursor = factory.cursor()
    try:
        return [cursor.read(episode, f) for f in frames], factory.frames_decoded
    finally:
        factory.close()


@pytest.mark.parametrize(("fps", "step"), [(15.0, 2.0), (20.0, 1.5), (60.0, 0.5)])
def test_actions_are_taken_by_time_at_the_rate_that_is_asked_for(fps, step, filmed):
    source = open_source(filmed, fps=fps, actions=("action", "action.grip"))
    (at,), _ = read_all(source, WindowSpec(8, 0, None, fps), [3])
    place = 3 + np.arange(8) * step
    np.testing.assert_allclose(at.actions[:, 0], 0.5 + place, atol=1e-4)  # the writer's action is a line in the row
    np.testing.assert_array_equal(at.actions[:, 3], np.floor(place + 1e-3) % 2)  # a whole number is held, not blended
    assert not at.is_pad.any() and at.state[0] == 3  # images and state stay at the frame's own time
    (end,), _ = read_all(source, WindowSpec(8, 0, None, fps), [22])
    np.testing.assert_array_equal(end.is_pad, 22 + np.arange(8) * step > 23 + 1e-3)
    np.testing.assert_allclose(end.actions[end.is_pad, 0], 23.5)


def test_the_dataset_s_own_rate_changes_nothing(filmed):
    plain, _ = read_all(open_source(filmed), WindowSpec(5, 1), [0, 7, 22])
    same, _ = read_all(open_source(filmed, fps=30.0), WindowSpec(5, 1, None, 30.0), [0, 7, 22])
    for a, b in zip(plain, same):
        np.testing.assert_array_equal(a.actions, b.actions)
        np.testing.assert_array_equal(a.is_pad, b.is_pad)
        np.testing.assert_array_equal(a.images["front"], b.images["front"])


@pytest.mark.parametrize("fps", [30.0, 20.0])
def test_uneven_rows_are_taken_by_their_times_at_any_rate_that_is_asked_for(fps, tmp_path):
    """Also at info.json's own, from which the rows stray."""
    times = np.cumsum(np.random.default_rng(5).integers(600, 9000, 20)) / 90_000
    dataset = Dataset(lengths=(20,), seconds=[times - times[0]], cameras={})
    root = write(tmp_path / "set", replace(dataset, columns=DEFAULT_COLUMNS))
    (window,), _ = read_all(open_source(root, fps=fps), WindowSpec(6, 0, None, fps), [4])
    wanted = np.interp(times[4] + np.arange(6) / fps, times, np.arange(20))
    np.testing.assert_allclose(window.actions[:, 0], 0.5 + wanted, atol=2e-2)
    (plain,), _ = read_all(open_source(root), WindowSpec(6), [4])
    np.testing.assert_allclose(plain.actions[:, 0], 4.5 + np.arange(6), atol=1e-5)


@pytest.mark.parametrize("fps", [10.0, 15.0, 60.0])
def test_history_at_another_rate_is_the_frames_of_that_time_decoded_once(fps, filmed):
    source = open_source(filmed, fps=fps)
    single, _ = read_all(source, WindowSpec(2), range(24))
    frames, decoded = read_all(source, WindowSpec(2, 2, None, fps), range(24))
    assert decoded <= 24 + 2
    for f, window in enumerate(frames):
        back = [max(0, int(f - k * 30 / fps + 0.5)) for k in (2, 1, 0)]  # in the middle of two the later one
        for image, row in zip(window.images["front"], back):
            np.testing.assert_array_equal(image, single[row].images["front"][0])
