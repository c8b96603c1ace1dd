import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from opentau_train.data.chunk import (
    SNAP_ROWS,
    chunk_places,
    chunk_rows,
    chunks_reaching,
    next_rows,
    rows_at,
)
from opentau_train.data.lerobot.near_frames import future_rows, history_rows
from opentau_train.data.mixture.split import validation_split
from opentau_train.data.order.blocks import DatasetBlocks, make_blocks
from opentau_train.types import EpisodeTable
from opentau_train.validation.plan import equal_spans, validation_windows


def table(lengths: list[int]) -> EpisodeTable:
    n = len(lengths)
    return EpisodeTable(np.arange(n) * 10, np.array(lengths, np.int32), np.zeros(n, np.int16), ("m",))


@given(st.sets(st.integers(0, 10_000), min_size=2), st.floats(0.001, 0.9), st.integers(0, 5))
def test_split_holds_out_one_at_least_and_leaves_one(numbers, ratio, seed):
    numbers = np.array(sorted(numbers))
    held_out = validation_split("d", numbers, ratio, seed)
    assert 1 <= held_out.sum() < len(numbers)


@given(st.sets(st.integers(0, 500), min_size=30, max_size=80))
def test_an_episodes_side_does_not_depend_on_the_others(numbers):
    numbers = np.array(sorted(numbers))
    everything = np.arange(501)
    whole = dict(zip(everything, validation_split("d", everything, 0.3, 0)))
    part = validation_split("d", numbers, 0.3, 0)
    if part.sum() > 1:
        assert [whole[n] for n in numbers] == part.tolist()


def test_no_ratio_and_a_single_episode_hold_nothing_out():
    assert not validation_split("d", np.arange(9), 0.0, 0).any()
    assert not validation_split("d", np.arange(1), 0.5, 0).any()


def test_drop_tail_keeps_only_windows_whose_chunk_fits():
    source = np.array([[0, 0, 5], [1, 0, 2], [2, 2, 3]], np.int32)
    found = make_blocks("d", table([5, 2, 9]), source, np.ones(3, bool), rows=4, drop_tail=True, shuffle=True)
    assert list(zip(found.episode, found.start, found.length)) == [(0, 0, 2), (2, 2, 3)]
    padded = make_blocks("d", table([5, 2, 9]), source, np.ones(3, bool), rows=4, drop_tail=False, shuffle=True)
    assert padded.num_windows == 10


def blocks(lengths):
    place = np.arange(len(lengths), dtype=np.int32)
    return DatasetBlocks("d", place, np.zeros_like(place), np.array(lengths, np.int32), place.astype(np.int64))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 50))
def test_systematic_sample_takes_its_number_spread_over_the_group(lengths, most):
    groups = [np.zeros(len(lengths), np.int64)]
    _, episode, frame = validation_windows([blocks(lengths)], groups, most)
    assert len(frame) == min(most, sum(lengths))
    assert len(set(zip(episode.tolist(), frame.tolist()))) == len(frame)
    place = np.concatenate([[0], np.cumsum(lengths)])[episode] + frame
    assert np.diff(place, append=sum(lengths)).max() <= -(-sum(lengths) // len(frame)), "to the group's end"


@given(st.lists(st.floats(0.1, 10), max_size=60), st.integers(1, 9))
def test_spans_are_contiguous_complete_and_equal_within_one_item(cost, parts):
    cost = np.array(cost)
    bounds = equal_spans(cost, parts)
    assert bounds[0] == 0 and bounds[-1] == len(cost) and len(bounds) == parts + 1 and (np.diff(bounds) >= 0).all()
    sums = [cost[a:b].sum() for a, b in itertools.pairwise(bounds)]
    assert max(sums) <= cost.sum() / parts + cost.max(initial=0) + 1e-9


@given(st.integers(1, 40), st.integers(0, 39), st.integers(1, 12), st.sampled_from([0.3, 0.5, 1.0, 1.5, 2.0, 10 / 3]))
def test_a_chunk_by_time_is_the_line_through_the_rows(length, frame, chunk, step):
    frame = min(frame, length - 1)
    time = np.arange(length, dtype=np.float32)[:, None]
    values, is_pad = rows_at(time, chunk_places(frame, chunk, step))
    wanted = frame + np.arange(chunk) * step
    np.testing.assert_allclose(values[:, 0], np.minimum(wanted, length - 1), atol=SNAP_ROWS)
    np.testing.assert_array_equal(is_pad, wanted > length - 1 + SNAP_ROWS)
    assert (
        frame + chunk_rows(chunk, step) - 1 - (length - 1) <= 0 or is_pad.any()
    )  # what fits by the rows is not padded


def test_a_chunk_at_the_dataset_s_own_rate_is_its_rows_bit_for_bit():
    rows = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    values, is_pad = rows_at(rows, chunk_places(5, 6, 1.0))
    np.testing.assert_array_equal(values, rows[[5, 6, 7, 8, 8, 8]])
    assert is_pad.tolist() == [False] * 4 + [True] * 2


def test_uneven_rows_are_read_by_their_times():
    seconds = np.array([0.0, 0.1, 0.3, 0.7, 0.8])
    values, is_pad = rows_at(np.array([[0.0], [1], [3], [7], [8]], np.float32), chunk_places(1, 5, 2.0, seconds, 5.0))
    np.testing.assert_allclose(values[:, 0], [1, 3, 5, 7, 8], atol=1e-5)  # at 0.1, 0.3, 0.5, 0.7, 0.9 s
    assert is_pad.tolist() == [False] * 4 + [True]


def test_float32_timestamps_of_a_long_episode_meet_their_rows():
    """An hour into an episode a float32 is 0.1 ms off."""
    seconds = (3600 + np.arange(300) / 50).astype(np.float32).astype(np.float64)
    place = chunk_places(0, 100, 2.0, seconds, 25.0)
    np.testing.assert_array_equal(place, np.arange(100) * 2)


def test_flags_keep_the_row_before_while_positions_move():
    rows = np.array([[0.0, 0], [10, 1], [20, 0]], np.float32)
    values, _ = rows_at(rows, np.array([0.5, 1.0, 1.75]), held=np.array([False, True]))
    np.testing.assert_allclose(values, [[5, 0], [10, 1], [17.5, 1]])


def test_history_steps_back_in_time_and_never_before_the_episode():
    assert history_rows(9, 3).tolist() == [6, 7, 8, 9]
    assert history_rows(9, 3, 2.5).tolist() == [1, 4, 7, 9]  # 7.5 back, 5 back, 2.5 back: the even one at a tie
    assert history_rows(1, 2, 3.0).tolist() == [0, 0, 1]


@given(st.lists(st.integers(1, 90), min_size=1, max_size=30), st.integers(1, 5), st.sampled_from([7.0, 15.0, 30.0]))
def test_history_takes_the_rows_nearest_in_time(gaps, history, fps):
    seconds = np.cumsum([0, *gaps]) / 300
    for frame in range(len(seconds)):
        found = history_rows(frame, history, 30 / fps, seconds, fps)
        wanted = seconds[frame] - np.arange(history, -1, -1) / fps
        nearest = np.abs(seconds[: frame + 1, None] - wanted).min(0)
        # Within a hundredth of a row of the middle of two, either is the nearest.
        np.testing.assert_allclose(np.abs(seconds[found] - wanted), nearest, atol=0.02 * max(gaps) / 300)
        assert found[-1] == frame and (np.diff(found) >= 0).all()


def test_history_in_a_long_episode_of_float32_times_steps_back_as_in_a_short_one():
    seconds = (np.arange(30 * 2000) / 30).astype(np.float32).astype(np.float64)
    for fps, back in ((20.0, 1), (15.0, 2), (30.0, 1)):  # 1.5 rows back: the later one in the middle of two
        found = [history_rows(frame, 1, 30 / fps, seconds, fps)[0] - frame for frame in range(3, len(seconds), 37)]
        assert set(found) == {-back}


@given(st.integers(1, 12), st.integers(1, 9), st.data())
def test_the_next_rows_are_those_at_their_places(length, num, data):
    row = data.draw(st.integers(0, length - 1))
    values = np.random.default_rng(length).normal(size=(length, 2)).astype(np.float32)
    for one, other in zip(next_rows(values, row, num), rows_at(values, chunk_places(row, num, 1.0)), strict=True):
        np.testing.assert_array_equal(one, other)
    next_rows(values, row, num)[0][:] = 9.0
    assert not (values == 9.0).any()  # a copy


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 7), st.booleans(), st.integers(1, 9))
def test_stride_takes_every_kth_of_the_frames_that_may_start_a_window(lengths, stride, drop_tail, rows):
    source = np.stack([np.arange(len(lengths)), np.zeros(len(lengths)), lengths], axis=1).astype(np.int32)
    keep = np.ones(len(lengths), bool)
    options = {"rows": rows, "drop_tail": drop_tail, "shuffle": True}
    found = make_blocks("d", table(lengths), source, keep, stride=stride, **options)
    seen = [found.window(place) for place in range(found.num_windows)]
    last = [n - (rows - 1 if drop_tail else 0) for n in lengths]
    assert seen == [(e, f) for e, n in enumerate(last) for f in range(0, max(0, n), stride)]
    dataset, episode, frame = validation_windows([found], [np.zeros(len(lengths), np.int64)], None)
    assert list(zip(episode, frame)) == seen and not dataset.any()


def test_a_future_frame_is_the_nearest_row_and_the_later_of_two():
    rows, is_pad = future_rows(np.array([2.0, 2.4, 2.5, 2.6, 4.0, 4.2, 9.0]), 5)
    assert rows.tolist() == [2, 2, 3, 3, 4, 4, 4]
    assert is_pad.tolist() == [False, False, False, False, False, True, True]


def test_chunks_reach_a_step_as_long_as_its_row_is_there():
    """An episode of 5 rows has 5 chunks with a first row, 3 with the one 2 rows on, 2 with a place 2.5 rows on."""
    assert chunks_reaching(5, np.array([0.0, 1.0, 2.0, 2.5, 4.0, 5.0, 7.0])).tolist() == [5, 4, 3, 2, 1, 0, 0]
