"""Files that a writer spoiled in one place: that place costs its own episode, and no row of another is taken for it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opentau_train.data.decode.parquet import RowError, numbers
from opentau_train.errors import BadSample, UserError
from opentau_train.tools import check
from opentau_train.types import WindowSpec
from tests.lerobot_writer import picture, task_text, write, write_video
from tests.unit.data.lerobot.test_misplaced import (
    EVERYTHING,
    FRONT,
    LENGTHS,
    OF_EPISODE,
    ROWS,
    SIZE,
    V21,
    V30,
    VIDEO,
    assert_lost,
    change_rows,
    episodes_of,
    place_video,
    read_all,
    rewrite_episodes,
    trained_on,
    with_times,
)
from tests.unit.data.lerobot.test_source import open_source


def with_value(table: pa.Table, column: str, row: int, value: Any) -> pa.Table:
    values = table[column].to_pylist()
    values[row] = value
    return table.set_column(table.column_names.index(column), column, pa.array(values))


@pytest.mark.parametrize("column", ["frame_index", "episode_index"])
@pytest.mark.parametrize("value", [None, math.nan, -1, 4.5], ids=str)
@pytest.mark.parametrize("shuffled", [False, True], ids=["in_order", "shuffled"])
def test_a_row_without_its_frame_or_episode_costs_its_own_episode(column, value, shuffled, tmp_path):
    root = write(tmp_path / "set", ROWS)
    order = [*range(20, 42), *range(20)] if shuffled else [*range(42)]

    def spoil(table: pa.Table) -> pa.Table:
        return with_value(table, column, 4, value).take(pa.array(order))

    change_rows(root, spoil)
    read = assert_lost(open_source(root), OF_EPISODE[0])
    assert "episode 0 has 11 rows, the metadata give it 12" in read[0, 0]


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 2)])
def test_a_nested_column_whose_rows_differ_in_width_is_refused_although_the_total_fits(kind):
    pairs = [[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]], []]
    rows = pa.table({"x": pa.array(pairs, pa.list_(kind))})
    assert numbers(rows.slice(0, 2), "x", 2).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert numbers(rows.slice(1, 1), "x", 2).tolist() == [[3.0, 4.0]]
    with pytest.raises(RowError, match="2 values a row"):
        numbers(rows, "x", 2)


def test_a_file_of_rows_that_cannot_be_read_costs_no_episode_of_another(tmp_path):
    root = write(tmp_path / "set", V30)
    folder = root / "data/chunk-000"
    (folder / "file-001.parquet").write_bytes(b"junk")
    (folder / "file-002.parquet").mkdir()
    rewrite_episodes(root, episodes_of(root) | {"data/file_index": [7, 7, 7]})
    assert_lost(open_source(root), set())


def test_an_episode_that_lacks_a_row_costs_itself_alone_where_its_file_has_another_name(tmp_path):
    root = write(tmp_path / "set", ROWS)
    change_rows(root, lambda table: with_value(table, "frame_index", 4, None))
    rewrite_episodes(root, episodes_of(root) | {"data/file_index": [7, 7, 7]})
    source = open_source(root)
    assert "episode 0 has 11 rows, the metadata give it 12" in assert_lost(source, OF_EPISODE[0])[0, 0]
    assert [place for place, _, _ in source.columns(np.arange(3))] == [1, 2]


@pytest.mark.parametrize("dataset", [ROWS, replace(ROWS, version="v2.1")], ids=["v30", "v21"])
def test_episodes_that_are_listed_are_read_whatever_info_json_counts(dataset, tmp_path):
    assert_lost(open_source(write(tmp_path / "set", replace(dataset, info={"total_episodes": 0}))), set())


@pytest.mark.parametrize("template", ["{file_index:04d}.rows", "a/b/{chunk_index:d}-{file_index:d}.parquet"])
def test_rows_are_looked_for_in_files_of_the_dataset_s_own_names_alone(template, tmp_path):
    root = write(tmp_path / "set", ROWS)
    whole = pq.read_table(root / "data/chunk-000/file-000.parquet")
    info = root / "meta/info.json"
    info.write_text(info.read_text().replace("data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet", template))
    for number, rows in enumerate((whole.slice(0, 12), whole.slice(12))):
        path = root / template.format(chunk_index=0, file_index=number)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, path)
    assert_lost(open_source(root), set())

    # A file of another name is none of the dataset's: what it holds of an episode is nobody's.
    last = root / template.format(chunk_index=0, file_index=1)
    last.rename(last.with_name(f"copy of {last.name}"))
    assert_lost(open_source(root), {*OF_EPISODE[1], *OF_EPISODE[2]})


@pytest.mark.parametrize("place", ["ELSEWHERE", ".."])
def test_rows_that_info_json_places_outside_of_the_directory_are_refused(place, tmp_path):
    root = write(tmp_path / "set", ROWS)
    moved = tmp_path / "elsewhere"
    (root / "data").rename(moved)
    info = root / "meta/info.json"
    outside = str(moved) if place == "ELSEWHERE" else "../elsewhere"
    info.write_text(info.read_text().replace('"data/chunk', f'"{outside}/chunk'))
    with pytest.raises(UserError, match="it leads out of the dataset's directory"):
        open_source(root)


# ---------------------------------------------------------------- videos


def test_of_episodes_with_the_same_start_in_a_file_none_is_shown_the_other_s_pictures(tmp_path, caplog):
    root = write(tmp_path / "set", V30)
    place_video(root, start=[0.0, 0.0, 2.6], to=[math.nan] * 3, have=LENGTHS)
    source = open_source(root)
    assert_lost(source, OF_EPISODE[0] | OF_EPISODE[1])
    assert trained_on(source) == OF_EPISODE[2]
    assert "front  episodes 0, 1  26 rows" in caplog.text


@pytest.mark.parametrize("dataset", [V30, V21], ids=["v30", "v21"])
def test_a_video_of_another_rate_with_a_frame_for_each_row_shows_nothing(dataset, tmp_path):
    root = write(tmp_path / "set", dataset)
    everything = sorted(EVERYTHING)
    for path in sorted(root.rglob("*.mp4")):
        own = [(e, f) for e, f in everything if dataset is V30 or e == int(path.stem[-3:])]
        write_video(path, VIDEO, [(i / 20, picture(e, f, FRONT, SIZE)) for i, (e, f) in enumerate(own)])
    read = assert_lost(open_source(root), EVERYTHING)
    assert "has a frame for each row, but they are shown for" in read[0, 0]


@pytest.mark.parametrize("dataset", [V30, V21], ids=["v30", "v21"])
@pytest.mark.parametrize("spoiled", ["video", "rows"])
def test_an_episode_of_few_rows_is_no_exception(spoiled, dataset, tmp_path):
    """A duration may be wrong by frames where they are uneven, but never by as many as there are."""
    few = (2, 3, 5)
    root = write(tmp_path / "set", replace(dataset, lengths=few))
    everything = sorted((e, f) for e, num in enumerate(few) for f in range(num))
    if spoiled == "rows":
        change_rows(root, with_times(lambda e, f: f / 20))
    else:
        for path in sorted(root.rglob("*.mp4")):
            own = [(e, f) for e, f in everything if dataset is V30 or e == int(path.stem[-3:])]
            write_video(path, VIDEO, [(i / 20, picture(e, f, FRONT, SIZE)) for i, (e, f) in enumerate(own)])
    assert "another one's picture" in assert_lost(open_source(root), set(everything))[0, 1]


def test_a_video_of_a_multiple_of_the_rows_rate_is_read(tmp_path):
    root = write(tmp_path / "set", V21)
    for e, num in enumerate(LENGTHS):
        frames = [(i / 20, picture(e, i // 2, FRONT, SIZE)) for i in range(2 * num)]
        write_video(root / f"videos/chunk-000/{FRONT}/episode_{e:06d}.mp4", VIDEO, frames)
    assert_lost(open_source(root), set())


@pytest.mark.slow
@pytest.mark.parametrize(
    "start", [[0.0, 1.1, 2.5], [-5.0, -3.8, -2.4], [0.0, 1.2, 12.6]], ids=["early", "negative", "after_the_end"]
)
def test_no_tolerance_is_proposed_where_the_rows_lie_outside_the_video_or_the_episode(start, tmp_path, capsys):
    root = write(tmp_path / "set", V30)
    place_video(root, start=start, to=[s + n / 10 for s, n in zip(start, LENGTHS)], have=LENGTHS)
    assert "wrong" not in {read_all(open_source(root))[e, f] for e, f in OF_EPISODE[0]}
    assert check.main([str(root)]) == 0 and "tolerance_s" not in capsys.readouterr().out


def test_a_file_that_is_longer_than_its_episodes_is_told_of_once(tmp_path, caplog):
    """Whether an episode isn't listed, or one has more frames than listed, can't be known."""
    root = write(tmp_path / "set", V30)
    place_video(root, start=[0.0, 1.2, 2.6], to=[1.2, 2.6, 4.2], have=[12, 14, 19])
    assert_lost(open_source(root), set())
    assert caplog.text.count("file-000.mp4 lasts 0.30 s longer than the episodes that meta/ places in it") == 1
    caplog.clear()
    place_video(root, start=[0.0, 1.2, 2.6], to=[1.2, 2.6, 4.2], have=LENGTHS)
    assert_lost(open_source(root), set())
    assert "longer" not in caplog.text


@pytest.mark.parametrize("dataset", [V30, V21], ids=["v30", "v21"])
@pytest.mark.parametrize("rate", [20, 5])
def test_rows_of_another_rate_than_the_video_s_with_a_frame_each_are_shown_nothing(rate, dataset, tmp_path):
    root = write(tmp_path / "set", dataset)
    change_rows(root, with_times(lambda e, f: f / rate))
    assert "another one's picture" in assert_lost(open_source(root), EVERYTHING)[0, 1]


@pytest.mark.parametrize("dataset", [V30, V21], ids=["v30", "v21"])
@pytest.mark.parametrize("begins", [0.0, 1.7e9], ids=["zero", "since_1970"])
def test_rows_that_all_have_the_same_time_are_shown_nothing(begins, dataset, tmp_path):
    """As float32, times since 1970 lie 128 s apart."""
    root = write(tmp_path / "set", dataset)
    change_rows(root, with_times(lambda e, f: begins + (begins and f / 10)))
    assert "timestamps of an episode must rise: row 1" in assert_lost(open_source(root), EVERYTHING)[0, 0]


@pytest.mark.parametrize("dataset", [V30, V21], ids=["v30", "v21"])
def test_one_tolerance_takes_float32_times_past_4096_seconds_that_run_on(dataset, tmp_path):
    root = write(tmp_path / "set", dataset)
    before = 5000 + np.cumsum([0, *LENGTHS]) / 10
    change_rows(root, with_times(lambda e, f: before[e] + f / 10))
    cursor = open_source(root).cursors(WindowSpec(1)).cursor()
    with pytest.raises(BadSample) as caught:
        [cursor.read(0, frame) for frame in range(LENGTHS[0])]
    tolerance = float(caught.value.remedy.partition("data.sources.main.tolerance_s=")[2].split()[0])
    assert tolerance < 0.001
    assert set(read_all(open_source(root, tolerance_s=tolerance)).values()) == {"right"}


def test_rows_without_tasks_are_said_to_have_no_prompts(tmp_path, caplog):
    root = write(tmp_path / "set", ROWS)
    info = json.loads((root / "meta/info.json").read_text())
    del info["features"]["task_index"]
    (root / "meta/info.json").write_text(json.dumps(info))
    assert open_source(root).cursors(WindowSpec(1)).cursor().read(0, 0).prompts == ()
    assert "no prompts: meta/info.json lists no 'task_index'" in caplog.text


def test_tasks_among_several_columns_of_texts_are_those_called_task(tmp_path):
    root = write(tmp_path / "set", ROWS)
    path = root / "meta/tasks.parquet"
    kinds = pa.table({"kind": ["a", "b"], **pq.read_table(path).to_pydict()})
    pq.write_table(kinds, path)
    assert open_source(root).reading.tasks[1] == task_text(1)
    pq.write_table(kinds.rename_columns(["instruction" if n == "task" else n for n in kinds.column_names]), path)
    with pytest.raises(UserError, match="of texts kind, instruction, of which none is called 'task'"):
        open_source(root)
