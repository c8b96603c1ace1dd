"""`python -m opentau_train.tools.check KEY=VALUE ...`, as launchers call it: what a configuration names."""

from __future__ import annotations

from pathlib import Path

import pytest

from opentau_train.tools.check import main
from tests.droid_datasets import LANGUAGE, write_cosmos, write_droid

RECIPE = "+recipe=droid_policy"
SOURCE = "data.sources.droid"


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("datasets")
    write_droid(root / "droid")
    write_droid(root / "silent", ())
    write_cosmos(root / "cosmos" / "success")
    write_cosmos(root / "cosmos" / "failure", "failure")
    return root


def checked(capsys, *overrides: str) -> tuple[int, str]:
    """The exit code, and all that was printed."""
    code = main([RECIPE, *overrides])
    return code, "".join(capsys.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "data", "texts"),
    [
        ("droid", "droid", ["droid: 100 windows of 3 episodes to train on, 1 episodes held out"]),
        ("cosmos", "droid_cosmos", ["droid: 100 windows", "droid_failure: 0 windows of 0 episodes", "failure/ with"]),
        ("cosmos/failure", "droid_cosmos", ["droid: 100 windows of 3 episodes"]),
        ("silent", "droid", ["prompts: the dataset's tasks"]),
        ("droid", "lerobot", ["main: 90 windows"]),
    ],
)
def test_any_dataset_that_the_chosen_data_can_read_passes(dataset, data, texts, datasets, capsys, monkeypatch):
    """As the launchers hand it on: in the environment."""
    for name in ("DATASET_PATH", "DROID_ROOT"):
        monkeypatch.setenv(name, str(datasets / dataset))
    code, text = checked(capsys, f"data={data}")
    assert code == 0 and all(wanted in text for wanted in texts), text


@pytest.mark.parametrize(
    ("overrides", "texts"),
    [
        ([f"{SOURCE}.root=nowhere"], ["nowhere doesn't exist"]),
        (
            [f"{SOURCE}.root=COSMOS"],
            ["lacks columns observation.images.wrist_left", "it has the droid_cosmos schema: train it with data="],
        ),
        (["data=droid_cosmos"], ["lacks columns observation.image.wrist", "train it with data=droid"]),
        ([f"{SOURCE}.prompt_columns=[instructions]", f"{SOURCE}.optional_prompts=false"], ["'instructions' is not in"]),
        ([f"{SOURCE}.prompt_columns=[observation.state.joint_position]"], ["is a float32 column", LANGUAGE[0]]),
        ([f"{SOURCE}.use_filter_dict=true", f"{SOURCE}.filter_dict_path=none.json"], ["none.json doesn't exist"]),
        (["model.widht=5"], ["unknown key 'model.widht'"]),
        (["model.pretrained_path=/no/weights"], ["'/no/weights' is not there"]),
        (["model.pretrained_path=COSMOS"], ["has no model.safetensors"]),
        (["trainer.stps=5"], ["unknown key 'trainer.stps'"]),
    ],
)
def test_what_a_training_would_refuse_is_refused(overrides, texts, datasets, capsys, monkeypatch):
    monkeypatch.setenv("DROID_ROOT", str(datasets / "droid"))
    code, text = checked(capsys, *(o.replace("COSMOS", str(datasets / "cosmos" / "success")) for o in overrides))
    assert code == 2 and all(wanted in text for wanted in texts), text


def test_an_override_of_the_root_wins_over_the_environment(datasets, capsys, monkeypatch):
    monkeypatch.setenv("DROID_ROOT", "nowhere")
    code, text = checked(capsys, f"{SOURCE}.root={datasets / 'droid'}")
    assert code == 0, text


@pytest.mark.parametrize("value", ["/weights", ""])
def test_variables_that_a_neighbouring_launcher_reads_are_pointed_out(value, datasets, capsys, monkeypatch):
    monkeypatch.setenv("DROID_ROOT", str(datasets / "droid"))
    monkeypatch.setenv("BASE_CHECKPOINT_PATH", value)
    code, text = checked(capsys)
    assert code == 0
    assert ("BASE_CHECKPOINT_PATH is not read: write model.pretrained_path=VALUE" in text) == bool(value)
    monkeypatch.setenv("VLM_SAFETENSORS_PATH", value)
    code, text = checked(capsys)
    assert (code == 2 and "unset VLM_SAFETENSORS_PATH" in text) == bool(value)
