"""Sinks together, TensorBoard's files, accelerate's trackers, and the files of conf/logger/."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from accelerate.tracking import get_available_trackers
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opentau_train import composing
from opentau_train.errors import UserError
from opentau_train.sinks import trackers
from opentau_train.sinks.base import Sink, Sinks
from opentau_train.sinks.console import ConsoleSink
from opentau_train.sinks.jsonl import JsonlSink
from opentau_train.sinks.mlflow import MlflowSink
from opentau_train.sinks.opening import open_sinks
from opentau_train.sinks.tensorboard import TensorBoardSink
from opentau_train.sinks.trackers import TrackerSink, flatten, run_id
from tests.program import train_here

CONF = Path(__file__).parents[3] / "conf"


class FileSink(Sink):
    """A sink as an extension writes it: only what it has a place for."""

    def __init__(self, *, context, name: str, broken: bool = False):
        self.path, self.broken = context.run_dir / name, broken

    def write(self, step, row):
        self.path.write_text(f"{step} {row}")

    def close(self):
        if self.broken:
            raise RuntimeError("the disk is gone")
        self.path.with_suffix(".closed").touch()


class BoardSink(TrackerSink):
    """Another of accelerate's trackers: all that it takes to have it."""

    tracker = "tensorboard"

    def identity(self):
        return {"logging_dir": str(self._context.run_dir)}


class BrokenSink(FileSink):
    def __init__(self, *, context):
        raise UserError("no server answers")


def scalars(run_dir, tag):
    events = EventAccumulator(str(run_dir)).Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


def compose_logger(choice: str) -> dict:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tree = OmegaConf.to_container(compose(overrides=[f"+logger={choice}"]), resolve=True)
    return tree.get("logger", {})


def test_jsonl_is_always_there_and_first(make_context, tmp_path):
    with open_sinks({}, make_context()) as sinks:
        sinks.write(1, {"Training/Loss": 1.0})
        sinks.image(1, "wrist", np.zeros((2, 2, 3), np.uint8))
        sinks.text("note", "hello")
    assert [type(s) for s in sinks.sinks] == [JsonlSink]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1


def test_one_failure_to_close_closes_the_others_and_is_raised(make_context, tmp_path):
    context = make_context()
    with (
        pytest.raises(RuntimeError, match="the disk is gone"),
        Sinks([FileSink(context=context, name=n, broken=n == "b.txt") for n in ("a.txt", "b.txt", "c.txt")]) as sinks,
    ):
        sinks.write(7, {"x": 1.0})
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "b.txt", "c.txt", "a.closed", "c.closed"}


def test_sinks_already_open_are_closed_when_a_later_one_cannot_be_built(make_context, tmp_path):
    tree = {
        "mine": {"_target_": f"{__name__}.FileSink", "name": "a.txt"},
        "bad": {"_target_": f"{__name__}.BrokenSink"},
    }
    with pytest.raises(UserError, match="no server answers"):
        open_sinks(tree, make_context())
    assert (tmp_path / "a.closed").exists()


def test_tensorboard_reads_back_what_was_written(make_context, tmp_path):
    sink = TensorBoardSink(context=make_context())
    image = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    sink.write(1, {"Training/Loss": 0.5, "Validation/droid/joint/MSE/N": 40.0})
    sink.image(1, "wrist", image)
    sink.text("note", "hello")
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert scalars(tmp_path / "tensorboard", "Training/Loss") == [(1, 0.5)]
    assert scalars(tmp_path / "tensorboard", "counts/Validation/droid/joint/MSE") == [(1, 40.0)]
    assert b"What to look at" in events.Tensors("Start here/text_summary")[0].tensor_proto.string_val[0]
    assert (events.Images("wrist")[0].height, events.Images("wrist")[0].width) == (8, 6)
    assert events.Tensors("note/text_summary")[0].tensor_proto.string_val == [b"hello"]
    assert b'"width": 8' in events.Tensors("Config/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_shows_each_step_once_after_a_resume(make_context, tmp_path):
    for start, value in ((0, 1.0), (2, 2.0)):
        begun = int(time.time())
        sink = TensorBoardSink(context=make_context(start))
        for step in range(start + 1, start + 4):
            sink.write(step, {"Training/Loss": value})
        sink.close()
        # Files are read by their names: those of one process and second by its count of them as text, 10 before 9.
        while int(time.time()) == begun:
            time.sleep(0.05)
    assert scalars(tmp_path / "tensorboard", "Training/Loss") == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_tracker_of_accelerate_receives_rows_and_configuration(make_context, tmp_path):
    sink = BoardSink(context=make_context(), project="robots")
    sink.write(3, {"Training/Loss": 0.25, "Validation/MSE": np.float32(0.5)})
    sink.image(3, "wrist", np.zeros((2, 2, 3), np.uint8))
    sink.close()
    assert scalars(tmp_path / "robots", "Training/Loss") == [(3, 0.25)]
    assert scalars(tmp_path / "robots", "Validation/MSE") == [(3, 0.5)]
    (stored,) = (tmp_path / "robots").glob("*/hparams.yml")
    assert "model.width: 8" in stored.read_text()


def test_missing_tracker_names_the_command_that_installs_it(make_context):
    missing = [t for t in ("mlflow", "trackio", "swanlab") if t not in {str(a.value) for a in get_available_trackers()}]
    for name, options in compose_logger(f"[{','.join(missing)}]").items():
        with pytest.raises(UserError, match=f"pip install {name}"):
            open_sinks({name: options}, make_context())


def test_a_tracker_that_is_not_installed_is_told_before_the_data_are_opened(monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    tree = composing.compose(["+recipe=lerobot", "data.sources.main.root=/nowhere", "logger=[console,wandb]"])
    with pytest.raises(UserError, match="pip install wandb"):
        composing.checked(tree)


class Early(FileSink):
    before_data = True

    def __init__(self, *, context, name, refused=False):
        if refused:
            raise UserError("no server answers")
        super().__init__(context=context, name=name)


@pytest.mark.parametrize(("refused", "told"), [("true", "no server answers"), ("false", "nowhere")])
def test_a_tracker_starts_before_the_data_are_opened_and_is_closed_where_they_cant_be(refused, told, tmp_path):
    mine = f"+logger.mine={{_target_: {__name__}.Early, name: e.txt, refused: {refused}}}"
    with pytest.raises(UserError, match=told):
        train_here(["+recipe=lerobot", "data.sources.main.root=/nowhere", "logger=none", mine], tmp_path / "run")
    assert (tmp_path / "run" / "e.closed").exists() == (refused == "false")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_class_of_older_configurations_names_those_that_took_its_place(make_context):
    tree = {
        "wandb": {"_target_": "opentau_train.sinks.accelerate.TrackerSink", "tracker": "wandb", "project": "robots"}
    }
    with pytest.raises(UserError, match=r"(?s)logger\.wandb\._target_.*remedy: choose logger=\[wandb\].*key tracker"):
        open_sinks(tree, make_context())


def test_run_id_belongs_to_the_directory(tmp_path):
    assert run_id(tmp_path / "a") == run_id(tmp_path / "b" / ".." / "a") != run_id(tmp_path / "b")


def test_no_name_for_mlflow_is_the_directory_of_another():
    """Its file store makes the tags into paths."""
    tags = ["Training/Loss", *(f"Validation{g}/MSE{s}" for g in ("", "/droid/joint") for s in ("", "/N", "/StdErr"))]
    names = [MlflowSink.name_of(tag) for tag in tags]
    assert len(set(names)) == len(tags)
    assert not any(a.startswith(f"{b}/") for a in names for b in names)


def test_configuration_is_flattened_to_scalars():
    assert flatten({"a": {"b": 1, "c": {"d": None}}, "e": [1, 2], "f": True}) == {
        "a.b": 1,
        "a.c.d": "None",
        "e": "[1, 2]",
        "f": True,
    }


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("default", ["console", "tensorboard"]),
        ("none", []),
        ("[console,wandb]", ["console", "wandb"]),
        ("[mlflow,trackio,swanlab]", ["mlflow", "trackio", "swanlab"]),
    ],
)
def test_logger_files_compose(choice, names):
    assert sorted(compose_logger(choice)) == sorted(names)


def test_default_logger_opens(make_context):
    with open_sinks(compose_logger("default"), make_context()) as sinks:
        assert [type(s) for s in sinks.sinks] == [JsonlSink, ConsoleSink, TensorBoardSink]


def test_misspelt_option_of_a_logger_is_named(make_context):
    tree = {"tensorboard": {"_target_": "opentau_train.sinks.tensorboard.TensorBoardSink", "flush_second": 1}}
    with pytest.raises(UserError, match=r"logger\.tensorboard\.flush_second.*flush_seconds"):
        open_sinks(tree, make_context())
