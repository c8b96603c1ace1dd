"""The stream's promises with real loader workers over fake datasets: the tape's order, whatever builds it."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opentau_train.data.order.state import resume_offset, save_state
from tests import fake_source
from tests.fake_source import addresses, global_batches, in_order, mixture_of, with_data

# torch's remark on machines with fewer cores than workers
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

WORKERS = [0, 1, 3, 8]
RANKS = [1, 2, 4, 8]
BATCH = 8

lengths = st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from(["", ";gop=1", ";gop=4"])).map(
    lambda drawn: ",".join(map(str, drawn[0])) + drawn[1]
)
mixtures = st.lists(lengths, min_size=1, max_size=3).map(lambda specs: {f"d{i}": s for i, s in enumerate(specs)})
few = settings(
    max_examples=max(4, settings.default.max_examples // 10),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
"""For properties whose every example starts workers."""


def tape_of(mixture):
    return mixture.tape(BATCH)


def expected(mixture, tape, step):
    """[B, 4] the tape's addresses, with episode numbers as samples carry them."""
    found = tape.batch(step)
    numbers = [
        int(mixture.datasets[d].source.episodes.episode_index[e])
        for d, e in zip(found.dataset, found.episode, strict=True)
    ]
    return np.stack([found.dataset, found.pass_index, numbers, found.frame], axis=1)


def delivered(mixture, tape, tmp: Path, *, size, first, last):
    """[steps, B, 4] what `size` ranks together were given, in the global order; each rank exactly B/R a step."""
    out = []
    for step, parts in enumerate(global_batches(mixture, tape, tmp / "q.jsonl", size=size, first=first, last=last)):
        assert [len(p.batch) for p in parts] == [BATCH // size] * size
        out.append(in_order(parts, tape, first + step, addresses))
    return np.array(out)


@given(mixtures, st.sampled_from(RANKS), st.sampled_from(WORKERS), st.integers(1, 3), st.integers(0, 30))
@few
def test_order_is_the_tape_s_for_all_ranks_workers_prefetch_and_delays(tmp_path, mix, size, workers, prefetch, first):
    options = {"num_workers": workers, "prefetch_factor": prefetch, "lanes_per_sample": 2, "phase_rows": 2}
    mixture = mixture_of({name: f"{spec};slow" for name, spec in mix.items()}, tmp_path, **options)
    tape = tape_of(mixture)
    found = delivered(mixture, tape, tmp_path, size=size, first=first, last=first + 3)
    np.testing.assert_array_equal(found, [expected(mixture, tape, s) for s in range(first, first + 3)])


@pytest.mark.parametrize("workers", WORKERS)
def test_samples_hold_the_windows_they_name(workers, tmp_path):
    mixture = mixture_of({"a": "5,3", "b": "4;slow"}, tmp_path, num_workers=workers)
    for parts in global_batches(mixture, tape_of(mixture), tmp_path / "q", size=2, first=0, last=4):
        for batch in (p.batch for p in parts):
            for d, episode, frame, image in zip(
                batch.dataset_index, batch.episode_index, batch.frame_index, batch.images["eye"], strict=True
            ):
                wanted = fake_source.picture("ab"[d], int(episode) - 1000, int(frame))
                np.testing.assert_array_equal(image.numpy().transpose(0, 2, 3, 1), wanted)


@given(mixtures, st.sampled_from(RANKS), st.integers(0, 2))
@few
def test_every_window_of_a_natural_epoch_exactly_once(tmp_path, mix, size, epoch):
    mixture = mixture_of(mix, tmp_path, num_workers=0, lanes_per_sample=2, phase_rows=2)
    tape = tape_of(mixture)
    first, last = epoch * tape.epoch_size // BATCH, -(-(epoch + 1) * tape.epoch_size // BATCH)
    flat = delivered(mixture, tape, tmp_path, size=size, first=first, last=last).reshape(-1, 4)
    start = epoch * tape.epoch_size - first * BATCH
    seen = [tuple(row) for row in flat[start : start + tape.epoch_size].tolist()]
    wanted = {
        (d, epoch, 1000 + e, f)
        for d, spec in enumerate(mix.values())
        for e, n in enumerate(map(int, spec.partition(";")[0].split(",")))
        for f in range(n)
    }
    assert set(seen) == wanted and len(seen) == len(wanted)


def test_a_dataset_of_one_window_fills_every_rank_and_worker(tmp_path):
    mixture = mixture_of({"one": "1"}, tmp_path, num_workers=3)
    found = delivered(mixture, tape_of(mixture), tmp_path, size=4, first=0, last=3)
    assert found[:, :, 1].ravel().tolist() == list(range(24))  # each sample is another pass over it


# -- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(mixtures, st.lists(st.tuples(st.integers(1, 3), st.sampled_from(WORKERS)), min_size=4, max_size=4))
@few
def test_chain_of_ranks_4_2_1_8_and_any_workers_continues_the_same_batches(tmp_path, mix, legs):
    state, step, found = None, 0, []
    for size, (steps, workers) in zip((4, 2, 1, 8), legs):
        mixture = mixture_of(mix, tmp_path, num_workers=workers, lanes_per_sample=2, phase_rows=2)
        tape = tape_of(mixture)
        if state is not None:  # as a checkpoint keeps it
            tape = tape.moved(resume_offset(tape, json.loads(state), step))
        found.append(delivered(mixture, tape, tmp_path, size=size, first=step, last=step + steps))
        step += steps
        state = json.dumps(save_state(tape, step))
        assert len(state) < 4096
    whole = [expected(mixture, tape, s) for s in range(step)]
    np.testing.assert_array_equal(np.concatenate(found), whole)


def test_a_resume_reads_nothing_of_what_came_before(tmp_path):
    mixture = mixture_of({"d": "400,300,500"}, tmp_path, num_workers=0)
    fake_source.READS.clear()
    far = 10**7
    delivered(mixture, tape_of(mixture), tmp_path, size=2, first=far, last=far + 2)
    assert len(fake_source.READS) == 2 * BATCH


@pytest.mark.parametrize("workers", [0, 3])
def test_a_restarted_stream_is_the_changed_plan_s_next_epoch(workers, tmp_path):
    old = tape_of(mixture_of({"d": "5,4"}, tmp_path))
    mixture = mixture_of({"d": "5,4,6"}, tmp_path, num_workers=workers)
    tape = tape_of(mixture)
    tape = tape.moved(resume_offset(tape, save_state(old, 2), 2, restart=True))
    found = delivered(mixture, tape, tmp_path, size=4, first=2, last=5).reshape(-1, 4)
    assert sorted(map(tuple, found[:15, 2:].tolist())) == [
        (1000 + e, f) for e, n in enumerate((5, 4, 6)) for f in range(n)
    ]
    assert (found[:15, 1] == 2).all()  # 16 samples of 9 windows: epoch 1 had begun


# -- bad windows -----------------------------------------------------------------------------------------------------


def quarantined(path: Path):
    """The causes without their times, in any order: each line must be whole."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted((r["dataset"], r["episode"], r["frame"], r["pass"], r["cause"]) for r in rows)


@given(st.lists(st.integers(1, 9), min_size=3, max_size=5), st.sampled_from(RANKS[1:]), st.sampled_from(WORKERS))
@few
def test_substitutes_are_the_same_when_rerun_and_when_resharded(tmp_path, ns, size, workers):
    spec = ",".join(str(n + 20) for n in ns)
    mixture = mixture_of({"a": f"{spec};bad=0.2", "b": spec}, tmp_path, source={"val_split_ratio": 0.3}, num_workers=0)
    tape = tape_of(mixture)
    runs = []
    for number, (ranks, width) in enumerate([(1, 0), (1, 0), (size, workers)]):
        folder = tmp_path / f"{spec}-{size}-{workers}-{number}"
        folder.mkdir(exist_ok=True)
        (folder / "q.jsonl").unlink(missing_ok=True)
        found = delivered(with_data(mixture, num_workers=width), tape, folder, size=ranks, first=0, last=4)
        runs.append((found, quarantined(folder / "q.jsonl") if (folder / "q.jsonl").exists() else []))
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    np.testing.assert_array_equal(runs[0][0], runs[2][0])
    assert runs[0][1] == runs[1][1] == runs[2][1]
    held_out = {1000 + e for e in np.flatnonzero(mixture.datasets[0].held_out)}
    for row, wanted in zip(runs[0][0].reshape(-1, 4), np.concatenate([expected(mixture, tape, s) for s in range(4)])):
        assert row[0] == wanted[0] and row[1] == wanted[1]  # the same dataset and pass
        assert row[0] == 1 or row[2] not in held_out  # and the same side of the split
        assert row[0] == 1 or mixture.datasets[0].source.readable(int(row[2]) - 1000, int(row[3]))


def test_a_dataset_that_can_not_be_read_at_all_ends_every_rank_s_stream_with_the_error_as_a_value(tmp_path):
    mixture = mixture_of({"void": "9,9;bad=1.0", "b": "9"}, tmp_path, num_workers=3)
    parts = next(global_batches(mixture, tape_of(mixture), tmp_path / "q.jsonl", size=2, first=0, last=9))
    assert all(p.batch is None and "in place of an unreadable one" in str(p.error) for p in parts)
