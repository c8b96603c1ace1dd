"""Rows of thousands of groups: trackers get those that are chosen, metrics.jsonl all, and training waits for none."""

from __future__ import annotations

import errno
import threading

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opentau_train.errors import Fault
from opentau_train.sinks.base import SinkContext, of_groups
from opentau_train.sinks.jsonl import read_rows
from opentau_train.sinks.layout import place_of
from opentau_train.sinks.opening import open_sinks
from opentau_train.sinks.tensorboard import TensorBoardSink

ROW = {
    "Training/Loss": 1.0,
    "Training/droid/joint/MSE": 2.0,
    "Validation/droid/joint/MSE": 3.0,
    "Validation/droid/joint/MSE/N": 40.0,
    "Validation/droid/joint/MSE/StdErr": 0.25,
    "Validation/aloha/ee/MSE": 4.0,
    "Validation/franka::joint/MSE/N": 5.0,
    "Validation/MSE": 6.0,
}
MIXTURE = {"Training/Loss", "Validation/MSE"}


@pytest.fixture
def context(tmp_path):
    return SinkContext(tmp_path, "run", 10, 0, {})


def shown(folder):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize(
    ("groups", "tags"),
    [
        (None, set(ROW)),
        ([], MIXTURE),
        (["*"], set(ROW)),
        (["droid/*"], MIXTURE | {tag for tag in ROW if "droid/" in tag}),
        (["franka::*", "aloha/ee"], MIXTURE | {"Validation/aloha/ee/MSE", "Validation/franka::joint/MSE/N"}),
        (["droid"], MIXTURE),
    ],
)
def test_a_tracker_is_sent_the_chosen_groups_and_the_mixture_always(groups, tags):
    assert of_groups(ROW, groups) == {tag: value for tag, value in ROW.items() if tag in tags}


def test_the_file_of_metrics_keeps_what_tensorboard_is_not_sent(context, tmp_path):
    entry = {"_target_": "opentau_train.sinks.tensorboard.TensorBoardSink", "groups": ["droid/*"]}
    with open_sinks({"tensorboard": entry}, context) as sinks:
        sinks.write(3, ROW)
    assert ROW.items() <= read_rows(tmp_path)[3].items()
    chosen = of_groups(ROW, ["droid/*"])
    assert set(shown(tmp_path)) == {place_of(tag, chosen) for tag in chosen}


def test_rows_come_whole_in_order_and_after_a_flush_they_are_on_disk(context, tmp_path):
    sink = TensorBoardSink(context=context)
    rows = [{f"Training/d{i}/joint/MSE": float(step * i) for i in range(1000)} for step in range(1, 6)]
    for step, row in enumerate(rows, start=1):
        sink.write(step, row)
        row.clear()  # the caller's own again
    sink.flush()
    found = shown(tmp_path)
    assert len(found) == 1000
    assert all(found[f"Training/d{i}/joint/MSE"] == [(s, float(s * i)) for s in range(1, 6)] for i in (0, 1, 999))
    sink.close()


def test_training_does_not_wait_and_what_went_wrong_is_raised_afterwards(context, monkeypatch):
    sink, free = TensorBoardSink(context=context), threading.Event()

    def stuck(*_):
        assert free.wait(60)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sink, "_add", stuck)
    sink.write(1, ROW)  # returns, though the thread hangs
    sink.write(2, ROW)
    free.set()
    with pytest.raises(Fault, match="disk is full"):
        sink.flush()
    monkeypatch.undo()
    with pytest.raises(Fault, match="disk is full"):
        sink.close()
    assert not any(thread.name.startswith("tensorboard") for thread in threading.enumerate())
