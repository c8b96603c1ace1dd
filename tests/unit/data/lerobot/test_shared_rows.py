"""Rows that a worker's lanes share: read once while they fit, and never more than may be kept."""

from __future__ import annotations

import numpy as np
import pytest

from opentau_train.data.lerobot import rows as rows_module
from opentau_train.data.lerobot.shared_rows import SharedRows
from tests.lerobot_writer import Dataset, vector, write
from tests.unit.data.load.test_real_stream import mixture


@pytest.fixture
def cursors(tmp_path):
    columns = {"observation.state": vector(4), "action": vector(3, 0.5)}
    root = write(tmp_path / "set", Dataset(cameras={}, columns=columns, lengths=[20] * 12))
    found = mixture(tmp_path, f"data.sources.main.root={root}", "~data.sources.old")
    (dataset,) = found.datasets
    return dataset.source.cursors(dataset.window(found.spec))


def test_lanes_in_one_episode_read_its_rows_once(cursors):
    lanes = [cursors.cursor() for _ in range(5)]
    for frame in range(20):
        for lane in lanes:
            lane.read(3, frame)
    for lane in lanes:
        lane.read(4, 0)
    assert cursors.rows.num_loaded == 2


def test_no_more_bytes_are_kept_than_may_be_and_rows_read_again_are_the_same(cursors):
    whole = SharedRows(cursors.reading, cursors.reader)
    first = [whole.at(i) for i in range(12)]
    each = whole.num_bytes // 12
    few = SharedRows(cursors.reading, cursors.reader, max_bytes=3 * each)
    for i in np.random.default_rng(0).integers(0, 12, 200).tolist():
        assert few.at(i).actions.tobytes() == first[i].actions.tobytes()
        assert few.num_bytes <= 3 * each
    assert 12 < few.num_loaded < 200  # some were kept, some had gone
    tiny = SharedRows(cursors.reading, cursors.reader, max_bytes=0)
    assert tiny.at(0) is tiny.at(0) and tiny.num_bytes == each


def test_the_episodes_used_least_recently_go_first(cursors):
    shared = SharedRows(cursors.reading, cursors.reader)
    shared.at(0)
    shared = SharedRows(cursors.reading, cursors.reader, max_bytes=3 * shared.num_bytes)
    kept = [shared.at(i) for i in range(3)]
    assert shared.at(0) is kept[0]
    shared.at(3)
    assert shared.at(0) is kept[0] and shared.num_loaded == 4
    assert shared.at(1) is not kept[1]


@pytest.mark.parametrize("num_columns", [1, 2, 3])
def test_combinations_are_those_of_the_rows_side_by_side(num_columns):
    rng = np.random.default_rng(num_columns)
    for high in (1, 2, 5):
        columns = [rng.integers(-1, high, 30) for _ in range(num_columns)]
        first, code = rows_module._combinations(columns)
        distinct, expected = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
        assert [tuple(c[i] for c in columns) for i in first] == [tuple(row) for row in distinct.tolist()]
        assert code.tolist() == expected.reshape(-1).tolist()
