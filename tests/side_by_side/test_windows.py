"""Every window as LeRobot's own dataset class gives it: actions, padding, state, task, pixels, history."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from opentau_train.config.data import SourceSettings
from opentau_train.data.lerobot.options import LeRobotSource
from opentau_train.data.lerobot.rows import Reading
from opentau_train.data.lerobot.source import LeRobotDataset
from opentau_train.types import RawWindow, WindowSpec
from tests import lerobot_writer
from tests.lerobot_writer import AV1, H264_B, Camera
from tests.program import DATA

pytestmark = pytest.mark.lerobot

CHUNK, HISTORY = 9, 2
CAMERAS = {
    "observation.images.front": Camera(options=H264_B, gop=7, episodes_per_file=2),
    "observation.images.wrist": Camera("libsvtav1", options=AV1, episodes_per_file=3),
    "observation.images.still": Camera(None),
}
GENERATED = lerobot_writer.Dataset(
    lengths=(11, 7, 13, 1, 9, 5, 12), cameras=CAMERAS, episodes_per_data_file=2, row_group_rows=10
)


def open_source(root: Path) -> LeRobotDataset:
    return LeRobotSource().open("set", SourceSettings(root=str(root)))


def mismatches(lerobot, source: LeRobotDataset, root: Path) -> list[tuple[int, int, str]]:
    """(episode, frame, field) of all that `source` reads otherwise than LeRobot reads the dataset at `root`, "window"
    standing for one that it hasn't."""
    reading, fps, table = source.reading, source.fps, source.episodes
    cameras = {**reading.images, **{c: places.files.video_key for c, places in reading.stored.videos.items()}}
    past = [-k / fps for k in range(HISTORY, -1, -1)]
    times = {c.name: [k / fps for k in range(CHUNK)] for c in reading.actions} | dict.fromkeys(cameras.values(), past)
    reference = lerobot.Dataset("own/set", root=root, delta_timestamps=times, video_backend="pyav")
    assert len(reference) >= int(table.length.sum())
    position, wrong = {number: p for p, number in enumerate(table.episode_index.tolist())}, []
    with closing(source.cursors(WindowSpec(CHUNK, HISTORY))) as cursors:
        cursor = cursors.cursor()
        for place in range(len(reference)):
            item = reference[place]
            number, frame = int(item["episode_index"]), int(item["frame_index"])
            ahead = int(table.length[position[number]]) - 1 - frame
            fields = (
                ["window"]
                if ahead < 0
                else differing(cursor.read(position[number], frame, ahead), item, reading, cameras)
            )
            wrong += [(number, frame, field) for field in fields]
    return wrong


def differing(window: RawWindow, item: dict, reading: Reading, cameras: dict[str, str]) -> list[str]:
    """The fields in which a window differs from LeRobot's `item`; `cameras` {name: column}."""
    actions = np.concatenate([item[c.name].reshape(CHUNK, c.dim) for c in reading.actions], axis=1)
    state = np.concatenate([item[c.name].reshape(c.dim) for c in reading.state])
    pads = [item[f"{c.name}_is_pad"].numpy() for c in reading.actions]
    equal = {
        "actions": np.array_equal(window.actions, actions),
        "state": np.array_equal(window.state, state),
        "padding": all(np.array_equal(window.is_pad, pad) for pad in pads),
        "task": window.prompts == (item["task"],),
    }
    for camera, column in cameras.items():
        pixels = (item[column] * 255).round().byte().permute(0, 2, 3, 1).numpy()
        equal[camera] = np.array_equal(window.images[camera], pixels)
    return [name for name, same in equal.items() if not same]


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> Path:
    return lerobot_writer.write(tmp_path_factory.mktemp("generated") / "set", GENERATED)


def test_the_fixture_is_read_as_lerobot_reads_it(lerobot):
    root = DATA / "lerobot_v30"
    assert mismatches(lerobot, open_source(root), root) == []


def test_a_dataset_of_several_files_is_read_as_lerobot_reads_it(lerobot, generated):
    assert len(list(generated.rglob("data/**/*.parquet"))) > 2 and len(list(generated.rglob("*.mp4"))) > 4
    assert mismatches(lerobot, open_source(generated), generated) == []


def test_v21_is_read_as_lerobot_reads_its_own_conversion_of_it(lerobot, tmp_path):
    old = DATA / "lerobot_v21"
    new = convert(lerobot, old, tmp_path / "new")
    assert mismatches(lerobot, open_source(old), new) == []


def convert(lerobot, old: Path, new: Path) -> Path:
    """The v2.1 dataset `old` as LeRobot's conversion writes it, without the Hub."""
    new.mkdir()
    lerobot.convert.convert_info(old, new, 100, 200)
    lerobot.convert.convert_tasks(old, new)
    episodes = lerobot.convert.convert_data(old, new, 100)
    videos = lerobot.convert.convert_videos(old, new, 200)
    lerobot.convert.convert_episodes_metadata(old, new, episodes, videos)
    return new


def _other(field: str) -> lerobot_writer.Dataset:
    """The generated dataset with one value of episode 2 changed."""
    columns, names = dict(lerobot_writer.DEFAULT_COLUMNS), {"actions": "action", "state": "observation.state"}
    if field in names:
        feature, values = columns[names[field]]
        changed = lambda e, f: np.nextafter(np.float32(values(e, f)), np.float32(9e9)).tolist()  # noqa: E731
        columns[names[field]] = feature, lambda e, f: changed(e, f) if (e, f) == (2, 5) else values(e, f)
    return lerobot_writer.Dataset(**{**vars(GENERATED), "columns": columns})


@pytest.mark.parametrize("field", ["actions", "state"])
def test_one_number_in_its_last_bit_is_noticed(lerobot, generated, tmp_path, field):
    other = lerobot_writer.write(tmp_path / "other", _other(field))
    expected = {"state": [(2, 5, "state")], "actions": [(2, f, "actions") for f in range(6)]}
    assert mismatches(lerobot, open_source(other), generated) == expected[field]


@pytest.mark.parametrize("camera", ["front", "wrist", "still"])
def test_one_picture_is_noticed(lerobot, generated, tmp_path, monkeypatch, camera):
    picture = lerobot_writer.picture

    def changed(episode, frame, name, size):
        pixels = picture(episode, frame, name, size)
        return 255 - pixels if (episode, frame) == (2, 12) and name.endswith(camera) else pixels

    monkeypatch.setattr(lerobot_writer, "picture", changed)
    other = lerobot_writer.write(tmp_path / "other", GENERATED)
    wrong = mismatches(lerobot, open_source(other), generated)
    # Its neighbours in the same video are coded otherwise, too.
    assert (2, 12, camera) in wrong and {field for *_, field in wrong} == {camera}


def test_another_task_and_another_padding_are_noticed(lerobot, generated, tmp_path, monkeypatch):
    text = lerobot_writer.task_text
    monkeypatch.setattr(lerobot_writer, "task_text", lambda index: text(index) + "!" * index)
    other = lerobot_writer.write(tmp_path / "other", GENERATED)
    wrong = mismatches(lerobot, open_source(other), generated)
    assert wrong == [(e, f, "task") for e in (1, 3, 5) for f in range(GENERATED.lengths[e])]

    longer = dataclasses.replace(GENERATED, lengths=(12, *GENERATED.lengths[1:]))
    source = open_source(lerobot_writer.write(tmp_path / "longer", longer))
    source.episodes.length[0] = 11  # as the metadata would have it that forget the last row
    late = [(0, f, field) for f in range(3, 11) for field in ("actions", "padding")]
    assert mismatches(lerobot, source, tmp_path / "longer") == [*late, (0, 11, "window")]
