"""`LeRobotSource` on real v3.0 and v2.1 fixtures and on written datasets: rows, frames, prompts, blocks, errors."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opentau_train.config.data import SourceSettings
from opentau_train.config.typed import build
from opentau_train.data.decode.video import reader_bytes
from opentau_train.data.lerobot.identity import file_stats
from opentau_train.data.lerobot.source import LeRobotDataset
from opentau_train.data.mixture import open as mixture
from opentau_train.errors import BadSample, UserError
from opentau_train.types import WindowSpec
from tests.lerobot_writer import (
    AV1,
    DEFAULT_COLUMNS,
    H264_B,
    HEVC_B,
    TICKS,
    Camera,
    Dataset,
    decode_all,
    picture,
    png,
    row_seconds,
    task_text,
    vector,
    write,
)

FIXTURES = Path(__file__).parents[3] / "data"
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
LENGTHS = (11, 7, 13, 9, 5)
_GAPS = np.random.default_rng(3)
UNEVEN = [np.cumsum(_GAPS.integers(900, 9000, n)) / TICKS for n in LENGTHS]
UNEVEN = [s - s[0] for s in UNEVEN]

DATASETS = {
    "h264_b_30fps": Dataset(
        cameras={FRONT: Camera(gop=30, options=H264_B), WRIST: Camera(size=(48, 48), episodes_per_file=2)}
    ),
    "hevc_10fps_one_row_group": Dataset(
        fps=10, cameras={FRONT: Camera("libx265", gop=12, options=HEVC_B)}, episodes_per_data_file=5
    ),
    "av1_50fps_small_row_groups": Dataset(
        fps=50, cameras={FRONT: Camera("libsvtav1", options=AV1)}, episodes_per_data_file=3, row_group_rows=4
    ),
    "uneven_times": Dataset(seconds=UNEVEN, cameras={FRONT: Camera(gop=12, options=H264_B, shift_s=0.4)}),
    "images": Dataset(cameras={FRONT: Camera(None), WRIST: Camera(None, size=(32, 48))}),
    "v21_mixed_cameras": Dataset(version="v2.1", cameras={FRONT: Camera(gop=30, options=H264_B), WRIST: Camera(None)}),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """name -> root of that dataset; never changed by a test."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = write(tmp_path_factory.mktemp("written") / name, DATASETS[name])
        return made[name]

    return make


def open_source(root: Path, **changes) -> LeRobotDataset:
    return mixture.open_source("main", build(SourceSettings, {"root": str(root), **changes}, "data.sources.main"))


class Oracle:
    """The frames of a dataset's mp4 files, each decoded from its start, addressed through the raw metadata."""

    def __init__(self, root: Path):
        self.root, self.files = root, {}
        self.info = json.loads((root / "meta/info.json").read_text())
        self.v3 = self.info["codebase_version"] == "v3.0"
        if self.v3:
            parts = [pq.read_table(p) for p in sorted(root.glob("meta/episodes/**/*.parquet"))]
            self.episodes = [row for part in parts for row in part.to_pylist()]

    def rows(self, episode: int) -> list[dict]:
        rows = [r for p in sorted(self.root.glob("data/**/*.parquet")) for r in self._parquet(p)]
        return [r for r in rows if r["episode_index"] == episode]

    def _parquet(self, path: Path) -> list[dict]:
        if path not in self.files:
            self.files[path] = pq.read_table(path).to_pylist()
        return self.files[path]

    def image(self, key: str, episode: int, seconds: float) -> np.ndarray:
        if self.v3:
            row = self.episodes[episode]
            numbers = {f: row[f"videos/{key}/{f}"] for f in ("chunk_index", "file_index")}
            path = self.root / self.info["video_path"].format(video_key=key, **numbers)
            seconds += row[f"videos/{key}/from_timestamp"]
        else:
            path = self.root / self.info["video_path"].format(video_key=key, episode_chunk=0, episode_index=episode)
        if path not in self.files:
            times, frames = decode_all(path)
            self.files[path] = times, [f.to_ndarray(format="rgb24") for f in frames]
        times, frames = self.files[path]
        return frames[int(np.argmin(np.abs(times - seconds)))]


@pytest.mark.parametrize("name", ["lerobot_v30", "lerobot_v21"])
def test_every_window_of_a_real_dataset_equals_the_reference(name):
    source, oracle = open_source(FIXTURES / name), Oracle(FIXTURES / name)
    factory = source.cursors(WindowSpec(chunk_length=5))
    cursor = factory.cursor()
    for e, length in enumerate(source.episodes.length):
        rows = oracle.rows(e)
        assert len(rows) == length
        for f in range(length):
            window = cursor.read(e, f)
            for camera in source.cameras:
                expected = oracle.image(f"observation.images.{camera}", e, rows[f]["timestamp"])
                np.testing.assert_array_equal(window.images[camera], expected[None])
            np.testing.assert_array_equal(window.state, np.float32(rows[f]["observation.state"]))
            chunk = [rows[min(f + t, length - 1)]["action"] for t in range(5)]
            np.testing.assert_array_equal(window.actions, np.float32(chunk))
            assert window.is_pad.tolist() == [f + t >= length for t in range(5)]
            assert len(window.prompts) == 1
    frames = int(source.episodes.length.sum()) * len(source.cameras)
    assert frames <= factory.frames_decoded <= 1.02 * frames + 4
    factory.close()


def _expected_images(root: Path, dataset: Dataset, oracle: Oracle, key: str, e: int, f: int) -> np.ndarray:
    if dataset.cameras[key].codec is None:
        return picture(e, f, key, dataset.cameras[key].size)
    return oracle.image(key, e, row_seconds(dataset, e)[f])


@pytest.mark.parametrize("name", DATASETS)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_windows_in_any_order_equal_the_reference(written, name, data):
    root, dataset, history = written(name), DATASETS[name], data.draw(st.integers(0, 3))
    source, oracle = open_source(root), Oracle(root)
    factory = source.cursors(WindowSpec(chunk_length=4, history=history))
    cursors = [factory.cursor(), factory.cursor()]
    for _ in range(data.draw(st.integers(1, 8))):
        e = data.draw(st.integers(0, len(LENGTHS) - 1))
        first = data.draw(st.integers(0, LENGTHS[e] - 1))
        cursor = data.draw(st.sampled_from(cursors))
        last = data.draw(st.integers(first, min(first + 20, LENGTHS[e] - 1)))
        for f in range(first, last + 1):
            # Told less, all or more than what is read next: that may cost time, and never another picture.
            window = cursor.read(e, f, data.draw(st.sampled_from([0, 1, last - f, LENGTHS[e]])))
            for key in dataset.cameras:
                frames = [max(0, f - back) for back in range(history, -1, -1)]
                expected = [_expected_images(root, dataset, oracle, key, e, i) for i in frames]
                np.testing.assert_array_equal(window.images[key.rpartition(".")[2]], np.stack(expected))
            assert window.state.tolist() == (100 * e + f + np.arange(4) / 16).tolist()
            assert (
                window.actions[1].tolist() == (0.5 + 100 * e + min(f + 1, LENGTHS[e] - 1) + np.arange(3) / 16).tolist()
            )
            assert window.is_pad.tolist() == [f + t >= LENGTHS[e] for t in range(4)]
            assert window.prompts == (task_text(e % 2),)
    factory.close()


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("history", [0, 3])
@pytest.mark.parametrize("told", [False, True])
def test_interleaved_lanes_decode_every_frame_once(written, name, history, told):
    root, dataset = written(name), DATASETS[name]
    source, oracle = open_source(root), Oracle(root)
    factory = source.cursors(WindowSpec(chunk_length=4, history=history))
    lanes = [(factory.cursor(), e) for e in (0, 1, 2)]
    for f in range(max(LENGTHS)):
        for cursor, e in lanes:
            if f < LENGTHS[e]:
                window = cursor.read(e, f, LENGTHS[e] - 1 - f if told else 0)
                for key in dataset.cameras:
                    expected = _expected_images(root, dataset, oracle, key, e, f)
                    np.testing.assert_array_equal(window.images[key.rpartition(".")[2]][-1], expected)
    videos = [c for c in dataset.cameras.values() if c.codec]
    # A lane that starts inside a file decodes from the keyframe before; B-frames are fed ahead of their output.
    lead = sum(3 * (min(c.gop, sum(LENGTHS[:2])) + 4) for c in videos)
    assert factory.frames_decoded <= 1.02 * sum(LENGTHS[:3]) * len(videos) + lead
    factory.close()


@pytest.mark.parametrize("history", [0, 2])
def test_nothing_is_decoded_that_is_not_asked_for(written, history):
    """A run of frames and a jump, again and again: bursts end where the run does."""
    source = open_source(written("av1_50fps_small_row_groups"))
    factory = source.cursors(WindowSpec(chunk_length=4, history=history))
    cursor, used = factory.cursor(), 0
    for e, length in enumerate(LENGTHS):
        for first in range(0, length - 6, 7):
            for f in range(first, first + 5):
                cursor.read(e, f, first + 4 - f)
            used += 5
    starts = (1 + history) * sum(len(range(0, length - 6, 7)) for length in LENGTHS)
    assert factory.frames_decoded <= len(source.cameras) * (used + starts)
    factory.close()


def test_one_lane_over_the_whole_dataset_decodes_every_frame_once(written):
    source = open_source(written("h264_b_30fps"))
    factory = source.cursors(WindowSpec(chunk_length=4, history=2))
    cursor = factory.cursor()
    for e, length in enumerate(LENGTHS):
        for f in range(length):
            cursor.read(e, f)
    files = 2 + 3  # the B-frame decoder's delay is paid at every file at most
    assert factory.frames_decoded <= 1.02 * 2 * sum(LENGTHS) + 2 * files
    factory.close()


def test_images_are_resized_to_the_window(written):
    source = open_source(written("h264_b_30fps"))
    window = source.cursors(WindowSpec(2, history=1, image_size=(32, 40))).cursor().read(1, 3)
    assert {c: i.shape for c, i in window.images.items()} == {"front": (2, 27, 40, 3), "wrist": (2, 32, 32, 3)}


def test_a_source_is_the_same_after_pickling(written):
    source = open_source(written("h264_b_30fps"))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint == source.fingerprint
    one, two = (s.cursors(WindowSpec(4)).cursor().read(3, 2) for s in (source, copy))
    np.testing.assert_array_equal(one.images["front"], two.images["front"])


def test_columns_give_every_row_without_video(written, tmp_path):
    root = write(tmp_path / "set", replace(DATASETS["av1_50fps_small_row_groups"]))
    for path in root.glob("videos/**/*.mp4"):
        path.unlink()
    source = open_source(root, cameras=())
    seen = dict((p, (state, actions)) for p, state, actions in source.columns(np.array([4, 0, 2])))
    assert sorted(seen) == [0, 2, 4]
    for e, (state, actions) in seen.items():
        rows = np.arange(LENGTHS[e])[:, None]
        np.testing.assert_array_equal(state, np.float32(100 * e + rows + np.arange(4) / 16))
        np.testing.assert_array_equal(actions, np.float32(0.5 + 100 * e + rows + np.arange(3) / 16))
        assert state.dtype == actions.dtype == np.float32


def test_blocks_are_whole_episodes(written):
    source = open_source(written("images"), exclude_episodes=(1,))
    assert source.get_shuffle_blocks().tolist() == [[0, 0, 11], [1, 0, 13], [2, 0, 9], [3, 0, 5]]
    assert source.get_shuffle_blocks().dtype == np.int32


@pytest.mark.parametrize("name", ["images", "v21_mixed_cameras"])
def test_chosen_episodes_keep_their_own_rows(written, name):
    source = open_source(written(name), episodes=(3, 1, 4), exclude_episodes=(4,))
    assert source.episodes.episode_index.tolist() == [1, 3]
    cursor = source.cursors(WindowSpec(1)).cursor()
    assert [cursor.read(p, 2).state[0] for p in (0, 1)] == [102.0, 302.0]


def test_fingerprint_follows_content_and_choice(written, tmp_path):
    prints = {open_source(written("images")).fingerprint, open_source(written("images"), episodes=(0, 1)).fingerprint}
    root = write(tmp_path / "set", DATASETS["images"])
    assert open_source(root).fingerprint in prints
    path = next(root.glob("data/**/*.parquet"))
    pq.write_table(pq.read_table(path), path, compression="none")
    prints.add(open_source(root).fingerprint)
    assert len(prints) == 3


def test_fingerprint_sees_a_video_encoded_again(written, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(FIXTURES / "lerobot_v30", root)
    before = open_source(root).fingerprint
    assert open_source(FIXTURES / "lerobot_v30").fingerprint == before
    path = next(root.rglob("*.mp4"))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b"\0\0\0\x08free")  # an empty box: the same frames in a longer file
    longer = open_source(root).fingerprint
    path.unlink()
    assert len({before, longer, open_source(root).fingerprint}) == 3


def test_sizes_of_many_files_come_in_their_order(tmp_path):
    paths = [str(tmp_path / f"{i}") for i in range(1300)]
    for i in range(0, 1300, 2):
        Path(paths[i]).write_bytes(b"x" * (i % 7))
    assert [found.size for found in file_stats(paths)] == [i % 7 if i % 2 == 0 else -1 for i in range(1300)]


def test_rows_that_are_written_again_change_their_stamp_and_a_copy_keeps_the_fingerprint(written, tmp_path):
    root = shutil.copytree(written("images"), tmp_path / "set")
    before = open_source(root)
    path = next((root / "data").rglob("*.parquet"))
    path.write_bytes(path.read_bytes())  # the same size and name
    after = open_source(root)
    assert after.fingerprint == before.fingerprint and after.rows_stamp != before.rows_stamp


def test_fingerprint_sees_rows_computed_again_in_files_of_the_same_sizes(written, tmp_path):
    root = shutil.copytree(written("images"), tmp_path / "set")
    plain = {"compression": "none", "use_dictionary": False}
    paths = sorted((root / "data").rglob("*.parquet"))
    prints, sizes = [], []
    for factor in (1.0, 2.0):
        for path in paths:
            table = pq.read_table(path)
            values = pa.array((np.stack(table["action"].to_numpy()) * factor).tolist(), table["action"].type)
            pq.write_table(table.set_column(table.column_names.index("action"), "action", values), path, **plain)
        prints.append(open_source(root).fingerprint)
        sizes.append([path.stat().st_size for path in paths])
    assert sizes[0] == sizes[1] and prints[0] != prints[1]


@pytest.mark.parametrize("shape", [None, [64, 96], []])
def test_a_camera_may_leave_out_its_shape(shape, tmp_path):
    root = write(tmp_path / "set", Dataset())
    info = json.loads((root / "meta/info.json").read_text())
    info["features"][FRONT]["shape"] = shape
    (root / "meta/info.json").write_text(json.dumps(info))
    (size,) = open_source(root).frame_sizes.values()
    assert size == ((64, 96) if shape else (0, 0)) and reader_bytes(size, (32, 32)) > 600_000


@pytest.mark.parametrize(("column", "width"), [("observation.state", 4), ("action", 3)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_a_bad_sample_of_the_windows_that_hold_it(column, width, value, tmp_path):
    def values(e, f):
        return [value if (e, f) == (1, 4) else 0.5] * width

    feature = {"dtype": "float32", "shape": [width], "names": None}
    root = write(tmp_path / "set", Dataset(cameras={}, columns={**DEFAULT_COLUMNS, column: (feature, values)}))
    cursor = open_source(root).cursors(WindowSpec(chunk_length=3)).cursor()
    bad = []
    for frame in range(LENGTHS[1]):
        try:
            cursor.read(1, frame)
        except BadSample as error:
            assert (error.episode, error.frame) == (1, frame) and f"{column}[0] is {value}" in error.cause
            bad.append(frame)
    assert bad == ([4] if column == "observation.state" else [2, 3, 4])
    cursor.read(0, 4)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 0.0, float(np.float32(2 / 30))])
def test_an_episode_whose_times_do_not_rise_is_a_bad_sample_and_the_others_are_read(wrong, tmp_path):
    root = write(tmp_path / "set", Dataset())
    for path in (root / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        place = [(e, f) for e, f in zip(table["episode_index"].to_pylist(), table["frame_index"].to_pylist())]
        times = [wrong if at == (1, 3) else t for at, t in zip(place, table["timestamp"].to_pylist())]
        column = pa.array(times, table["timestamp"].type)
        pq.write_table(table.set_column(table.column_names.index("timestamp"), "timestamp", column), path)
    for fps in (None, 5.0):
        cursor = open_source(root, fps=fps).cursors(WindowSpec(3, 1, None, fps)).cursor()
        with pytest.raises(BadSample, match="timestamps of an episode must rise: row 3"):
            cursor.read(1, 5)
        cursor.read(2, 5)


def small(tmp_path: Path, **changes) -> Path:
    """A dataset without cameras."""
    return write(tmp_path / "set", replace(Dataset(lengths=(4, 3), cameras={}), **changes))


def test_flat_columns_are_joined_in_the_order_of_info_json(tmp_path):
    columns = {
        "observation.state.joint": vector(2, names=["a", "b"]),
        "observation.state.note": ({"dtype": "string", "shape": [1]}, lambda e, f: "x"),
        "observation.state.gripper": ({"dtype": "float64", "shape": [1]}, lambda e, f: float(-f)),
        "action": vector(2, names={"motors": ["m0", "m1"]}),
        "action.other": vector(2),
    }
    source = open_source(small(tmp_path, columns=columns))
    assert source.state_names == (
        "observation.state.joint.a",
        "observation.state.joint.b",
        "observation.state.gripper[0]",
    )
    assert source.action_names == ("action.m0", "action.m1")
    assert source.cursors(WindowSpec(1)).cursor().read(1, 2).state.tolist() == [102.0, 102.0625, -2.0]


def test_given_columns_are_joined_as_given(tmp_path):
    columns = {"action": vector(2), "action.b": vector(1, 7, names={"y": 0}), "flag": vector(1, dtype="int64")}
    columns["flag"] = (columns["flag"][0], lambda e, f: [f])
    source = open_source(small(tmp_path, columns=columns), state=("flag", "action"), actions=("action.b", "flag"))
    assert source.state_names == ("flag[0]", "action[0]", "action[1]")
    assert source.action_names == ("action.b.y", "flag[0]")
    window = source.cursors(WindowSpec(2)).cursor().read(0, 1)
    assert window.state.tolist() == [1.0, 1.0, 1.0625]
    assert window.actions.tolist() == [[8.0, 1.0], [9.0, 2.0]]


def test_a_dataset_without_state_has_an_empty_one(tmp_path):
    source = open_source(small(tmp_path, columns={"action": vector(2)}))
    assert source.state_names == ()
    assert source.cursors(WindowSpec(3)).cursor().read(0, 0).state.shape == (0,)


def test_cameras_are_named_by_their_last_part_unless_that_is_ambiguous(tmp_path):
    keys = {"left.rgb": Camera(None), "right.rgb": Camera(None), FRONT: Camera(None)}
    root = write(tmp_path / "set", Dataset(lengths=(2,), cameras=keys))
    assert open_source(root).cameras == ("left.rgb", "right.rgb", "front")
    assert open_source(root, cameras=("right.rgb",)).cameras == ("rgb",)
    source = open_source(root, cameras={"eye": "right.rgb"})
    window = source.cursors(WindowSpec(1)).cursor().read(0, 1)
    np.testing.assert_array_equal(window.images["eye"][0], picture(0, 1, "right.rgb", (64, 96)))
    assert open_source(root, cameras=()).cameras == ()


@pytest.mark.parametrize("column", ["task", "__index_level_0__", "something"])
@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_prompts_come_from_the_row_s_task(tmp_path, column, version):
    root = small(tmp_path, task_column=column, version=version)
    assert open_source(root).cursors(WindowSpec(1)).cursor().read(1, 0).prompts == (task_text(1),)
    source = open_source(root, prompt_separator=" | ")
    assert source.cursors(WindowSpec(1)).cursor().read(1, 0).prompts == ("task 1", "alternatively task 1")


def test_prompt_columns_leave_out_empty_texts_and_fall_back_on_the_task(tmp_path):
    text = {"dtype": "string", "shape": [1], "names": None}
    second = ["", "two | three ", "", None]
    columns = {
        "instruction": (text, lambda e, f: "" if f in (0, 3) else f"say {f}"),
        "instruction_2": (text, lambda e, f: second[f]),
    }
    root = small(tmp_path, columns=columns)
    source = open_source(root, prompt_columns=("instruction", "instruction_2"), prompt_separator="|")
    cursor = source.cursors(WindowSpec(1)).cursor()
    assert [cursor.read(0, f).prompts for f in range(4)] == [
        ("task 0", "alternatively task 0"),
        ("say 1", "two", "three"),
        ("say 2",),
        ("task 0", "alternatively task 0"),
    ]
    assert set(source.prompts(np.array([0]))) == {p for f in range(4) for p in cursor.read(0, f).prompts}


def test_the_tasks_are_told_as_prompts_without_reading_a_row(tmp_path):
    root = small(tmp_path)
    source = open_source(root, prompt_separator="|")
    for file in (root / "data").rglob("*.parquet"):
        file.unlink()
    assert {"task 0", "alternatively task 0", "task 1"} <= set(source.prompts(np.array([0])))


def test_control_mode_is_taken_from_the_first_place_that_has_it(tmp_path):
    text = {"dtype": "string", "shape": [1], "names": None}
    rows = {"control_mode": (text, lambda e, f: "joint" if e == 0 or (e == 1 and f < 2) else "ee")}
    lengths = (4, 3, 2)

    def modes(name: str, change: dict | None = None, **written) -> list[str]:
        table = open_source(small(tmp_path / name, lengths=lengths, **written), **(change or {})).episodes
        return [table.control_modes[c] for c in table.control_mode]

    assert modes("none") == ["default"] * 3
    assert modes("rows", columns=rows) == ["joint", "mixed", "ee"]
    assert modes("meta", columns=rows, episode_columns={"control_mode": ["a", "b", "a"]}) == ["a", "b", "a"]
    assert modes(
        "meta21", version="v2.1", episode_columns={"cm": ["a", None, "c"]}, change={"control_mode_column": "cm"}
    ) == ["a", "default", "c"]
    assert modes("info", columns=rows, info={"control_mode": "ee"}) == ["ee"] * 3
    assert modes("setting", {"control_mode": "mine"}, info={"control_mode": "ee"}) == ["mine"] * 3


def test_robot_type_is_taken_from_the_first_place_that_has_it(tmp_path):
    root = small(tmp_path)
    assert open_source(root).robot_type == "arm"
    assert open_source(root, robot_type="other").robot_type == "other"
    assert open_source(small(tmp_path / "null", info={"robot_type": None})).robot_type == "unknown"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"cameras": ("observation.images.fron",)}, "did you mean 'observation.images.front'"),
        ({"cameras": {"eye": "action"}}, "'action' is a float32 column"),
        ({"state": ("observation.stat",)}, "did you mean 'observation.state'"),
        ({"actions": ("actions",)}, r"did you mean 'action'.*[\s\S]*main\.actions[\s\S]*observation\.state, action"),
        (
            {"prompt_columns": ("instruction",)},
            "text or integer columns: frame_index, .*task_index",
        ),
        ({"control_mode_column": "robot_mode"}, r"'robot_mode' is not in the dataset[\s\S]*control_mode_column"),
        ({"episodes": (0, 77)}, r"episode 77 is not[\s\S]*main\.episodes[\s\S]*5 episodes, 0 to 4"),
        ({"exclude_episodes": (5,)}, r"episode 5 is not[\s\S]*exclude_episodes"),
        ({"exclude_episodes": (0, 1, 2, 3, 4)}, "no episode is left"),
    ],
)
def test_a_wrong_setting_is_named_with_what_there_is(written, change, what):
    with pytest.raises(UserError, match=what) as caught:
        open_source(written("images"), **change)
    assert caught.value.remedy


def test_a_directory_that_is_no_dataset_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere doesn't exist[\s\S]*data\.sources\.main"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"not a LeRobot dataset: it has no meta/info\.json[\s\S]*main\.root"):
        open_source(tmp_path)
    with pytest.raises(UserError, match=r"format v2\.2 can't be read, only v3\.0, v2\.1 and v2\.0[\s\S]*convert"):
        open_source(small(tmp_path, info={"codebase_version": "v2.2"}))


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_each_broken_metadata_file_is_named(tmp_path, version):
    root = small(tmp_path, version=version)
    for path in sorted((root / "meta").rglob("*.*")):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * 2 // 3])
        with pytest.raises(UserError, match=path.name):
            open_source(root)
        path.write_bytes(whole)
    tasks = next((root / "meta").glob("tasks.*"))
    tasks.unlink()
    with pytest.raises(UserError, match=tasks.name):
        open_source(root)


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_tasks_are_needed_only_where_the_data_refer_to_them(tmp_path, version):
    columns = {"action": vector(2), "observation.state": vector(4)}
    root = small(tmp_path, version=version, columns=columns)
    next((root / "meta").glob("tasks.*")).unlink()
    for path in root.glob("data/**/*.parquet"):
        _rewrite(path, lambda table: table.drop_columns(["task_index"]))
    info = json.loads((root / "meta/info.json").read_text())
    del info["features"]["task_index"]
    (root / "meta/info.json").write_text(json.dumps(info))
    window = open_source(root).cursors(WindowSpec(2)).cursor().read(1, 2)
    assert window.prompts == () and window.state[0] == 102.0


@pytest.mark.parametrize("feature", [None, {"dtype": "string", "shape": [1]}], ids=["none", "text"])
def test_video_without_timestamps_is_refused_when_the_source_is_opened(tmp_path, feature):
    root = write(tmp_path / "set", Dataset(lengths=(4, 3)))
    info = json.loads((root / "meta/info.json").read_text())
    del info["features"]["timestamp"]
    info["features"] |= {} if feature is None else {"timestamp": feature}
    (root / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"video, but meta/info.json lists no 'timestamp'") as caught:
        open_source(root)
    assert caught.value.where.endswith("meta/info.json") and "data.sources.main.cameras=[]" in caught.value.remedy
    assert open_source(root, cameras=()).cursors(WindowSpec(2)).cursor().read(1, 2).images == {}


FLAG = ({"dtype": "bool", "shape": [1]}, lambda e, f: [f % 2 == 0])


def test_columns_that_null_leaves_out_are_warned_of(tmp_path, caplog):
    caplog.set_level("WARNING", "opentau_train")
    columns = {"observation.state.on": FLAG, "action.joint": vector(2), "action.open": FLAG, "action.grip": vector(1)}
    # The writer takes its own action and state wherever no "action" is given.
    root = small(tmp_path, columns={"action": vector(1), **columns})
    info = json.loads((root / "meta/info.json").read_text())
    del info["features"]["action"]
    (root / "meta/info.json").write_text(json.dumps(info))
    source = open_source(root)
    assert source.state_names == () and source.action_names == ("action.joint[0]", "action.joint[1]", "action.grip[0]")
    state, actions = (record.getMessage() for record in caplog.records)
    assert "no floats: observation.state.on; data.sources.main.state=[observation.state.on] takes" in state
    assert "no floats: action.open; data.sources.main.actions=[action.joint,action.grip,action.open] takes" in actions
    caplog.clear()
    open_source(root, state=(), actions=("action.joint",))
    assert not caplog.records, "what is set is meant"


def test_a_dataset_without_state_is_warned_of(tmp_path, caplog):
    caplog.set_level("WARNING", "opentau_train")
    root = small(tmp_path, columns={"action": vector(2), "action.extra": FLAG})
    open_source(root)
    (record,) = caplog.records
    assert "no observation.state; data.sources.main.state=[COLUMN,...]" in record.getMessage()


@pytest.mark.parametrize("key", ["features", "fps", "data_path"])
def test_a_key_missing_from_info_json_is_named(tmp_path, key):
    with pytest.raises(UserError, match=f"info.json has no '{key}'"):
        open_source(small(tmp_path, info={key: None}))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        *(({"fps": fps}, r"'fps' must be a number greater than 0") for fps in ("fast", 0, -5, True, [30], math.inf)),
        ({"fps": None}, "has no 'fps'"),
        ({"features": []}, "'features' must be a mapping"),
        ({"features": {"action": None}}, r"'features\.action' must be a mapping, got null"),
        ({"features": {"action": "float32"}}, r"'features\.action' must be a mapping, got \"float32\""),
        ({"features": {"action": {"dtype": ["float32"], "shape": [3]}}}, r"'features\.action\.dtype'"),
        ({"features": {"action": {"dtype": "float32", "shape": 3}}}, r"'features\.action\.shape'"),
        ({"features": {"action": {"dtype": "float32", "shape": ["three"]}}}, r"'features\.action\.shape'"),
        ({"chunks_size": "many"}, "'chunks_size' must be a whole number"),
    ],
    ids=str,
)
def test_a_wrong_value_in_info_json_is_named_with_its_key(tmp_path, change, what):
    with pytest.raises(UserError, match=rf"meta/info\.json:? {what}") as caught:
        open_source(small(tmp_path, info=change))
    assert caught.value.where.endswith("meta/info.json") and "restore the file" in caught.value.remedy


def test_missing_episode_metadata_is_named(tmp_path):
    root = small(tmp_path / "v21", version="v2.1")
    path = root / "meta/episodes.jsonl"
    path.write_text(path.read_text().replace('"length": 3', '"size": 3'))
    with pytest.raises(UserError, match=r"no 'length'[\s\S]*episodes\.jsonl"):
        open_source(root)
    root = small(tmp_path / "v30")
    path = root / "meta/episodes/chunk-000/file-001.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["dataset_to_index"]), path)
    with pytest.raises(UserError, match=r"no column 'dataset_to_index'[\s\S]*file-001\.parquet"):
        open_source(root)
    for path in (root / "meta/episodes").rglob("*.parquet"):
        path.unlink()
    with pytest.raises(UserError, match=r"no episode metadata"):
        open_source(root)


def _assert_rows_fail(source: LeRobotDataset, bad: int, good: int, cause: str) -> None:
    """The episode at `bad` fails in both ways of reading rows, naming its file, and `good` can be read after that."""
    cursor = source.cursors(WindowSpec(1)).cursor()
    file = rf"episode_{bad:06d}\.parquet"
    with pytest.raises(BadSample, match=rf"{file}[\s\S]*{cause}") as caught:
        cursor.read(bad, 0)
    assert (caught.value.dataset, caught.value.episode, caught.value.frame) == ("main", bad, 0)
    assert cursor.read(good, 1).state[0] == 100 * good + 1
    with pytest.raises(UserError, match=rf"{cause}[\s\S]*{file}"):
        list(source.columns(np.array([bad])))


def _rewrite(path: Path, change) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def _with_column(name: str, values: list, kind: pa.DataType | None = None):
    return lambda table: table.set_column(table.column_names.index(name), name, pa.array(values, kind))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (_with_column("action", [[0.0] * 3, None, [0.0] * 3], pa.list_(pa.float32())), "'action' has a null"),
        (_with_column("action", [[0.0, None, 0.0]] * 3, pa.list_(pa.float32())), "'action' has a null"),
        (
            _with_column("action", [[0.0] * 2, [0.0] * 4, [0.0] * 3], pa.list_(pa.float32())),
            "'action' doesn't have the 3",
        ),
        (_with_column("action", [[0.0] * 5] * 3, pa.list_(pa.float32(), 5)), "'action' doesn't have the 3"),
        (_with_column("action", [["a"] * 3] * 3), "'action' holds string"),
        (lambda t: t.drop_columns(["action"]), "no column 'action'"),
    ],
)
def test_rows_that_contradict_the_metadata_are_bad_samples(tmp_path, change, cause):
    root = small(tmp_path, version="v2.1")
    _rewrite(root / "data/chunk-000/episode_000001.parquet", change)
    _assert_rows_fail(open_source(root), 1, 0, cause)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda t: t.slice(0, 2), "episode 1 has 2 rows, the metadata give it 3"),
        (_with_column("episode_index", [0, 0, 0], pa.int64()), "no rows of episode 1"),
        (_with_column("frame_index", [0, 1, 1], pa.int64()), "episode 1 has 2 rows"),
    ],
)
def test_an_episode_whose_own_rows_are_not_there_is_left_out_by_its_number(tmp_path, change, cause, caplog):
    root = small(tmp_path, version="v2.1")
    _rewrite(root / "data/chunk-000/episode_000001.parquet", change)
    source = open_source(root)
    cursor = source.cursors(WindowSpec(1)).cursor()
    with pytest.raises(BadSample, match=rf"episode_000001\.parquet: {cause}"):
        cursor.read(1, 0)
    assert cursor.read(0, 1).state[0] == 1
    assert [position for position, _, _ in source.columns(np.arange(2))] == [0]
    assert "data.sources.main" in caplog.text and "episodes 1 (" in caplog.text and cause in caplog.text


def test_a_damaged_parquet_file_is_a_bad_sample(tmp_path):
    root = small(tmp_path, version="v2.1")
    path = root / "data/chunk-000/episode_000001.parquet"
    whole = path.read_bytes()
    _rewrite(path, lambda table: table)
    for damaged in (whole[: len(whole) // 2], b"PAR1", whole[:8] + bytes(b ^ 0xFF for b in whole[8:400]) + whole[400:]):
        path.write_bytes(damaged)
        _assert_rows_fail(open_source(root), 1, 0, "")
    path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UserError, match=r"rows of episode 1 are missing[\s\S]*exclude_episodes=\[1\]"):
            open_source(root)
        path.unlink(missing_ok=True)


def test_a_damaged_video_is_a_bad_sample_and_other_episodes_are_read(tmp_path):
    dataset = Dataset(lengths=(6, 6), cameras={FRONT: Camera(episodes_per_file=1)})
    root = write(tmp_path / "set", dataset)
    path = root / f"videos/{FRONT}/chunk-000/file-000.mp4"
    whole = path.read_bytes()
    source = open_source(root)
    factory = source.cursors(WindowSpec(1))
    cursor = factory.cursor()
    for damage in (lambda: path.write_bytes(whole[: len(whole) // 2]), path.unlink):
        damage()
        with pytest.raises(BadSample, match=r"dataset main, episode 0, frame 3: .*file-000\.mp4"):
            cursor.read(0, 3)
        assert cursor.read(1, 3).images["front"].shape == (1, 64, 96, 3)
    factory.close()


def test_a_row_without_its_frame_is_a_bad_sample(tmp_path):
    late = [np.arange(6) / 30, np.arange(6) / 30]
    root = write(tmp_path / "set", Dataset(lengths=(6, 6), cameras={FRONT: Camera()}, seconds=late))
    _rewrite(
        root / "data/chunk-000/file-000.parquet",
        _with_column("timestamp", [i / 30 + 0.01 for i in range(6)] * 2, pa.float32()),
    )
    with pytest.raises(BadSample, match=r"no frame within 0\.0001 s of 0\.110000 s: the nearest is at 0\.100000 s"):
        open_source(root).cursors(WindowSpec(1)).cursor().read(0, 3)
    assert open_source(root, tolerance_s=0.011).cursors(WindowSpec(1)).cursor().read(0, 3).images


def test_images_may_be_raw_bytes_files_or_missing(tmp_path):
    root = write(tmp_path / "set", Dataset(lengths=(4,), cameras={FRONT: Camera(None)}))
    path = root / "data/chunk-000/file-000.parquet"
    shown = picture(0, 0, FRONT, (64, 96))
    (root / "still.png").write_bytes(png(shown))
    cells = [
        {"bytes": None, "path": "still.png"},
        {"bytes": png(shown)[:50], "path": None},
        None,
        {"bytes": None, "path": "no"},
    ]
    _rewrite(path, _with_column(FRONT, cells))
    cursor = open_source(root).cursors(WindowSpec(1)).cursor()
    np.testing.assert_array_equal(cursor.read(0, 0).images["front"][0], shown)
    for f in (1, 2, 3):
        with pytest.raises(BadSample, match=rf"frame {f}: .*file-000\.parquet: column 'observation\.images\.front'"):
            cursor.read(0, f)
    _rewrite(path, _with_column(FRONT, [png(shown)] * 4))
    cursor = open_source(root).cursors(WindowSpec(1)).cursor()
    np.testing.assert_array_equal(cursor.read(0, 3).images["front"][0], shown)


def test_returned_arrays_belong_to_the_caller(written):
    cursor = open_source(written("h264_b_30fps")).cursors(WindowSpec(2, history=1)).cursor()
    first = cursor.read(0, 2)
    kept = first.images["front"].copy(), first.state.copy(), first.actions.copy()
    first.images["front"][:] = 0
    first.state[:] = first.actions[:] = -1
    again = cursor.read(0, 2)
    for array, expected in zip((again.images["front"], again.state, again.actions), kept):
        np.testing.assert_array_equal(array, expected)


def test_a_frame_outside_the_episode_is_a_programming_error(written):
    cursor = open_source(written("images")).cursors(WindowSpec(1)).cursor()
    for frame in (-1, 11):
        with pytest.raises(IndexError):
            cursor.read(0, frame)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_never_raise_anything_but_the_promised_errors(written, tmp_path_factory, data):
    root = tmp_path_factory.mktemp("flipped") / "set"
    shutil.copytree(written("v21_mixed_cameras"), root)
    names = [
        "data/chunk-000/episode_000001.parquet",
        f"videos/chunk-000/{FRONT}/episode_000001.mp4",
        "meta/tasks.jsonl",
    ]
    path = root / data.draw(st.sampled_from(names))
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=5)):
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        source = open_source(root)
        factory = source.cursors(WindowSpec(2))
        cursor = factory.cursor()
        for f in (0, 5):
            with contextlib.suppress(BadSample):
                cursor.read(1, f)
        if "tasks" not in path.name:
            assert cursor.read(0, 0).state[0] == 0.0
        factory.close()
        list(source.columns(np.array([1])))
    except UserError as error:
        assert path.name in str(error)
