"""The tables of meta/ in any types: numbers are numbers whatever their width, and what is none is named by file, column
and row, never by a traceback."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opentau_train.config.data import SourceSettings
from opentau_train.config.typed import build
from opentau_train.data.lerobot.source import LeRobotDataset
from opentau_train.data.mixture import open as mixture
from opentau_train.errors import UserError
from tests.lerobot_writer import Camera, Dataset, write

FRONT = "observation.images.front"
LENGTHS = (5, 10, 5, 10)
SMALL = Dataset(LENGTHS, fps=5, cameras={FRONT: Camera(size=(16, 16), episodes_per_file=4)}, episodes_per_data_file=2)
"""Its episodes are whole seconds long, so that every column fits every type."""
INDICES = ["episode_index", "data/chunk_index", "data/file_index", "dataset_from_index", "dataset_to_index"]
INDICES += [f"videos/{FRONT}/{name}" for name in ("chunk_index", "file_index")]
SECONDS = f"videos/{FRONT}/from_timestamp"
WIDTHS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
WIDTHS += [pa.float16(), pa.float32(), pa.float64(), pa.decimal128(30, 2), pa.dictionary(pa.int8(), pa.int64())]
NO_INDEX = [None, math.nan, math.inf, -1, 0.5, 2**60, "0", "", [0], True, b"0", {"a": 0}]
NO_SECONDS = [None, math.nan, -math.inf, "0.0", [0.0], False]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("tables") / "set", SMALL)


@pytest.fixture(scope="module")
def spoiled(plain, tmp_path_factory) -> Path:
    """A copy whose metadata each example writes anew."""
    return shutil.copytree(plain, tmp_path_factory.mktemp("tables") / "spoiled")


def open_source(root: Path, **changes) -> LeRobotDataset:
    return mixture.open_source("main", build(SourceSettings, {"root": str(root), **changes}, "data.sources.main"))


def meta_files(root: Path) -> list[Path]:
    return sorted(root.glob("meta/episodes/*/file-*.parquet"))


def column(values: list, kind: pa.DataType) -> pa.Array:
    if pa.types.is_floating(kind):
        return pa.array(np.array(values, kind.to_pandas_dtype()), kind)
    if pa.types.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode()
    return pa.array([int(value) for value in values], pa.int64()).cast(kind)


def places(source: LeRobotDataset) -> list:
    stored = source.reading.stored
    video = stored.videos["front"]
    columns = (source.episodes.episode_index, source.episodes.length, stored.data_file, video.file, video.start)
    return [c.tolist() for c in columns]


@given(data=st.data())
def test_numbers_are_the_same_in_every_type_and_order_of_columns(plain, spoiled, data):
    for source, target in zip(meta_files(plain), meta_files(spoiled), strict=True):
        table = pq.read_table(source)
        columns = {name: table[name].combine_chunks() for name in table.column_names}
        for name in (*INDICES, SECONDS):
            columns[name] = column(columns[name].to_pylist(), data.draw(st.sampled_from(WIDTHS), name))
        columns |= data.draw(st.sampled_from([{}, {"note": pa.array(["x"] * len(table))}]))
        order = data.draw(st.permutations(list(columns)))
        pq.write_table(pa.table({name: columns[name] for name in order}), target)
    assert places(open_source(spoiled)) == places(open_source(plain))


@given(
    name=st.sampled_from([*INDICES, SECONDS]), file=st.integers(0, 1), row=st.integers(0, 1), pick=st.integers(0, 99)
)
def test_what_is_no_number_is_named_with_its_file_column_and_row(plain, spoiled, name, file, row, pick):
    wrong = NO_SECONDS if name == SECONDS else NO_INDEX
    value = wrong[pick % len(wrong)]
    for source, target in zip(meta_files(plain), meta_files(spoiled), strict=True):
        shutil.copy(source, target)
    path = meta_files(spoiled)[file]
    table = pq.read_table(path)
    # Beside numbers a number, or nothing; a column of another type is wrong in its first row.
    beside = isinstance(value, float | int | None) and not isinstance(value, bool)
    values = [value] * len(table)
    if beside:
        values = table[name].to_pylist()
        values[row] = value
    kind = pa.float64() if isinstance(value, float) else None
    spoilt = table.set_column(table.column_names.index(name), name, pa.array(values, kind))
    pq.write_table(spoilt, path)
    with pytest.raises(UserError) as caught:
        open_source(spoiled)
    assert f"column '{name}', row {row if beside else 0}: " in caught.value.what, caught.value.what
    assert caught.value.where == str(path) and "restore the file" in caught.value.remedy


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
TYPES = [*WIDTHS, pa.bool_(), pa.string(), pa.large_string(), pa.binary(), pa.null(), pa.date32(), pa.timestamp("ns")]
TYPES += [
    pa.list_(pa.int64()),
    pa.struct([("a", pa.float32())]),
    pa.time64("ns"),
    pa.dictionary(pa.int8(), pa.string()),
]


def any_column(data: st.DataObject, name: str, rows: int) -> pa.Array:
    kind = data.draw(st.sampled_from(TYPES), name)
    numbers = data.draw(st.lists(st.none() | st.integers(0, 9), min_size=rows, max_size=rows), name)
    if pa.types.is_null(kind):
        return pa.nulls(rows)
    if pa.types.is_struct(kind) or pa.types.is_list(kind):
        wrap = (lambda n: {"a": n}) if pa.types.is_struct(kind) else (lambda n: [n])
        return pa.array([None if n is None else wrap(n) for n in numbers], kind)
    if pa.types.is_dictionary(kind):
        return pa.array(numbers, pa.int64()).cast(kind.value_type).dictionary_encode()
    steps = [pa.string()] if pa.types.is_binary(kind) else [pa.int32()] if pa.types.is_date32(kind) else []
    array = pa.array(numbers, pa.int64())
    for step in (*steps, kind):
        array = array.cast(step)
    return array


@given(data=st.data())
def test_a_table_of_any_schema_opens_or_is_refused(plain, spoiled, data):
    files = [*meta_files(spoiled), spoiled / "meta/tasks.parquet"]
    for path in files:
        table = pq.read_table(plain / path.relative_to(spoiled))
        names = data.draw(st.lists(st.sampled_from([*table.column_names, "success", "mode"]), max_size=3, unique=True))
        for name in names:
            column = any_column(data, name, len(table))
            if name in table.column_names:
                table = table.set_column(table.column_names.index(name), name, column)
            else:
                table = table.append_column(name, column)
        dropped = data.draw(st.lists(st.sampled_from(table.column_names), max_size=1))
        pq.write_table(table.drop_columns(dropped), path)
    try:
        open_source(spoiled, control_mode_column="mode", success_only=True, success_column="success")
    except UserError as error:
        assert error.where and error.remedy
    for path in files:
        shutil.copy(plain / path.relative_to(spoiled), path)


@given(data=st.data())
def test_lines_of_any_json_open_or_are_refused(old, data):
    root, whole = old
    name = data.draw(st.sampled_from(sorted(whole)))
    lines = [json.loads(line) for line in whole[name].splitlines()] if name.endswith("l") else [json.loads(whole[name])]
    line = data.draw(st.integers(0, len(lines) - 1))
    if data.draw(st.booleans()):
        lines[line] = data.draw(JUNK)
    else:
        place, key = lines[line], data.draw(st.sampled_from(sorted(lines[line])))
        while isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
            place, key = place[key], data.draw(st.sampled_from(sorted(place[key])))
        place[key] = data.draw(JUNK)
    (root / "meta" / name).write_text("\n".join(json.dumps(line) for line in lines))
    try:
        open_source(root, state=("arm",), prompt_columns=("note",), control_mode_column="mode")
    except UserError as error:
        assert error.where and error.remedy
    finally:
        (root / "meta" / name).write_text(whole[name])


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A v2.1 dataset with a modality.json, and the texts of its metadata."""
    note = ({"dtype": "int64", "shape": [1], "names": None}, lambda e, f: e % 2)
    mode = {"mode": ["joint", "ee", "joint", "ee"]}
    columns = {"observation.state": vector4(), "action": vector4(), "note": note}
    dataset = replace(SMALL, version="v2.1", cameras={}, columns=columns, episode_columns=mode)
    root = write(tmp_path_factory.mktemp("tables") / "old", dataset)
    (root / "meta/modality.json").write_text(json.dumps({"state": {"arm": {"start": 1, "end": 3}}, "action": {}}))
    names = ("info.json", "modality.json", "episodes.jsonl", "tasks.jsonl")
    return root, {name: (root / "meta" / name).read_text() for name in names}


def vector4():
    return {"dtype": "float32", "shape": [4], "names": None}, lambda e, f: [float(e), float(f), 1.0, 2.0]
