"""Datasets whose metadata, rows and videos disagree: what can be read rightly is read, and no row is ever shown a
picture that isn't its own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opentau_train.data.lerobot.source import LeRobotDataset
from opentau_train.errors import BadSample, UserError
from opentau_train.tools import check
from opentau_train.types import WindowSpec
from tests.lerobot_writer import Camera, Dataset, picture, vector, write, write_video
from tests.unit.data.lerobot.test_source import open_source

FRONT = "observation.images.front"
LENGTHS = (12, 14, 16)
SIZE = (64, 96)
LOSSY = 40.0
"""Mean difference at which two of the test's pictures are not the same one: another one differs by 70 or more."""

VIDEO = Camera(gop=4, size=SIZE, episodes_per_file=3, options={"crf": "12", "bf": "0"})
V30 = Dataset(lengths=LENGTHS, fps=10, cameras={FRONT: VIDEO}, episodes_per_data_file=3)
V21 = replace(V30, version="v2.1")
ROWS = replace(V30, cameras={})
LAST = {(e, n - 1) for e, n in enumerate(LENGTHS)}


def episodes_of(root: Path) -> dict[str, list]:
    """The columns of meta/episodes."""
    return pa.concat_tables([pq.read_table(p) for p in sorted(root.glob("meta/episodes/**/*.parquet"))]).to_pydict()


def rewrite_episodes(root: Path, columns: dict[str, list]) -> None:
    first, *others = sorted(root.glob("meta/episodes/**/*.parquet"))
    pq.write_table(pa.table(columns), first)
    for path in others:
        path.unlink()


def place_video(
    root: Path, start: Sequence[float], to: Sequence[float], have: Sequence[int], shift_s: float = 0.0
) -> None:
    """Encode the first `have[e]` frames of each episode one after another, from `shift_s` on, and let the metadata
    place the episodes from `start` to `to`."""
    frames = [picture(e, f, FRONT, SIZE) for e, num in enumerate(have) for f in range(num)]
    path = root / f"videos/{FRONT}/chunk-000/file-000.mp4"
    write_video(path, VIDEO, [(shift_s + i / 10, frame) for i, frame in enumerate(frames)])
    key = f"videos/{FRONT}"
    rewrite_episodes(root, episodes_of(root) | {f"{key}/from_timestamp": list(start), f"{key}/to_timestamp": list(to)})


def change_rows(root: Path, change) -> None:
    """Rewrite each file of rows as `change(table)`."""
    for path in sorted((root / "data").rglob("*.parquet")):
        pq.write_table(change(pq.read_table(path)), path)


def with_times(seconds_of) -> object:
    """A change of rows: timestamps as `seconds_of(episode, frame)`."""

    def change(table: pa.Table) -> pa.Table:
        pairs = zip(table["episode_index"].to_pylist(), table["frame_index"].to_pylist())
        times = pa.array([seconds_of(e, f) for e, f in pairs], pa.float32())
        return table.set_column(table.column_names.index("timestamp"), "timestamp", times)

    return change


def read_all(source: LeRobotDataset) -> dict[tuple[int, int], str]:
    """{(episode, frame): "right", "wrong" or why it can't be read} of every window that the table has."""
    cursor, out = source.cursors(WindowSpec(1)).cursor(), {}
    for position, number in enumerate(source.episodes.episode_index.tolist()):
        for frame in range(int(source.episodes.length[position])):
            try:
                window = cursor.read(position, frame)
            except BadSample as error:
                out[number, frame] = error.cause
                continue
            shown = [
                np.abs(i[0].astype(float) - picture(number, frame, FRONT, SIZE)).mean() for i in window.images.values()
            ]
            own_row = window.actions[0, 0] == 0.5 + 100 * number + frame
            out[number, frame] = "right" if own_row and all(difference < LOSSY for difference in shown) else "wrong"
    return out


def assert_lost(source: LeRobotDataset, lost: set[tuple[int, int]]) -> dict[tuple[int, int], str]:
    """All windows are right but those of `lost` (episode, frame), which are refused."""
    read = read_all(source)
    assert "wrong" not in read.values()
    assert {place for place, what in read.items() if what != "right"} == lost
    return read


def trained_on(source: LeRobotDataset) -> set[tuple[int, int]]:
    """(episode, frame) of the windows in the source's blocks."""
    numbers = source.episodes.episode_index.tolist()
    return {(numbers[e], first + i) for e, first, length in source.get_shuffle_blocks().tolist() for i in range(length)}


EVERYTHING = {(e, f) for e, n in enumerate(LENGTHS) for f in range(n)}
OF_EPISODE = [{(e, f) for f in range(n)} for e, n in enumerate(LENGTHS)]

# ---------------------------------------------------------------- videos


@pytest.mark.parametrize(
    "to", [[1.0, 2.4, 4.0], [1.2, 2.4, 4.0], [float("nan")] * 3], ids=["true", "by_rows", "untold"]
)
def test_rows_beyond_a_short_segment_have_no_frame_and_the_others_theirs(to, tmp_path, caplog):
    root = write(tmp_path / "set", V30)
    place_video(root, start=[0.0, 1.0, 2.4], to=to, have=[10, 14, 16])
    source = open_source(root)
    assert_lost(source, {(0, 10), (0, 11)})
    assert trained_on(source) == EVERYTHING - {(0, 10), (0, 11)}
    assert "data.sources.main" in caplog.text and "front  episodes 0  2 rows" in caplog.text


def test_a_file_shorter_than_its_metadata_say_shows_nothing(tmp_path):
    """Which segment lacks the frames isn't known: every episode after it would show others."""
    root = write(tmp_path / "set", V30)
    place_video(root, start=[0.0, 1.2, 2.6], to=[1.2, 2.6, 4.2], have=[10, 14, 16])
    read = assert_lost(open_source(root), EVERYTHING)
    assert "lasts 4.000 s, and meta/episodes place 4.200 s" in read[0, 0]


def test_a_start_that_is_late_by_a_frame_is_said_and_shows_no_neighbour(tmp_path, caplog):
    root = write(tmp_path / "set", V30)
    place_video(root, start=[0.0, 1.3, 2.6], to=[1.2, 2.7, 4.2], have=LENGTHS)
    read = read_all(open_source(root))
    assert (
        "from_timestamp isn't the to_timestamp before it" in caplog.text and "episodes 1, 2 (+0.100 s)" in caplog.text
    )
    assert {place for place, what in read.items() if what not in ("right", "wrong")} == {(1, 13), (2, 0)}
    assert {place for place, what in read.items() if what == "wrong"} == OF_EPISODE[1] - {(1, 13)}, (
        "its own, a frame on"
    )


def test_a_start_that_is_early_by_a_frame_is_said_and_shows_no_neighbour(tmp_path, caplog):
    root = write(tmp_path / "set", V30)
    place_video(root, start=[0.0, 1.1, 2.6], to=[1.2, 2.5, 4.2], have=LENGTHS)
    read = read_all(open_source(root))
    assert "episodes 1, 2 (-0.100 s)" in caplog.text
    assert {place for place, what in read.items() if what not in ("right", "wrong")} == {(0, 11), (1, 0)}


@pytest.mark.parametrize("dataset", [V30, V21], ids=["v30", "v21"])
def test_timestamps_that_run_on_over_episodes_are_read_where_every_row_has_a_frame(dataset, tmp_path):
    root = write(tmp_path / "set", dataset)
    before = np.cumsum([0, *LENGTHS])
    change_rows(root, with_times(lambda e, f: (before[e] + f) / 10))
    assert_lost(open_source(root), set())


def test_timestamps_that_run_on_are_refused_where_the_video_has_other_frames(tmp_path):
    root = write(tmp_path / "set", V21)
    path = root / f"videos/chunk-000/{FRONT}/episode_000001.mp4"
    write_video(path, VIDEO, [(i / 10, picture(1, i, FRONT, SIZE)) for i in range(15)])
    change_rows(root, with_times(lambda e, f: (12 * (e > 0) + f) / 10 if e < 2 else f / 10))
    read = assert_lost(open_source(root), OF_EPISODE[1])
    assert "begin and end outside the episode's" in read[1, 0]


@pytest.mark.parametrize("dataset", [V30, V21], ids=["v30", "v21"])
def test_a_clock_of_milliseconds_is_read(dataset, tmp_path):
    """Matroska rounds 1 / 30 s to 0.033 s, more than the tolerance."""
    paths = {"v3.0": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mkv"}
    paths["v2.1"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mkv"
    camera = replace(VIDEO, ticks=1000)
    info = {"video_path": paths[dataset.version]}
    root = write(tmp_path / "set", replace(dataset, fps=30, cameras={FRONT: camera}, info=info))
    for path in sorted(root.rglob("*.mp4")):
        number = int(path.stem[-3:])
        frames = [(e, f) for e, n in enumerate(LENGTHS) for f in range(n) if dataset is V30 or e == number]
        pictures = [(i / 30, picture(e, f, FRONT, SIZE)) for i, (e, f) in enumerate(frames)]
        write_video(path.with_suffix(".mkv"), camera, pictures)
        path.unlink()
    assert_lost(open_source(root), set())


def test_a_clock_that_begins_above_0_is_followed_where_the_file_holds_the_rows(tmp_path):
    root = write(tmp_path / "v30", V30)
    place_video(root, start=[0.0, 1.2, 2.6], to=[1.2, 2.6, 4.2], have=LENGTHS, shift_s=0.2)
    assert_lost(open_source(root), set())
    root = write(tmp_path / "v21", V21)
    path = root / f"videos/chunk-000/{FRONT}/episode_000001.mp4"
    write_video(path, VIDEO, [(0.2 + i / 10, picture(1, i, FRONT, SIZE)) for i in range(14)])
    assert_lost(open_source(root), set())
    write_video(path, VIDEO, [(0.2 + i / 10, picture(1, i, FRONT, SIZE)) for i in range(11)])
    assert "begins at 0.200 s" in assert_lost(open_source(root), OF_EPISODE[1])[1, 5]
    write_video(path, VIDEO, [(0.2 + i / 10, picture(1, i + 2, FRONT, SIZE)) for i in range(12)])
    assert_lost(open_source(root), {(1, 0), (1, 1)})  # a camera that began later than the rows


def test_a_video_shorter_than_its_one_episode_costs_the_last_rows_alone(tmp_path):
    root = write(tmp_path / "set", V21)
    path = root / f"videos/chunk-000/{FRONT}/episode_000001.mp4"
    write_video(path, VIDEO, [(i / 10, picture(1, i, FRONT, SIZE)) for i in range(12)])
    read = assert_lost(open_source(root), {(1, 12), (1, 13)})
    assert "no frame within" in read[1, 12]


@pytest.mark.parametrize("dataset", [V30, V21], ids=["v30", "v21"])
def test_the_remedy_of_drifting_clocks_names_a_tolerance_that_takes_every_row(dataset, tmp_path):
    root = write(tmp_path / "set", dataset)
    change_rows(root, with_times(lambda e, f: f / 9.7))
    source = open_source(root)
    with pytest.raises(BadSample) as caught:
        source.cursors(WindowSpec(1)).cursor().read(1, 5)
    assert "the rows' times miss the video's frames by up to" in caught.value.remedy
    tolerance = float(caught.value.remedy.partition("data.sources.main.tolerance_s=")[2].split()[0])
    assert 0.04 < tolerance < 0.06
    read = read_all(open_source(root, tolerance_s=tolerance))
    assert set(read.values()) == {"right"}


def test_the_check_proposes_the_tolerance_of_drifting_clocks_and_of_no_others(tmp_path, capsys):
    root = write(tmp_path / "set", V21)
    assert check.main([str(root)]) == 0 and "tolerance_s" not in capsys.readouterr().out
    change_rows(root, with_times(lambda e, f: f / 9.7))
    assert check.main([str(root)]) == 0
    tolerance = float(capsys.readouterr().out.partition("set data.sources.main.tolerance_s=")[2])
    assert set(read_all(open_source(root, tolerance_s=tolerance)).values()) == {"right"}


def test_float32_timestamps_past_4096_seconds_are_read_with_the_tolerance_that_is_proposed(tmp_path):
    """Half a millisecond lies between two of them."""
    root = write(tmp_path / "set", replace(V21, lengths=(40,)))
    frames = [(4100 + i / 30, picture(0, i, FRONT, SIZE)) for i in range(40)]
    write_video(root / f"videos/chunk-000/{FRONT}/episode_000000.mp4", VIDEO, frames)
    change_rows(root, with_times(lambda e, f: 4100 + f / 30))
    with pytest.raises(BadSample) as caught:
        read = open_source(root).cursors(WindowSpec(1)).cursor().read
        [read(0, frame) for frame in range(40)]
    tolerance = float(caught.value.remedy.partition("data.sources.main.tolerance_s=")[2].split()[0])
    assert tolerance < 0.001
    assert set(read_all(open_source(root, tolerance_s=tolerance)).values()) == {"right"}


def test_a_missing_frame_proposes_no_tolerance(tmp_path):
    root = write(tmp_path / "set", V21)
    path = root / f"videos/chunk-000/{FRONT}/episode_000000.mp4"
    write_video(path, VIDEO, [(i / 10, picture(0, i, FRONT, SIZE)) for i in range(10)])
    with pytest.raises(BadSample) as caught:
        open_source(root).cursors(WindowSpec(1)).cursor().read(0, 11)
    assert caught.value.remedy == ""


# ---------------------------------------------------------------- rows


@given(st.randoms(use_true_random=False))
@settings(max_examples=10, deadline=None)
def test_rows_are_taken_by_episode_and_frame_in_whatever_order_they_stand(random):
    with tempfile.TemporaryDirectory() as folder:
        root = write(Path(folder) / "set", replace(ROWS, row_group_rows=random.choice([5, 1000])))

        def shuffled(table: pa.Table) -> pa.Table:
            order = list(range(len(table)))
            random.shuffle(order)
            return table.take(pa.array(order))

        change_rows(root, shuffled)
        assert_lost(open_source(root), set())


def _split_rows(root: Path, row: int) -> None:
    """Move the rows from `row` on to a second file."""
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, row), path)
    pq.write_table(table.slice(row), path.with_name("file-001.parquet"))


@pytest.mark.parametrize("row", [12, 18, 26], ids=["another_file", "two_files", "last"])
@pytest.mark.parametrize("numbers", [[0, 0, 1], [0, 0, 0], [0, 7, 7]], ids=str)
def test_rows_in_another_file_than_the_metadata_say_are_found(row, numbers, tmp_path):
    root = write(tmp_path / "set", V30)
    _split_rows(root, row)
    rewrite_episodes(root, episodes_of(root) | {"data/file_index": numbers})
    assert_lost(open_source(root), set())


def test_rows_that_stand_twice_count_once_and_cost_their_episode_where_they_differ(tmp_path):
    root = write(tmp_path / "set", ROWS)
    change_rows(root, lambda t: pa.concat_tables([t.slice(0, 15), t]))
    assert_lost(open_source(root), set())

    def contradict(table: pa.Table) -> pa.Table:
        actions = [[v + 1 for v in row] if i == 3 else row for i, row in enumerate(table["action"].to_pylist())]
        return table.set_column(table.column_names.index("action"), "action", pa.array(actions, table["action"].type))

    whole = pq.read_table(root / "data/chunk-000/file-000.parquet").slice(15)
    change_rows(root, lambda _: pa.concat_tables([whole.slice(12, 1), contradict(whole.slice(0, 15)), whole]))
    assert "frame 3 of episode 0 is there twice, differently" in assert_lost(open_source(root), OF_EPISODE[0])[0, 0]
    change_rows(root, lambda _: pa.concat_tables([whole, whole.slice(41), contradict(whole.slice(0, 15))]))
    assert_lost(open_source(root), set())  # the first ones stand where the metadata place them


def test_an_episode_with_more_rows_than_its_metadata_give_it_is_left_out(tmp_path):
    root = write(tmp_path / "set", replace(ROWS, version="v2.1"))
    lines = (root / "meta/episodes.jsonl").read_text().replace('"length": 14', '"length": 12')
    (root / "meta/episodes.jsonl").write_text(lines)
    read = read_all(open_source(root))
    assert {place for place, what in read.items() if what != "right"} == {(1, f) for f in range(12)}
    assert "episode 1 has 14 rows, the metadata give it 12" in read[1, 0]


def test_an_episode_is_as_long_as_its_rows_where_the_metadata_contradict_each_other(tmp_path, caplog):
    root = write(tmp_path / "set", V30)
    columns = episodes_of(root)
    columns["dataset_to_index"][1] -= 2
    rewrite_episodes(root, columns)
    source = open_source(root)
    assert source.episodes.length.tolist() == list(LENGTHS)
    assert_lost(source, set())
    assert "length isn't to - from; rows as the files have them: episodes 1: 14" in caplog.text


def test_an_episode_without_rows_is_left_out_by_name(tmp_path, caplog):
    root = write(tmp_path / "set", V30)
    columns = episodes_of(root)
    columns["dataset_to_index"][1] = columns["dataset_from_index"][1]
    rewrite_episodes(root, columns)
    change_rows(root, lambda t: t.filter(pa.array(np.array(t["episode_index"]) != 1)))
    source = open_source(root)
    assert source.episodes.episode_index.tolist() == [0, 2]
    assert_lost(source, set())
    assert "left out, having no rows: episodes 1" in caplog.text
    rewrite_episodes(root, {name: values[1:2] for name, values in columns.items()})
    with pytest.raises(UserError, match="no episode has rows"):
        open_source(root)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_line_of_the_metadata_costs_its_own_episode_alone(missing, tmp_path, caplog):
    root = write(tmp_path / "set", V30)
    rewrite_episodes(root, {n: v[:missing] + v[missing + 1 :] for n, v in episodes_of(root).items()})
    source = open_source(root)
    assert len(source.episodes) == 2
    assert_lost(source, set())
    assert f"left out, missing in the episodes' metadata: episodes {missing}" in caplog.text


def test_of_an_episode_that_is_listed_twice_one_line_counts(tmp_path, caplog):
    root = write(tmp_path / "set", V30)
    rewrite_episodes(root, {name: [*values, values[1]] for name, values in episodes_of(root).items()})
    assert_lost(open_source(root), set())
    assert "listed twice" in caplog.text


def test_rows_without_a_frame_index_are_ordered_by_their_index(tmp_path):
    root = write(tmp_path / "set", replace(ROWS, version="v2.1"))
    info = json.loads((root / "meta/info.json").read_text())
    del info["features"]["frame_index"]
    (root / "meta/info.json").write_text(json.dumps(info))
    change_rows(root, lambda t: t.drop_columns(["frame_index"]).take(pa.array([*range(1, len(t)), 0])))
    assert_lost(open_source(root), set())
    assert open_source(root, success_only=False).columns(np.arange(3)).__next__()[2][0, 0] == 0.5


# ---------------------------------------------------------------- columns


def test_columns_that_cannot_be_used_are_said_with_the_reason(tmp_path, caplog):
    columns = {
        "observation.state": vector(4),
        "action": vector(3, 0.5),
        "observation.images.raw": ({"dtype": "uint8", "shape": [2, 2, 3]}, lambda e, f: [0] * 12),
        "observation.depth": ({"dtype": "depth", "shape": [2]}, lambda e, f: [0.0] * 2),
        "observation.pressed": ({"dtype": "bool", "shape": [2]}, lambda e, f: [True] * 2),
        "observation.pose": ({"dtype": "string", "shape": [1]}, lambda e, f: '{"x": 1}'),
    }
    info = {}
    root = write(
        tmp_path / "set", replace(ROWS, columns={n: c for n, c in columns.items() if "depth" not in n}, info=info)
    )
    tree = json.loads((root / "meta/info.json").read_text())
    tree["features"]["observation.depth"] = columns["observation.depth"][0]
    (root / "meta/info.json").write_text(json.dumps(tree))
    open_source(root)
    said = caplog.text.splitlines()
    assert len(said) == 3 and all("data.sources.main: not used, " in line for line in said)
    assert "no camera" in said[0] and "observation.images.raw (uint8), observation.depth (depth)" in said[0]
    assert "observation.pressed (bool)" in said[1] and "observation.pose (string)" in said[2]


@pytest.mark.parametrize("told", [{"video.is_depth_map": True}, {"video.pix_fmt": "gray12le"}], ids=str)
def test_a_camera_of_depth_is_left_out_by_name_and_refused_where_it_is_asked_for(told, tmp_path, caplog):
    root = write(tmp_path / "set", V30)
    tree = json.loads((root / "meta/info.json").read_text())
    tree["features"]["observation.images.depth"] = tree["features"][FRONT] | {"info": told}
    (root / "meta/info.json").write_text(json.dumps(tree))
    assert open_source(root).cameras == ("front",)
    assert "no camera that can be read" in caplog.text and "observation.images.depth (video)" in caplog.text
    with pytest.raises(UserError, match=r"holds depth[\s\S]*main.cameras=\[observation.images.front\]"):
        open_source(root, cameras=("observation.images.depth",))


def test_a_stored_picture_of_depth_is_refused_with_the_other_cameras(tmp_path):
    cameras = {FRONT: Camera(None, size=(32, 48)), FRONT + "_depth": Camera(None, size=(32, 48))}
    root = write(tmp_path / "set", replace(ROWS, cameras=cameras))

    def deepen(table: pa.Table) -> pa.Table:
        from opentau_train.data.builtin.video import png

        cells = [{"bytes": png(np.full((32, 48), 300, np.uint16)), "path": None}] * len(table)
        return table.set_column(table.column_names.index(FRONT + "_depth"), FRONT + "_depth", pa.array(cells))

    change_rows(root, deepen)
    with pytest.raises(BadSample, match=f"column '{FRONT}_depth': its pixels are 16 bits") as caught:
        open_source(root).cursors(WindowSpec(1)).cursor().read(0, 0)
    assert caught.value.remedy == f"leave the camera out: data.sources.main.cameras=[{FRONT}]"


def test_dropped_dimensions_are_neither_read_nor_named(tmp_path):
    def values(e, f):
        return [1.0 + f, float("nan"), 2.0, 3.0]

    columns = {"observation.state": ({"dtype": "float32", "shape": [4]}, values), "action": vector(3, 0.5)}
    root = write(tmp_path / "set", replace(ROWS, columns=columns))
    source = open_source(root, drop_dims=("observation.state.1", "action*[2]"))
    assert source.state_names == ("observation.state[0]", "observation.state[2]", "observation.state[3]")
    assert source.action_names == ("action[0]", "action[1]")
    window = source.cursors(WindowSpec(2)).cursor().read(1, 4)
    assert window.state.tolist() == [5.0, 2.0, 3.0] and window.actions.shape == (2, 2)
    (_, state, actions) = next(source.columns(np.array([1])))
    assert state.shape == (14, 3) and actions.shape == (14, 2)
    with pytest.raises(UserError, match=r"no dimension is named 'action.7'[\s\S]*action.0, action.1"):
        open_source(root, drop_dims=("action.7",))
