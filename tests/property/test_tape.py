"""The tape's promises, over random mixtures: exactly once, exact shares, one order for every topology."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from opentau_train.data.order.blocks import DatasetBlocks, draws_per_epoch
from opentau_train.data.order.state import resume_offset, save_state
from opentau_train.data.order.tape import VERSIONS, Tape
from opentau_train.data.order.windows import frames_ahead
from opentau_train.errors import UserError
from tests.golden import sample_ids

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12)
mixtures = st.lists(lengths, min_size=1, max_size=4)


def blocks(name: str, lengths: list[int], shuffle: bool = True) -> DatasetBlocks:
    place = np.arange(len(lengths))
    return DatasetBlocks(
        name,
        place.astype(np.int32),
        np.zeros(len(lengths), np.int32),
        np.array(lengths, np.int32),
        place + 100,
        shuffle,
    )


gops = st.none() | st.integers(1, 50)
"""A keyframe every so many frames; None: not known."""


def grouped(found: DatasetBlocks, gop: int | None) -> DatasetBlocks:
    """The blocks of episodes that have a keyframe every `gop` frames, from the first one on."""
    if gop is None:
        return found
    frames = [np.arange(0, n, gop) for n in found.length.tolist()]
    ends = np.cumsum([len(f) for f in frames])
    return found.entered_at(ends, np.concatenate(frames).astype(np.int32), reach=0)


def tape_of(mixture, weights=None, gop=None, **options) -> Tape:
    datasets = [grouped(blocks(f"d{i}", found), gop) for i, found in enumerate(mixture)]
    draws = draws_per_epoch([d.num_windows for d in datasets], weights or [None] * len(datasets))
    return Tape(datasets, draws, **{"seed": 7, "batch_size": 4, "lanes_per_sample": 2, "phase_rows": 3, **options})


def owned(tape: Tape, step: int, *whose: int):
    """A worker's part of one step: (rank, ranks, worker, workers)."""
    (part,) = tape.owned(range(step, step + 1), *whose)
    return part


def addresses(windows) -> np.ndarray:
    return np.stack([windows.dataset, windows.pass_index, windows.episode, windows.frame], axis=1)


@given(
    mixtures,
    st.integers(1, 12) | st.just(64),
    st.integers(1, 5),
    st.integers(1, 20),
    st.integers(0, 3),
    gops,
    st.sampled_from(VERSIONS),
)
def test_every_window_of_a_natural_epoch_exactly_once(mixture, batch, lanes, rows, epoch, gop, version):
    tape = tape_of(mixture, None, gop, batch_size=batch, lanes_per_sample=lanes, phase_rows=rows, version=version)
    seen = tape.windows(np.arange(epoch * tape.epoch_size, (epoch + 1) * tape.epoch_size))
    expected = {(d, epoch, e, f) for d, found in enumerate(mixture) for e, n in enumerate(found) for f in range(n)}
    assert len(seen) == len(expected)
    assert {tuple(map(int, row)) for row in addresses(seen)} == expected


@given(
    mixtures,
    st.integers(0, 40),
    st.sampled_from([1, 2, 3, 6]),
    st.sampled_from([1, 2, 3, 8]),
    gops,
    st.sampled_from(VERSIONS),
)
def test_global_batch_is_the_same_for_all_ranks_and_workers(mixture, step, ranks, workers, gop, version):
    tape = tape_of(mixture, None, gop, batch_size=6, version=version)
    whole = tape.batch(step)
    parts = [[owned(tape, step, r, ranks, w, workers) for w in range(workers)] for r in range(ranks)]
    for rank in parts:
        assert sum(len(p) for p in rank) == 6 // ranks
    flat = [p for rank in parts for p in rank]
    order = np.argsort(np.concatenate([p.t for p in flat]))
    np.testing.assert_array_equal(np.concatenate([addresses(p) for p in flat])[order], addresses(whole))


@pytest.mark.parametrize(("ranks", "workers"), [(1, 4), (2, 2), (2, 4), (4, 2)])
@pytest.mark.parametrize("version", VERSIONS)
def test_workers_of_a_rank_have_equal_shares_of_an_epoch(version, ranks, workers):
    tape = tape_of([[40] * 24, [30] * 16], batch_size=16, lanes_per_sample=4, phase_rows=60, version=version)
    steps = range(tape.epoch_size // tape.batch_size)
    for rank in range(ranks):
        shares = [sum(map(len, tape.owned(steps, rank, ranks, w, workers))) for w in range(workers)]
        assert max(shares) <= 1.15 * min(shares), (rank, shares)


@given(mixtures, st.integers(0, 200), st.integers(1, 60), gops)
def test_a_sample_depends_on_nothing_but_its_number(mixture, start, count, gop):
    tape = tape_of(mixture, None, gop)
    together = addresses(tape.windows(np.arange(start, start + count)))
    alone = np.concatenate(
        [addresses(tape_of(mixture, None, gop).windows(np.array([t]))) for t in range(start, start + count)]
    )
    np.testing.assert_array_equal(together, alone)


@given(
    st.lists(st.integers(1, 40) | st.integers(1, 3000), min_size=1, max_size=5),
    st.integers(1, 64),
    st.integers(1, 8),
    st.integers(1, 12) | st.just(1024),
    st.integers(0, 2),
    gops,
    st.sampled_from(VERSIONS),
)
def test_shares_hold_within_two_windows_in_any_batch_inside_a_phase(sizes, batch, lanes, rows, epoch, gop, version):
    """Of any length, down to a batch, its partial row included; within another one for each further dataset that
    shares a stretch with a dataset's ends."""
    options = {"batch_size": batch, "lanes_per_sample": lanes, "phase_rows": rows, "version": version}
    tape = tape_of([[n] for n in sizes], None, gop, **options)
    seen = tape.windows(np.arange(epoch * tape.epoch_size, (epoch + 1) * tape.epoch_size))
    phase = tape._phase_of(seen.t - epoch * tape.epoch_size)
    for p in np.unique(phase):
        found = seen.dataset[phase == p]
        if len(found) < batch:
            continue
        for d in range(len(sizes)):
            counts = np.convolve(found == d, np.ones(batch), "valid")
            share = np.bincount(found, minlength=len(sizes)) / len(found)
            assert np.abs(counts - batch * share[d]).max() < (2 if tape.num_stretches == batch else len(sizes) + 1)


@given(mixtures, st.lists(st.floats(0.05, 5.0), min_size=4, max_size=4))
def test_weights_give_exact_draws_per_epoch(mixture, weights):
    tape = tape_of(mixture, weights=weights[: len(mixture)])
    for epoch in range(2):
        seen = tape.windows(np.arange(epoch * tape.epoch_size, (epoch + 1) * tape.epoch_size))
        np.testing.assert_array_equal(np.bincount(seen.dataset, minlength=len(mixture)), tape.draws)


@given(mixtures, st.lists(st.floats(0.05, 5.0), min_size=4, max_size=4))
def test_a_weighted_dataset_is_gone_through_pass_after_pass(mixture, weights):
    """Over- or under-sampled: each pass is seen whole, without a repeat, before the line goes on to the next."""
    tape = tape_of(mixture, weights=weights[: len(mixture)])
    seen = tape.windows(np.arange(3 * tape.epoch_size))
    for d, found in enumerate(mixture):
        mine = addresses(seen)[seen.dataset == d][:, 1:]
        passes, counts = np.unique(mine[:, 0], return_counts=True)
        assert len(np.unique(mine, axis=0)) == len(mine)
        assert (counts[:-1] == sum(found)).all() and passes.tolist() == list(range(len(passes)))


@given(mixtures, lengths, st.integers(0, 4))
def test_adding_a_dataset_leaves_the_others_orders_unchanged(mixture, extra, k):
    alone, joined = tape_of(mixture), tape_of([*mixture, extra])
    for d in range(len(mixture)):
        np.testing.assert_array_equal(alone._pass(d, k)[0], joined._pass(d, k)[0])


def lanes_of(tape: Tape):
    """(phase, [N] the numbers of the samples that one reader takes in it, in order) over the first epoch."""
    windows = tape.windows(np.arange(tape.epoch_size))
    phase = tape._phase_of(windows.t)
    for p in np.unique(phase).tolist():
        for slot in np.unique(windows.slot[phase == p]).tolist():
            yield p, windows.select((phase == p) & (windows.slot == slot))


@given(mixtures, gops, st.sampled_from(VERSIONS), st.sampled_from([3, 32]))
def test_lanes_read_forward_without_gaps_inside_an_episode(mixture, gop, version, batch):
    tape = tape_of(mixture, None, gop, batch_size=batch, lanes_per_sample=2, phase_rows=50, version=version)
    for _, windows in lanes_of(tape):
        for before, after in itertools.pairwise(addresses(windows)):
            same_episode = (before[:3] == after[:3]).all()
            if same_episode:
                assert after[3] == before[3] + 1
            elif before[0] == after[0]:  # a dataset's share of a phase may itself start inside an episode
                assert after[3] == 0


@given(mixtures, st.integers(1, 20), st.sampled_from([1, 2]), st.booleans(), gops, st.sampled_from(VERSIONS))
def test_ahead_counts_the_frames_that_a_lane_reads_next(mixture, rows, stride, shuffle, gop, version):
    """Neither one too many, which would be decoded in vain, nor one too few inside a block and a phase."""
    datasets = [dataclasses.replace(blocks(f"d{i}", n, shuffle), stride=stride) for i, n in enumerate(mixture)]
    datasets = [grouped(found, gop) for found in datasets]
    draws, options = [d.num_windows for d in datasets], {"batch_size": 3, "lanes_per_sample": 2, "phase_rows": rows}
    tape = Tape(datasets, draws, seed=7, version=version, **options)
    for _, windows in lanes_of(tape):
        lane = addresses(windows).tolist()
        for place, row in enumerate(lane):
            ahead = 0
            while lane[place + 1 + ahead : place + 2 + ahead] == [[*row[:3], row[3] + ahead + 1]]:
                ahead += 1
            assert windows.ahead[place] == ahead


@given(st.lists(st.tuples(*[st.integers(0, 1)] * 2, st.integers(0, 5)), min_size=0, max_size=30))
@example([(1, 1, 1), (1, 1, 1), (1, 1, 2)])
def test_frames_ahead_of_a_list_are_those_that_follow_in_it(rows):
    """A window that comes several times in a row, once for each mode, is one frame to read."""
    found = frames_ahead(*np.array(rows, np.int64).reshape(-1, 3).T).tolist()
    for i, (dataset, episode, frame) in enumerate(rows):
        ahead = 0
        for later in rows[i + 1 :]:
            if later == (dataset, episode, frame + ahead + 1):
                ahead += 1
            elif later != (dataset, episode, frame + ahead):
                break
        assert found[i] == ahead


def test_fewer_windows_than_lanes_or_ranks_still_fill_every_batch():
    tape = tape_of([[1]], batch_size=8)
    assert [len(tape.batch(s)) for s in range(3)] == [8, 8, 8]
    assert tape.batch(0).pass_index.tolist() == list(range(8))


def test_in_order_reading_is_the_datasets_own_order():
    tape = Tape([blocks("a", [3, 2], shuffle=False)], [5], seed=0, batch_size=2)
    windows = tape.windows(np.arange(5))
    assert windows.episode.tolist() == [0, 0, 0, 1, 1] and windows.frame.tolist() == [0, 1, 2, 0, 1]
    assert not windows.slot.any()  # one reader, or each of them would decode what lies between its windows
    assert [len(owned(tape, 0, 0, 1, worker, 2)) for worker in range(2)] == [1, 1]  # still shared by the workers


def test_order_differs_between_seeds_and_passes():
    orders = [tape_of([[1] * 50], seed=seed)._pass(0, k)[0].tolist() for seed in (42, 43) for k in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_empty_dataset_is_an_error_that_names_it():
    empty = blocks("void", [])
    with pytest.raises(UserError, match="'void' has no training window"):
        Tape([empty], [0], seed=0, batch_size=1)


def test_a_changed_plan_is_refused_with_what_changed():
    tape = tape_of([[5, 6], [7]])
    state = save_state(tape, 3)
    assert state["t"] == 12 and resume_offset(tape, state, 3) == 0
    for changed, message in (
        (tape_of([[5, 6], [7]], seed=8), "seed: 7 -> 8"),
        (tape_of([[5, 6], [7]], batch_size=8), "trainer.global_batch_size: 4 -> 8"),
        (tape_of([[5, 6], [8]], weights=[11.0, 8.0]), "source 'd1': its windows changed"),
        (tape_of([[5, 6], [7]], weights=[1.0, 1.0]), "source 'd0': weight, 11 -> 9 windows an epoch"),
        (tape_of([[5, 6], [7], [1]]), "source 'd2' was added"),
        (tape_of([[5, 6]]), "source 'd1' was removed"),
    ):
        with pytest.raises(UserError, match=message):
            resume_offset(changed, state, 3)


def test_what_an_older_version_kept_of_its_settings_is_no_change_of_the_plan():
    tape = tape_of([[5, 6], [7]])
    state = save_state(tape, 3)
    older = {**state, "sources": {name: {**source, "settings": "0123"} for name, source in state["sources"].items()}}
    assert resume_offset(tape, older, 3) == 0


@pytest.mark.parametrize("num", [1, 30, 100, 200, 3000])
def test_state_stays_below_four_kib_for_any_number_of_datasets(num):
    names = [f"a_rather_long_name_of_a_dataset_{i}" for i in range(num)]
    made_of = {k: "0123456789ab" for k in ("files", "filter")}
    datasets = [dataclasses.replace(blocks(name, [1]), made_of=made_of) for name in names]
    tape = Tape(datasets, [1] * num, seed=2**63 - 1, batch_size=10**6)
    assert len(json.dumps(save_state(tape, 10**9))) < 4096
    other = dataclasses.replace(datasets[-1], made_of={**made_of, "files": "changed"})
    with pytest.raises(UserError, match="source"):
        resume_offset(
            Tape([*datasets[:-1], other], [1] * num, seed=2**63 - 1, batch_size=10**6), save_state(tape, 5), 5
        )


def test_restart_begins_an_epoch_of_the_changed_plan_that_the_old_one_had_not_begun():
    old, new = tape_of([[5, 6], [7]]), tape_of([[5, 6], [9]])
    for step in range(12):
        new = new.moved(resume_offset(new, save_state(old, step), step, restart=True))
        t = new.first_sample(step)
        assert t % new.epoch_size == 0 and t // new.epoch_size == -(-old.first_sample(step) // old.epoch_size)
        later = save_state(new, step + 4)  # a second, exact resume of the restarted run
        again = tape_of([[5, 6], [9]])
        again = again.moved(resume_offset(again, later, step + 4))
        assert again.batch(step + 4).digest() == new.batch(step + 4).digest()


@pytest.mark.parametrize(
    ("version", "gop", "digest"),
    [(2, None, 11605670541097055299), (3, None, 14927031507256711633), (3, 30, 12323237536477424157)],
)
def test_golden_order_of_the_first_hundred_thousand_samples(version, gop, digest):
    """Pinned: a library's new version, or a change of ours, must not reorder anybody's training. Changing a number
    needs a new `tape.VERSION`."""
    generator = np.arange(1, 400)
    mixture = [(generator * 7919 % 211 + 1).tolist(), (generator * 104729 % 97 + 1).tolist()]
    tape = tape_of(mixture, None, gop, batch_size=64, phase_rows=64, version=version)
    assert tape.windows(np.arange(100_000)).digest() == digest


def test_golden_order_of_the_first_million_samples():
    """Written by `make golden`."""
    assert sample_ids.make() == json.loads((Path(sample_ids.__file__).parent / "sample_ids.json").read_text())


def test_the_drawing_in_the_documentation_is_what_the_tape_does():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    order = re.search(r"\nt +0  1  2.*\nwindow +(.*)\n", page).group(1).split()
    line = re.search(r"\nline +(.*)\n", page).group(1).split()
    demo = grouped(dataclasses.replace(blocks("demo", [3, 5, 4, 2]), number=np.arange(4)), 3)
    tape = Tape([demo], [14], seed=1, batch_size=2, lanes_per_sample=2)

    def names(windows):
        return [f"{'ABCD'[e]}{f}" for e, f in zip(windows.episode, windows.frame)]

    assert names(tape.windows(np.arange(14))) == order
    in_line = [f"{'ABCD'[b]}{f}" for b in tape._pass(0, 0)[0] for f in range([3, 5, 4, 2][b])]
    assert in_line == line
