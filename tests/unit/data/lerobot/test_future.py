"""Future frames of windows: which they are, that each frame is decoded once, and what a broken one costs."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opentau_train.data.chunk import chunk_places
from opentau_train.data.lerobot.near_frames import future_rows
from opentau_train.errors import BadSample
from opentau_train.types import WindowSpec
from tests.lerobot_writer import Camera, Dataset, write
from tests.unit.data.lerobot.test_source import open_source

LENGTH = 24
CAMERAS = {
    "observation.images.front": Camera(),
    "observation.images.wrist": Camera(codec=None),
    "observation.images.side": Camera(),
}


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    """Two episodes at 30 fps in one file a camera; the wrist's pictures are in the rows."""
    return write(tmp_path_factory.mktemp("filmed") / "set", Dataset(lengths=(LENGTH, 9), cameras=CAMERAS))


@pytest.fixture(scope="module")
def single(filmed):
    """[camera][frame of episode 0]: the pictures, read one by one."""
    with closing(open_source(filmed).cursors(WindowSpec(2))) as factory:
        windows = [factory.cursor().read(0, f) for f in range(LENGTH)]
    return {camera: [w.images[camera][0] for w in windows] for camera in windows[0].images}


def spec(num=3, stride=2, cameras=("front", "wrist"), **others):
    return replace(WindowSpec(2, **others), future=num, future_stride=stride, future_cameras=cameras)


@pytest.mark.parametrize(("history", "fps"), [(0, None), (2, None), (0, 15.0), (1, 20.0), (0, 60.0)])
def test_future_frames_are_those_of_their_time_and_the_last_one_repeats(history, fps, filmed, single):
    source, num, stride = open_source(filmed, fps=fps), 3, 2
    with closing(source.cursors(spec(num, stride, history=history, fps=fps))) as factory:
        cursor = factory.cursor()
        for f in range(LENGTH):
            window, place = cursor.read(0, f, future=True), f + np.arange(1, num + 1) * stride * 30 / (fps or 30)
            wanted = np.minimum(np.floor(place + 0.51), LENGTH - 1).astype(int)
            assert window.extra["future_is_pad"].tolist() == (place > LENGTH - 1 + 1e-6).tolist()
            for camera in ("front", "wrist"):
                assert len(window.images[camera]) == history + 1 + num
                for image, row in zip(window.images[camera][history + 1 :], wanted, strict=True):
                    np.testing.assert_array_equal(image, single[camera][row])
            np.testing.assert_array_equal(window.images["front"][history], single["front"][f])
            assert len(window.images["side"]) == history + 1  # not chosen


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num=st.integers(1, 5),
    stride=st.integers(1, 3),
    history=st.integers(0, 2),
    told=st.booleans(),
    wanted=st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH),
)
def test_a_lane_decodes_each_frame_once_whichever_windows_want_their_future(
    filmed, single, num, stride, history, told, wanted
):
    with closing(open_source(filmed).cursors(spec(num, stride, history=history))) as factory:
        cursor = factory.cursor()
        for f in range(LENGTH):
            for _ in range(2):  # as a validation in two modes does
                window = cursor.read(0, f, LENGTH - 1 - f if told else 0, future=wanted[f])
            later = [min(f + k * stride, LENGTH - 1) for k in range(1, num + 1)] * wanted[f]
            frames = [*(max(0, f - back) for back in range(history, -1, -1)), *later]
            np.testing.assert_array_equal(window.images["front"], np.stack([single["front"][row] for row in frames]))
            assert ("future_is_pad" in window.extra) == wanted[f]
        videos = 2
        assert factory.frames_decoded <= videos * (LENGTH + 1)


def test_nothing_is_decoded_beyond_the_future_that_is_asked_for(filmed):
    """Neither of the other cameras, nor for a window that wants none, nor in the next episode."""
    with closing(open_source(filmed).cursors(spec(4, 1, ("front",)))) as factory:
        factory.cursor().read(0, 3)
        before = factory.frames_decoded
        assert before <= 2 * (3 + 2)  # from the keyframe on
    with closing(open_source(filmed).cursors(spec(4, 1, ("front",)))) as factory:
        factory.cursor().read(0, 3, future=True)
        assert 0 < factory.frames_decoded - before <= 4
    with closing(open_source(filmed).cursors(spec(9, 1, ("front",)))) as factory:
        window = factory.cursor().read(0, LENGTH - 2, 1, future=True)
        assert window.extra["future_is_pad"].tolist() == [False] + [True] * 8
        assert factory.frames_decoded <= 2 * (LENGTH + 1)


def test_a_window_whose_future_can_not_be_read_is_a_bad_sample_and_others_are_not(tmp_path):
    root = write(tmp_path / "set", Dataset(lengths=(12,), cameras={"observation.images.wrist": Camera(codec=None)}))
    break_image(root, 7)
    with closing(open_source(root).cursors(spec(2, 2, ("wrist",)))) as factory:
        cursor = factory.cursor()
        assert len(cursor.read(0, 3).images["wrist"]) == 1
        with pytest.raises(BadSample, match=r"column 'observation\.images\.wrist'"):
            cursor.read(0, 3, future=True)
        assert len(cursor.read(0, 8, future=True).images["wrist"]) == 3


def break_image(root, row):
    """Cut the picture of a row in half."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (path,) = root.glob("data/**/*.parquet")
    table = pq.read_table(path)
    name = "observation.images.wrist"
    cells = table[name].to_pylist()
    cells[row] = {**cells[row], "bytes": cells[row]["bytes"][:40]}
    column = pa.array(cells, table.schema.field(name).type)
    pq.write_table(table.set_column(table.column_names.index(name), name, column), path)


@given(st.integers(0, 30), st.integers(1, 6), st.integers(1, 4), st.integers(1, 31))
def test_future_rows_of_even_rows_are_counted(frame, num, stride, length):
    frame = min(frame, length - 1)
    rows, is_pad = future_rows(chunk_places(frame, num * stride + 1, 1.0)[stride::stride], length)
    steps = frame + stride * np.arange(1, num + 1)
    assert rows.tolist() == np.minimum(steps, length - 1).tolist() and is_pad.tolist() == (steps >= length).tolist()
