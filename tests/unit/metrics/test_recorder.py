"""The flight recorder writes what the steps really saw, and costs nothing when it is off."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from opentau_train.data.batch import Batch
from opentau_train.data.load.stream import training_batches
from opentau_train.data.order.tape import Tape
from opentau_train.distributed.performance import Stamp
from opentau_train.errors import UserError
from opentau_train.metrics.recorder import FOLDER, FlightRecorder
from opentau_train.step import StepTaken, TrainState
from opentau_train.tools.flight import read_losses, read_step
from tests.fake_source import ONE, mixture_of
from tests.program import TOY, metrics, train_here

WEIGHTS = {"mse": 1.0, "ce": 0.1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train_here(
        [*TOY, "trainer.steps=4", "validation.every=0", "flight_recorder=true"], tmp_path_factory.mktemp("r") / "run"
    )


def test_recorded_losses_are_those_of_the_metrics(run):
    rows = metrics(run)
    for step in range(1, 5):
        found = read_step(run, step)
        assert found.loss == pytest.approx(rows[step]["Training/Loss"], rel=1e-4)
        assert found.grad_norm == rows[step]["Training/GradNorm"]
        assert sum(s.share for s in found.samples) == pytest.approx(1.0)
        assert [s.t for s in found.samples] == list(range(4 * step - 4, 4 * step))
    norms = read_step(run, 3, neighbours=1).norms
    assert norms == {step: rows[step]["Training/GradNorm"] for step in (2, 3, 4)}


def test_all_losses_are_those_of_the_steps(run, tmp_path):
    recorded = read_losses(run)
    weights = json.loads(next((run / FOLDER).iterdir()).read_text().splitlines()[0])["loss_weights"]
    for step in range(1, 5):
        rows = recorded.step == step
        got = sorted(zip(recorded.dataset[rows], recorded.episode[rows], recorded.loss[rows], strict=True))
        samples = [
            (s.dataset, s.episode, sum(weights[k] * v for k, v in s.loss.items())) for s in read_step(run, step).samples
        ]
        wanted = sorted((recorded.names.index(name), *rest) for name, *rest in samples)
        assert [row[:2] for row in got] == [row[:2] for row in wanted]
        assert [row[2] for row in got] == pytest.approx([row[2] for row in wanted])
    again = shutil.copytree(run / FOLDER, tmp_path / "again" / FOLDER)  # a step that a resumed run did once more
    for path in list(again.iterdir()):
        (again / path.name.replace("-000001", "-000002")).write_text(path.read_text())
    assert len(read_losses(tmp_path / "again").step) == len(recorded.step)
    assert len(read_losses(tmp_path / "nothing").step) == 0


def test_worst_comes_first(run):
    shares = [s.share for s in read_step(run, 2).worst(3)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == max(s.share for s in read_step(run, 2).samples)


def test_off_by_default_and_then_nothing_is_written(tmp_path):
    run = train_here([*TOY, "trainer.steps=1", "validation.every=0"], tmp_path / "run")
    assert not (run / FOLDER).exists()


def test_a_step_without_record_says_what_there_is(run, tmp_path):
    with pytest.raises(UserError, match="steps 1 to 4"):
        read_step(run, 9)
    with pytest.raises(UserError, match="flight_recorder=true"):
        read_step(tmp_path, 1)


def taken(size: int, loss: float) -> StepTaken:
    terms = {k: (torch.full((size,), loss), torch.ones(size)) for k in WEIGHTS}
    halves = [{k: (s[a], c[a]) for k, (s, c) in terms.items()} for a in (slice(0, 1), slice(1, None))]
    now = Stamp(torch.device("cpu"))
    rows = torch.arange(size)
    return StepTaken([(torch.zeros(1), half) for half in halves], rows, torch.tensor(2.5), 1e-3, (now, now, now))


class Flights:
    """Recorders of the ranks of a small run, and the batches that its stream builds."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.mixture = mixture_of({"d": "9,9,9,9,9,9"}, folder / "cache", num_workers=0, lanes_per_sample=1)

    def tape(self, offset: int = 0) -> Tape:
        return self.mixture.tape(4).moved(offset)

    def batch(self, step: int, rank: int = 0, size: int = 1, offset: int = 0) -> Batch:
        steps = {"first_step": step - 1, "last_step": step}
        quarantine = self.folder / "quarantine.jsonl"
        parts = training_batches(self.mixture, self.tape(offset), rank=rank, size=size, quarantine=quarantine, **steps)
        return next(parts).batch

    def write(self, steps, loss: float, rank: int = 0, size: int = 1, offset: int = 0, **limits: int) -> None:
        """A process of rank `rank` that trains `steps`."""
        world = dataclasses.replace(ONE, rank=rank, size=size)
        with FlightRecorder(self.folder, self.tape(offset), self.mixture, world, **limits) as recorder:
            for step in steps:
                policy = torch.nn.Module()
                policy.loss_weights = WEIGHTS
                state = TrainState(policy, None, None, None, step=step)
                recorder.write(state, self.batch(step, rank, size, offset), taken(4 // size, loss))


@pytest.fixture
def flights(tmp_path):
    return Flights(tmp_path)


def test_all_ranks_together_record_the_whole_batch_once(flights):
    for rank in range(2):
        flights.write([3], 1.0 + rank, rank, 2)
    found = read_step(flights.folder, 3)
    assert [s.t for s in found.samples] == [8, 9, 10, 11]
    assert [s.rank for s in found.samples] == [0, 1, 0, 1]
    whole = flights.batch(3)
    addresses = list(zip(whole.episode_index.tolist(), whole.frame_index.tolist()))
    assert [(s.episode, s.frame) for s in found.samples] == addresses


def test_a_step_done_again_counts_as_it_was_done_last(flights):
    for rank, size, loss in ((0, 2, 5.0), (1, 2, 5.0), (0, 1, 1.0)):
        flights.write([3], loss, rank, size)
    assert read_step(flights.folder, 3).loss == pytest.approx(1.1)


def test_a_step_done_again_on_other_samples_counts_those_only(flights):
    flights.write([3], 5.0)
    flights.write([3], 1.0, offset=38)  # as after resume.data=restart
    found = read_step(flights.folder, 3)
    assert [s.t for s in found.samples] == [46, 47, 48, 49]
    assert found.loss == pytest.approx(1.1) and sum(s.share for s in found.samples) == pytest.approx(1)


def test_files_rotate_and_the_oldest_go(flights):
    flights.write(range(1, 8), 1.0, max_bytes=1, max_files=3)
    files = sorted((flights.folder / FOLDER).iterdir())
    assert [json.loads(f.read_text())["step"] for f in files] == [5, 6, 7]


def test_a_half_written_line_of_a_killed_run_is_passed_over(flights):
    flights.write([1], 1.0)
    path = next((flights.folder / FOLDER).iterdir())
    path.write_bytes(path.read_bytes() + path.read_bytes()[:50])
    assert read_step(flights.folder, 1).loss == pytest.approx(1.1)
    flights.write([2], 1.0)
    assert read_step(flights.folder, 2).step == 2


GARBLED = {
    "no_start": lambda line: b"garbled\n",
    "nothing": lambda line: b"\n",
    "no_json": lambda line: line.replace(b'"lr":', b'"lr'),
    "not_text": lambda line: line.replace(b'"lr":', b'"lr\xff":'),
    "other_key": lambda line: line.replace(b'"frame":', b'"frome":'),
    "other_term": lambda line: line.replace(b'"sum":{"mse"', b'"sum":{"mze"'),
    "short_column": lambda line: line.replace(b'"pass":[0,', b'"pass":['),
    "no_column": lambda line: line.replace(b'"pass":[0,0,0,0]', b'"pass":7'),
}


@pytest.mark.parametrize("how", GARBLED)
def test_a_garbled_line_is_passed_over_with_a_warning_that_names_it(flights, how, caplog):
    caplog.set_level("WARNING", "opentau_train")
    flights.write([1, 2, 3, 40], 1.0)
    (path,) = (flights.folder / FOLDER).iterdir()
    first, second, *others = path.read_bytes().splitlines(keepends=True)
    assert GARBLED[how](second) != second
    path.write_bytes(b"".join([first, GARBLED[how](second), *others]))
    assert sorted(read_step(flights.folder, 1, neighbours=5).norms) == [1, 3]
    assert [record.getMessage() for record in caplog.records] == [f"{path}, line 2 is garbled and passed over"]
    with pytest.raises(UserError, match="steps 1 to 40"):
        read_step(flights.folder, 2)
