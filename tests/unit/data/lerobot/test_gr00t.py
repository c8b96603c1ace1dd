"""Datasets in the shape of GR00T's demonstrations train as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from opentau_train.config.data import SourceSettings
from opentau_train.config.typed import build
from opentau_train.data.mixture import open as mixture
from opentau_train.errors import BadSample, UserError
from opentau_train.tools import check
from opentau_train.types import WindowSpec
from tests.gr00t_dataset import ABSENT, DESCRIPTION, EGO, LENGTHS, write_gr00t
from tests.lerobot_writer import picture, task_text
from tests.program import TINY_POLICY, train_here


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_gr00t(tmp_path_factory.mktemp("gr00t") / "set")


def open_source(root: Path, **changes):
    return mixture.open_source("main", build(SourceSettings, {"root": str(root), **changes}, "data.sources.main"))


def window(source, episode: int, frame: int, chunk: int = 2):
    return source.cursors(WindowSpec(chunk)).cursor().read(episode, frame)


@pytest.mark.slow
def test_it_trains_with_the_recipe_for_any_dataset_and_is_passed_by_the_check(root, tmp_path, capsys):
    arguments = ["trainer.steps=2", "trainer.global_batch_size=4", "data.num_workers=0", "validation.every=2"]
    chosen = ["state=[left_arm,left_hand]", "actions=[left_hand]", f"prompt_columns=[{DESCRIPTION}]"]
    arguments += [f"data.sources.main.{setting}" for setting in chosen]
    run = train_here(["+recipe=lerobot", f"data.sources.main.root={root}", *arguments, *TINY_POLICY], tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("Validation/main/default/MSE" in row for row in rows)
    assert check.main([str(root), *arguments, *TINY_POLICY]) == 0
    assert "5 dimensions of state, 2 of actions; cameras ego_view" in capsys.readouterr().out


def test_a_camera_without_any_file_is_named_and_left_out(root, caplog):
    source = open_source(root)
    assert source.cameras == ("ego_view",)
    assert f"lists the video of '{ABSENT}', but there is no file of it: left out" in caplog.text
    np.testing.assert_allclose(window(source, 1, 3).images["ego_view"][0], picture(1, 3, EGO, (32, 48)), atol=40)


@pytest.mark.parametrize("cameras", [(ABSENT,), {"eye": ABSENT, "other": EGO}], ids=["list", "mapping"])
def test_a_camera_without_any_file_is_an_error_where_it_is_asked_for(cameras, root):
    with pytest.raises(UserError, match="no file of it") as caught:
        open_source(root, cameras=cameras)
    assert "data.sources.main.cameras=[" in caught.value.remedy


def test_slices_are_named_by_modality_json(root, caplog):
    source = open_source(root, state=("left_hand", "left_arm"), actions=("left_hand",))
    assert source.state_names == tuple(f"observation.state.motor_{i}" for i in (3, 4, 0, 1, 2))
    assert source.action_names == ("action.motor_3", "action.motor_4")
    whole, cut = window(open_source(root), 2, 4), window(source, 2, 4)
    np.testing.assert_array_equal(cut.state, whole.state[[3, 4, 0, 1, 2]])
    np.testing.assert_array_equal(cut.actions, whole.actions[:, 3:])
    rows = {p: (s, a) for p, s, a in source.columns(np.arange(len(LENGTHS)))}
    np.testing.assert_array_equal(rows[2][0][4], cut.state)
    assert "is cut from" not in caplog.text


def test_a_slice_of_another_column_is_that_column_s_and_is_told(root, caplog):
    source = open_source(root, state=("last_command", "observation.state"))
    assert source.state_names[:3] == ("action.motor_1", "action.motor_2", "observation.state.motor_0")
    assert "'last_command' is cut from the column 'action', as meta/modality.json says" in caplog.text
    np.testing.assert_array_equal(window(source, 1, 2).state[:2], window(source, 1, 2).actions[0, 1:3])


@pytest.mark.parametrize(
    ("entry", "name", "what"),
    [
        ({}, "left_arn", r"'left_arn' is neither a column nor a slice.*did you mean 'left_arm'[\s\S]*left_hand"),
        (
            {"start": 0, "end": 6},
            "left_arm",
            r"'state\.left_arm' is no slice of a column[\s\S]*the 5 values",
        ),
        ({"start": 2, "end": 2}, "left_arm", r"'state\.left_arm' is no slice"),
        ({"start": 0, "end": 2, "original_key": "elsewhere"}, "left_arm", r"is no slice[\s\S]*'elsewhere'"),
        ({"start": 0, "end": 2, "original_key": EGO}, "left_arm", "is no slice"),
        (["x"], "left_arm", "is no slice"),
    ],
    ids=str,
)
def test_a_slice_that_cannot_be_cut_is_named(entry, name, what, tmp_path):
    root = write_gr00t(tmp_path / "set")
    path = root / "meta/modality.json"
    tree = json.loads(path.read_text())
    tree["state"]["left_arm"] = entry or tree["state"]["left_arm"]
    path.write_text(json.dumps(tree))
    open_source(root)  # nobody asks for a slice
    with pytest.raises(UserError, match=what):
        open_source(root, state=(name,))


def test_an_integer_column_is_a_prompt_through_the_tasks(root):
    assert window(open_source(root), 2, 0).prompts == (task_text(0),)
    source = open_source(root, prompt_columns=(DESCRIPTION,), prompt_separator=" | ")
    assert window(source, 2, 0).prompts == ("task 1", "alternatively task 1")


def test_an_integer_that_is_no_task_is_a_bad_sample(tmp_path):
    root = write_gr00t(tmp_path / "set")
    path = root / "meta/tasks.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    source = open_source(root, prompt_columns=(DESCRIPTION,))
    assert window(source, 1, 0).prompts == (task_text(0),)
    with pytest.raises(BadSample, match=f"{DESCRIPTION} 1 is not in the dataset's tasks"):
        window(source, 0, 0)
