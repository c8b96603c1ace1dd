import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from opentau_train.data.tape import DatasetBlocks
from opentau_train.data.windows import equal_spans, make_blocks, validation_split, validation_windows
from opentau_train.types import EpisodeTable


def table(lengths: list[int]) -> EpisodeTable:
    n = len(lengths)
    zeros = np.zeros(n, np.int64)
    return EpisodeTable(
        np.arange(n) * 10,
        np.array(lengths, np.int32),
        zeros.astype(np.int16),
        ("m",),
        zeros.astype(np.int32),
        zeros,
        {},
        {},
    )


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
    assert np.diff(place).max(initial=1) <= -(-sum(lengths) // len(frame))


@given(st.lists(st.floats(0.1, 10), max_size=60), st.integers(1, 9))
def test_spans_are_contiguous_complete_and_equal_within_one_item(cost, parts):
    cost = np.array(cost)
    bounds = equal_spans(cost, parts)
    assert bounds[0] == 0 and bounds[-1] == len(cost) and len(bounds) == parts + 1 and (np.diff(bounds) >= 0).all()
    sums = [cost[a:b].sum() for a, b in itertools.pairwise(bounds)]
    assert max(sums) <= cost.sum() / parts + cost.max(initial=0) + 1e-9
