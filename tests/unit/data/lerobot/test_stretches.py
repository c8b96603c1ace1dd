"""Rows for statistics, read a stretch of a file at a time: the bits and the order of reading them one by one."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opentau_train.data.decode.parquet import RowReader
from opentau_train.data.lerobot import source as source_module
from opentau_train.data.lerobot import stretches
from tests.lerobot_writer import Dataset, vector, write
from tests.unit.data.load.test_real_stream import mixture
from tests.unit.data.mixture.test_normalize import compute

LENGTHS = [20, 1, 33, 7, 12, 40, 5, 9, 26, 14]
COLUMNS = {"observation.state": vector(4), "action": vector(3, 0.5)}


def rewritten(root, change):
    """The second file of rows after `change` of its table."""
    path = sorted((root / "data").rglob("*.parquet"))[1]
    pq.write_table(change(pq.read_table(path)), path)


def moved(table):
    return table.take(pa.array([*range(3, len(table)), 0, 1, 2]))


def emptied(table):
    column = pa.array([None if i == 2 else v for i, v in enumerate(table["episode_index"].to_pylist())])
    return table.set_column(table.column_names.index("episode_index"), "episode_index", column)


SPOILT = {"as listed": lambda table: table, "moved": moved, "without a number": emptied}


@pytest.fixture
def opened(request, tmp_path):
    case, version = request.param
    written = Dataset(cameras={}, columns=COLUMNS, lengths=LENGTHS, version=version, row_group_rows=16)
    root = write(
        tmp_path / "set", written if version == "v2.1" else Dataset(**{**vars(written), "episodes_per_data_file": 4})
    )
    rewritten(root, SPOILT[case])
    return (
        mixture(tmp_path, f"data.sources.main.root={root}", "data.sources.main.val_split_ratio=0", "~data.sources.old")
        .datasets[0]
        .source
    )


CASES = [(case, "v3.0") for case in SPOILT] + [("as listed", "v2.1")]


@pytest.mark.parametrize("opened", CASES, indirect=True, ids=lambda c: f"{c[0]}, {c[1]}")
@pytest.mark.parametrize("rows", [1, 30, 2**16])
def test_stretches_have_the_rows_the_order_and_the_sums_of_reading_one_by_one(rows, opened, monkeypatch):
    monkeypatch.setattr(stretches, "STRETCH_ROWS", rows)
    for chosen in (np.arange(10), np.array([8, 0, 2, 5, 9]), np.array([3])):
        together = list(opened.columns(chosen))
        with monkeypatch.context() as patch:
            patch.setattr(source_module, "read_in_stretches", lambda reading, ordered: iter(()))
            apart = list(opened.columns(chosen))
        assert [p for p, _, _ in together] == [p for p, _, _ in apart]
        for (_, *one), (_, *other) in zip(together, apart, strict=True):
            assert [a.tobytes() for a in one] == [a.tobytes() for a in other]
            # Also as they lie in memory: it decides in which order numpy adds.
            assert [a.astype(np.float64).sum(0).tobytes() for a in one] == [
                a.astype(np.float64).sum(0).tobytes() for a in other
            ]
        stats = [
            compute(
                (("d", p, s, [a]) for p, s, a in found), sum(LENGTHS), opened.state_names, opened.action_names
            ).to_json()
            for found in (together, apart)
        ]
        assert stats[0] == stats[1]


def test_rows_of_one_group_of_many_and_of_parts_of_them_are_those_of_the_file(tmp_path):
    table = pa.table({"row": np.arange(23), "action": [[float(row)] * 2 for row in range(23)]})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=5)
    reader = RowReader(["action", "row"])
    for start in range(24):
        for length in range(25 - start):
            rows = reader.slice(tmp_path / "rows.parquet", start, length)
            assert rows.equals(table.slice(start, length).select(["action", "row"])), (start, length)


@pytest.mark.parametrize("opened", [("as listed", "v3.0")], indirect=True)
def test_a_stretch_lies_in_one_file_and_keeps_its_bound(opened, monkeypatch):
    monkeypatch.setattr(stretches, "STRETCH_ROWS", 45)
    stored = opened.reading.stored
    runs = list(stretches._stretches(stored, np.arange(10)))
    assert np.concatenate(runs).tolist() == list(range(10)) and len(runs) > 3
    for run in runs:
        assert len(set(stored.data_file[run].tolist())) == 1
        assert len(run) == 1 or stored.table.length[run].sum() <= 45
