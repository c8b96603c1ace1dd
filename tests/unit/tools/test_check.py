"""`python -m opentau_train.tools.check`: what it prints of a dataset, and how it refuses one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from opentau_train.tools.check import SCHEMAS, check_schema, describe, main, read
from tests import warm


def feature(column: str) -> dict:
    if ".image" in column:
        return {"dtype": "video", "shape": [180, 320, 3], "names": ["height", "width", "channels"]}
    return {"dtype": "float32", "shape": [1 if "gripper" in column else 7], "names": None}


def make_dataset(root: Path, schema: str = "droid", **changes) -> Path:
    """A dataset's metadata with the columns of `schema`; `changes` replace keys of info.json (None: no such key)."""
    info = {
        "codebase_version": "v3.0",
        "robot_type": "Franka",
        "total_episodes": 3,
        "total_frames": 93,
        "total_tasks": 2,
        "fps": 15,
        "features": {column: feature(column) for column in (*SCHEMAS[schema], "timestamp")},
        "a_key_of_a_later_format": {"x": 1},
    } | changes
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps({k: v for k, v in info.items() if v is not None}))
    return root


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "opentau_train.tools.check", *map(str, arguments)]
    return warm.run(command)


def assert_refused(capsys, arguments: list[str], *texts: str) -> None:
    """The tool returns 2, prints nothing but what, where and remedy, and these contain `texts`."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    what, where, remedy = err.splitlines()
    assert what.startswith("error: ") and where.startswith("  where:  ") and remedy.startswith("  remedy: ")
    for text in texts:
        assert text in err


def test_a_dataset_is_described_in_a_few_lines(tmp_path):
    root = make_dataset(tmp_path / "droid")
    (root / "data").mkdir()
    answer = run(root, "--schema", "droid")
    assert (answer.returncode, answer.stderr) == (0, "")
    lines = dict(line.split(":", 1) for line in answer.stdout.splitlines())
    lines = {key: value.strip() for key, value in lines.items()}
    assert lines["format"] == "v3.0"
    assert lines["size"] == "3 episodes, 93 frames, 15 fps"
    assert lines["cameras"].split(", ") == [f"{c} 320x180" for c in SCHEMAS["droid"] if ".images." in c]
    assert lines["state"] == "observation.state.joint_position [7], observation.state.gripper_position [1]"
    assert lines["actions"] == "action.joint_position [7], action.gripper_position [1]"
    assert (lines["robot"], lines["tasks"]) == ("Franka", "2")
    assert lines["files"] == "data/, videos/ MISSING"


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_dataset_of_a_schema_has_that_schema(tmp_path, schema):
    root = make_dataset(tmp_path / "set", schema)
    assert main([str(root), "--schema", schema]) == 0
    assert main([str(root)]) == 0


def test_channels_first_images_are_measured_by_their_names(tmp_path):
    camera = {"dtype": "image", "shape": [3, 48, 64], "names": ["channels", "height", "width"]}
    root = make_dataset(tmp_path / "set", "any", features={"observation.images.front": camera})
    text = describe(read(root))
    assert "observation.images.front 64x48" in text
    assert "videos" not in text  # its images are in the parquet files


def test_the_other_schema_is_named_where_it_fits(tmp_path, capsys):
    root = make_dataset(tmp_path / "set", "droid_cosmos")
    assert_refused(capsys, [str(root), "--schema", "droid"], "lacks columns", "has the droid_cosmos schema")


@pytest.mark.parametrize("schema", ["droid", "droid_cosmos"])
def test_every_column_of_a_schema_is_needed(tmp_path, capsys, schema):
    for number, column in enumerate(SCHEMAS[schema]):
        features = {c: feature(c) for c in SCHEMAS[schema] if c != column}
        root = make_dataset(tmp_path / str(number), schema, features=features)
        assert_refused(capsys, [str(root), "--schema", schema], f"lacks column {column} of the {schema} schema")


def test_a_misspelt_column_is_answered_with_the_nearest_one(tmp_path, capsys):
    features = {c.replace("wrist_left", "wrist_lefft"): feature(c) for c in SCHEMAS["droid"]}
    root = make_dataset(tmp_path / "set", features=features)
    assert_refused(capsys, [str(root), "--schema", "droid"], "did you mean 'observation.images.wrist_lefft'?")


def test_a_camera_that_is_a_vector_is_refused(tmp_path, capsys):
    features = {c: feature(c) for c in SCHEMAS["droid"]}
    features["observation.images.wrist_left"] = {"dtype": "float32", "shape": [7]}
    root = make_dataset(tmp_path / "set", features=features)
    assert_refused(capsys, [str(root), "--schema", "droid"], "wrist_left is float32, not a camera")


def test_a_path_that_is_no_dataset_is_refused(tmp_path, capsys):
    assert_refused(capsys, [str(tmp_path / "nowhere")], "doesn't exist", "nowhere")
    (tmp_path / "file").touch()
    assert_refused(capsys, [str(tmp_path / "file")], "is not a directory")
    (tmp_path / "empty").mkdir()
    assert_refused(capsys, [str(tmp_path / "empty")], "no meta/info.json", "holds meta/ and data/")


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"fps": 15}', "\udcff"])
def test_a_broken_info_file_is_refused(tmp_path, capsys, content):
    root = make_dataset(tmp_path / "set")
    (root / "meta" / "info.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert_refused(capsys, [str(root)], "meta/info.json", str(root / "meta" / "info.json"))


@pytest.mark.parametrize("key", ["codebase_version", "fps", "features"])
def test_a_missing_or_wrong_key_is_named(tmp_path, capsys, key):
    assert_refused(capsys, [str(make_dataset(tmp_path / "a", **{key: None}))], f"has no '{key}'")
    named = "format [] can't be read" if key == "codebase_version" else f"'{key}' must be"
    assert_refused(capsys, [str(make_dataset(tmp_path / "b", **{key: []}))], named)


def test_a_format_that_training_cannot_read_is_refused(tmp_path, capsys):
    root = make_dataset(tmp_path / "set", codebase_version="v2.0")
    assert_refused(capsys, [str(root)], "format v2.0 can't be read, only v3.0 and v2.1", "convert")


def test_a_feature_of_a_wrong_shape_is_named(tmp_path, capsys):
    root = make_dataset(tmp_path / "set", features={"action": {"dtype": "float32", "shape": "7"}})
    assert_refused(capsys, [str(root)], "'features.action.shape' must be a list of whole numbers")


def test_what_the_training_does_without_may_be_missing(tmp_path, capsys):
    missing = dict.fromkeys(("total_episodes", "total_frames", "total_tasks"))
    assert main([str(make_dataset(tmp_path / "set", **missing))]) == 0
    assert "unknown episodes, unknown frames, 15 fps" in capsys.readouterr().out


def test_a_wrong_schema_name_is_a_usage_error(tmp_path):
    answer = run(tmp_path, "--schema", "dorid")
    assert answer.returncode == 2
    assert "droid_cosmos" in answer.stderr and "Traceback" not in answer.stderr


def test_check_schema_ignores_further_columns(tmp_path):
    root = make_dataset(tmp_path / "set", "droid", features={c: feature(c) for c in (*SCHEMAS["droid"], "reward")})
    check_schema(read(root), "droid")
