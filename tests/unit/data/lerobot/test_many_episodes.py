"""Metadata of many episodes: numbered by one key, and not sorted where they rise; what sorted pairs would give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opentau_train.data.lerobot.files import distinct_pairs
from opentau_train.data.lerobot.spans import boundaries
from opentau_train.data.lerobot.tables import LARGEST, read_jsonl, read_parquet
from tests.lerobot_writer import Dataset, write
from tests.unit.data.load.test_real_stream import mixture

NUMBERS = st.one_of(st.integers(0, 3), st.integers(LARGEST - 2, LARGEST))


def by_pairs(first, second):
    pairs, number = np.unique(np.stack([first, second]), axis=1, return_inverse=True)
    return pairs[0].tolist(), pairs[1].tolist(), number.reshape(-1).tolist()


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=12), st.booleans())
def test_distinct_pairs_are_those_of_sorted_pairs_also_of_the_largest_numbers(pairs, rising):
    pairs = sorted(pairs) if rising else pairs
    first, second = (np.array([pair[i] for pair in pairs], np.int64) for i in range(2))
    assert tuple(column.tolist() for column in distinct_pairs(first, second)) == by_pairs(first, second)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(-1, 3)), min_size=1, max_size=9))
def test_boundaries_of_rising_episodes_are_those_of_the_same_ones_in_any_order(episodes):
    """Equal starts keep the order in which they come, so that they may only be moved as a whole."""
    episodes = sorted(episodes, key=lambda e: e[:2])
    file, start, lasts = (np.array(column) for column in zip(*episodes, strict=True))
    start = start.astype(np.float64)
    order = np.argsort([int(f) % 2 for f in file], kind="stable")  # files apart, their episodes in order
    lengths = np.full(len(file), 1.0)
    given = (file.astype(np.int32), start, start + lasts, lengths)
    straight = boundaries(*given, 0.5)
    moved = boundaries(*(column[order] for column in given), 0.5)
    for one, other in zip(straight, moved, strict=True):
        assert one[order].tolist() == other.tolist()


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_what_metadata_tell_of_an_episode_is_a_number_or_nothing(version, tmp_path):
    kept = {
        "a": [1.5, None, 2.0, None, 3.0],
        "b": ["7", True, None, "x", "8"][:5] if version == "v2.1" else list("abcde"),
    }
    columns = {"a": kept["a"], "b": kept["b"]}
    root = write(tmp_path / "set", Dataset(cameras={}, version=version, episode_columns=columns))
    if version == "v3.0":
        table = read_parquet(
            sorted((root / "meta/episodes").rglob("*.parquet")), {"episode_index": int}, (), ["a", "b", "c"]
        )
    else:
        table = read_jsonl(root / "meta/episodes.jsonl", {"episode_index": int}, (), ["a", "b", "c"])
    assert set(table.told) == {"a", "b"}
    assert np.array_equal(table.told["a"], [1.5, np.nan, 2.0, np.nan, 3.0], equal_nan=True)
    told = [value if isinstance(value, int | float) else np.nan for value in kept["b"]]
    assert np.array_equal(table.told["b"], np.array(told, np.float64), equal_nan=True)


def test_episodes_listed_in_no_order_are_the_same_dataset(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = write(tmp_path / "set", Dataset())
    given = [f"data.sources.main.root={root}", "~data.sources.old"]
    straight = mixture(tmp_path, *given).datasets[0].source
    paths = sorted((root / "meta/episodes").rglob("*.parquet"))
    table = pa.concat_tables([pq.read_table(path) for path in paths]).take(pa.array([3, 0, 4, 2, 1]))
    for path in paths:
        path.unlink()
    pq.write_table(table, paths[0])
    moved = mixture(tmp_path, *given).datasets[0].source
    assert moved.fingerprint == straight.fingerprint
    assert moved.blocks.tolist() == straight.blocks.tolist()
    for camera, places in straight.reading.stored.videos.items():
        other = moved.reading.stored.videos[camera]
        assert (places.first.tolist(), places.end.tolist()) == (other.first.tolist(), other.end.tolist())
