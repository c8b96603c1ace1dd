"""The numbers of a run are sent to a tracker afterwards: each step once, what wasn't taken is told."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opentau_train.sinks import background, jsonl
from opentau_train.sinks.trackers import TrackerSink
from opentau_train.tools import replay

STEPS = 7


class Taken(TrackerSink):
    """Accelerate's TensorBoard in place of a server's tracker; it breaks at the step `until`."""

    tracker = "tensorboard"
    until = 10**9

    def identity(self):
        return {"logging_dir": str(self._context.run_dir / "sent")}

    def _log(self, step, values):
        if step >= self.until:
            raise RuntimeError("the server is gone")
        super()._log(step, values)


class Broken(Taken):
    until = 4


@pytest.fixture
def run(tmp_path):
    """A run whose second attempt went on after step 4, and which validated twice."""
    folder = tmp_path / "droid"
    (folder / "plots").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 3, "model": {"width": 8}}))
    lines = [{"step": n, "time": n, "attempt": 1 + (n > 4), "Training/Loss": 1 / n} for n in range(1, STEPS + 1)]
    lines += [{"step": n, "time": n, "attempt": 1, "Validation/Loss": None if n == 3 else 2.0} for n in (3, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.fromarray(np.full((4, 6, 3), 9, np.uint8)).save(folder / "plots" / "actions_00000006.png")
    return folder


def scalars(folder, tag):
    return [(e.step, e.value) for e in EventAccumulator(str(folder)).Reload().Scalars(tag)]


def send(run, sink):
    chosen = f"+logger.mine={{_target_: {__name__}.{sink}, project: robots}}"
    return replay.main([str(run), "logger=none", chosen])


def test_all_steps_validations_and_pictures_are_sent_once_and_the_run_is_as_before(run, capsys):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert replay.main([str(run), "logger=tensorboard"]) == 0
    assert capsys.readouterr().out == f"{STEPS} steps of {run} were sent\n"
    losses = scalars(run / "tensorboard", "Training/Loss")
    assert losses == [(n, pytest.approx(1 / n)) for n in range(1, STEPS + 1)]
    assert [step for step, _ in scalars(run / "tensorboard", "Validation/Loss")] == [3, 6]
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [e.step for e in events.Images("Validation-Action/Chunks")] == [6]
    assert b'"width": 8' in events.Tensors("Config/text_summary")[0].tensor_proto.string_val[0]
    assert before == {p: p.read_bytes() for p in before}


def test_a_tracker_gets_more_rows_than_it_keeps_waiting(run, monkeypatch):
    monkeypatch.setattr(background, "LIMIT", 3)
    monkeypatch.setattr(replay, "EVERY", 1)
    assert send(run, "Taken") == 0
    assert [step for step, _ in scalars(run / "sent" / "robots", "Training/Loss")] == list(range(1, STEPS + 1))


def test_a_tracker_that_breaks_is_a_fault(run, capsys):
    assert send(run, "Broken") == 1
    assert f"mine didn't take all of the {STEPS} steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["RUN"], ["no tracker is named", "remedy: add logger=wandb"]),
        (["RUN", "logger=console"], ["no tracker is named"]),
        (["RUN", "logger=tensorbord"], ["tensorbord", "tensorboard"]),
        (["RUN", "logger=tensorboard", "trainer.steps=3"], ["'trainer.steps=3' says nothing of a tracker"]),
        (["logger=tensorboard"], ["give one run directory"]),
        (["RUN/plots", "logger=tensorboard"], ["the run's configuration"]),
    ],
)
def test_a_mistake_is_told_in_the_programs_form(words, texts, run, capsys):
    assert replay.main([word.replace("RUN", str(run)) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and all(text in error for text in texts), error


def test_the_parts_of_a_step_are_those_that_were_written():
    row = {"step": 3, "time": 1.0, "attempt": 2, "Training/Loss": 0.5, "Validation/a/b/MSE": None}
    trained, validated = jsonl.split({**row, "Timing/Validation": 2.0})
    assert trained == {"Training/Loss": 0.5} and validated.keys() == {"Validation/a/b/MSE", "Timing/Validation"}
    assert np.isnan(validated["Validation/a/b/MSE"]) and jsonl.split({"step": 1}) == []
