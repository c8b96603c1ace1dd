"""Where lanes begin and what that costs: the bound of docs/data.md, over random episodes and keyframes."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opentau_train.data.order.blocks import DatasetBlocks
from opentau_train.data.order.lanes import CONSECUTIVE, LEAST_STRETCHES, MOST_LOST, PhaseLanes, cost_of_a_cut, snapped
from opentau_train.data.order.state import order_version, resume_offset, save_state
from opentau_train.data.order.tape import VERSION, VERSIONS
from opentau_train.errors import UserError
from tests.property.test_tape import blocks, gops, grouped, lanes_of, mixtures, tape_of


def decoded(windows, gop: int) -> int:
    """Frames that a forward reader decodes for a lane's windows, with a keyframe every `gop` frames of an episode."""
    total, last = 0, None
    for episode, frame in zip(windows.episode.tolist(), windows.frame.tolist(), strict=True):
        total += 1 if last == (episode, frame - 1) else frame % gop + 1
        last = episode, frame
    return total


@given(st.lists(st.integers(20, 200), min_size=4, max_size=12), st.sampled_from([2, 8, 32]), st.integers(1, 4), gops)
def test_no_more_is_decoded_than_the_ends_of_stretches_and_long_groups_cost(lengths, batch, lanes, gop):
    """The bound of docs/data.md: a group is decoded once; for each stretch and each part of a group that gives a batch
    more than a lane may, up to a group more."""
    gop, total = gop or 1, sum(lengths)
    tape = tape_of([lengths], None, gop, batch_size=batch, lanes_per_sample=lanes, phase_rows=10**6)
    most = max(1, CONSECUTIVE * total // batch)
    bound = (tape.num_stretches - 1) * gop
    for size in (size for n in lengths for size in [gop] * (n // gop) + [n % gop]):
        parts = max(1, -(-size // most))
        bound += sum(size * part // parts for part in range(1, parts)) + size
    assert sum(decoded(windows, gop) for _, windows in lanes_of(tape)) <= bound


@given(st.lists(st.integers(20, 200), min_size=4, max_size=12), st.sampled_from([2, 8, 32]), gops)
def test_a_lane_gives_a_batch_no_more_windows_than_it_may_and_one_that_straddles(lengths, batch, gop):
    """Lanes of several groups may be longer than a part of one by half of it at each end."""
    tape = tape_of([lengths], None, gop, batch_size=batch, lanes_per_sample=2, phase_rows=10**6)
    for step in range(tape.epoch_size // batch):
        counts = np.unique(tape.batch(step).slot, return_counts=True)[1]
        assert counts.max() <= 2 * CONSECUTIVE + 1


def test_stretches_divide_the_batch_and_their_ends_cost_a_twentieth():
    for batch, gop in itertools.product((6, 32, 256, 1000), (1, 2, 15, 30, 250)):
        tape = tape_of([[200] * 20], None, gop, batch_size=batch)
        stretches, size = tape.num_stretches, tape.epoch_size / tape.num_phases
        assert batch % stretches == 0
        cost = cost_of_a_cut(tape.datasets[0])
        assert stretches * cost <= MOST_LOST * size or stretches <= LEAST_STRETCHES
        larger = [n for n in range(stretches + 1, batch + 1) if batch % n == 0]
        assert not larger or larger[0] * cost > MOST_LOST * size


@given(st.lists(st.integers(1, 40), min_size=1, max_size=10), st.integers(1, 50), st.data())
def test_a_place_moves_to_the_nearest_end_of_a_group_or_of_its_even_parts(sizes, most, data):
    groups, total = np.cumsum([0, *sizes[:-1]]), sum(sizes)
    ends = {total}
    for begin, size in zip(groups.tolist(), sizes, strict=True):
        parts = -(-size // most)
        ends |= {begin + part * size // parts for part in range(parts)}
    place = data.draw(st.integers(0, total - 1))
    (to,) = snapped(groups, total, np.array([place]), most).tolist()
    assert to in ends and abs(to - place) <= min(abs(end - place) for end in ends) + 1


@given(
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=6), min_size=1, max_size=5),
    st.lists(st.integers(0, 1000), max_size=3),
)
def test_turns_take_each_place_of_a_stretch_once_and_each_part_by_its_share(lanes, shares):
    width = max(map(len, lanes))
    lanes = [[*stretch, *[0] * (width - len(stretch))] for stretch in lanes]
    lengths = np.array(lanes)
    starts = np.append(0, np.cumsum(lengths.sum(1)))
    cuts = starts[:-1, None] + np.concatenate([np.zeros((len(lanes), 1), int), np.cumsum(lengths, 1)], axis=1)
    found = PhaseLanes(cuts, np.array([starts[-1]]))
    for stretch, total in enumerate(lengths.sum(1).tolist()):
        lane, place, left = found.turns(np.full(total, stretch), np.arange(total))
        assert sorted(place.tolist()) == list(range(starts[stretch], starts[stretch + 1]))
        for number, length in enumerate(lengths[stretch].tolist()):
            mine = lane == number
            np.testing.assert_array_equal(place[mine], cuts[stretch, number] + np.arange(length))
            np.testing.assert_array_equal(left[mine], length - 1 - np.arange(length))
            expected = np.arange(1, total + 1) * length / max(total, 1)
            halvings = int(np.ceil(np.log2(max(width, 2))))  # each adds less than a window to what the one before left
            assert np.abs(np.cumsum(mine) - expected).max(initial=0) < halvings


@given(mixtures, gops, st.data())
def test_leaving_episodes_out_leaves_the_groups_of_the_others(mixture, gop, data):
    whole = grouped(blocks("d", mixture[0]), gop)
    numbers = data.draw(st.lists(st.sampled_from(whole.number.tolist()), max_size=len(mixture[0]) - 1, unique=True))
    kept = [n for n, number in zip(mixture[0], whole.number.tolist(), strict=True) if number not in numbers]
    expected = grouped(blocks("d", kept), gop)
    if gop is None or not kept:
        return
    np.testing.assert_array_equal(whole.without(numbers).groups, expected.groups)


@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 3), st.integers(0, 4), st.integers(-9, 0))
def test_a_group_begins_with_the_first_window_whose_history_a_keyframe_begins(start, length, stride, reach, before):
    frames = np.arange(before, 100, 10)
    place = np.zeros(1, np.int32)
    block = DatasetBlocks("d", place, place + start, place + length, np.arange(1), stride=stride)
    found = block.entered_at(np.array([len(frames)]), frames.astype(np.int32), reach)
    windows = start + np.arange(length) * stride
    last_key = [int(frames[frames + reach <= w].max(initial=-1000)) for w in windows.tolist()]
    changes = [0, *(i for i in range(1, length) if last_key[i] != last_key[i - 1])]
    assert found.groups.tolist() == changes
    assert found.lead.tolist() == [max(0, start - max(before, last_key[0]))]


def test_a_run_goes_on_in_the_version_of_the_order_that_it_began_with():
    old = tape_of([[5, 6], [7]], None, 3, version=2)
    state = json.loads(json.dumps(save_state(old, 3)))
    assert order_version(state) == 2
    resumed = tape_of([[5, 6], [7]], None, 3, version=order_version(state))
    assert resume_offset(resumed, state, 3) == 0
    assert resumed.batch(3).digest() == old.batch(3).digest()
    newer = {**state, "version": max(VERSIONS) + 1}
    with pytest.raises(UserError, match="the order's version"):
        resume_offset(tape_of([[5, 6], [7]], None, 3, version=order_version(newer)), newer, 3)


def test_version_2_does_not_know_keyframes():
    known, unknown = (tape_of([[50, 60]], None, gop, version=2) for gop in (7, None))
    assert known.batch(3).digest() == unknown.batch(3).digest()
    assert save_state(known, 3) == save_state(unknown, 3)


def test_other_keyframes_are_another_plan():
    state = save_state(tape_of([[50, 60]], None, 7), 3)
    assert state["version"] == VERSION
    for gop in (8, None):
        with pytest.raises(UserError, match="keyframes"):
            resume_offset(tape_of([[50, 60]], None, gop), state, 3)
