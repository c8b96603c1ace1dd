"""`python -m opentau_train.tools.check`: what it prints of a dataset, and how it refuses one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opentau_train.data.lerobot.info import read_info
from opentau_train.errors import UserError
from opentau_train.tools.check import SCHEMAS, check_schema, describe, main
from tests import warm
from tests.lerobot_writer import Camera, Dataset, vector, write

PICTURE = Camera(codec=None, size=(32, 48))


def schema_dataset(schema: tuple[str, ...]) -> Dataset:
    """Three short episodes with these columns: pictures, and vectors of as many numbers as DROID's."""
    cameras = {c: PICTURE for c in schema if ".image" in c}
    columns = {"action": vector(2)} | {c: vector(1 if "gripper" in c else 7) for c in schema if c not in cameras}
    return Dataset((3, 4, 2), 15, cameras=cameras, columns=columns, info={"robot_type": "Franka"})


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Callable[[str], Path]:
    """schema -> a dataset that has it, never changed."""
    folder = tmp_path_factory.mktemp("check")

    def make(schema: str) -> Path:
        root = folder / schema
        return root if root.exists() else write(root, schema_dataset(SCHEMAS[schema]))

    return make


@pytest.fixture
def make_dataset(written, tmp_path) -> Callable[..., Path]:
    """(schema, keys of info.json to replace; None: no such key) -> a dataset of one's own."""

    def make(schema: str = "droid", **changes: Any) -> Path:
        root = shutil.copytree(written(schema), tmp_path / "set", dirs_exist_ok=True)
        path = root / "meta" / "info.json"
        info = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in info.items() if v is not None}))
        return root

    return make


def features_of(root: Path) -> dict[str, Any]:
    return json.loads((root / "meta" / "info.json").read_text())["features"]


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "opentau_train.tools.check", *map(str, arguments)]
    return warm.run(command)


def assert_refused(capsys, arguments: list[str], *texts: str) -> None:
    """The tool returns 2 and ends with what, where and remedy, which contain `texts`; warnings may precede them."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" or re.search(r"^[a-z]+ +error ", out, flags=re.M)
    what, where, remedy = err.splitlines()[-3:]
    assert what.startswith("error: ") and where.startswith("  where:  ") and remedy.startswith("  remedy: ")
    for text in texts:
        assert text in err


def test_a_dataset_is_described_in_a_few_lines(written):
    answer = run(written("droid"), "--schema", "droid")
    assert (answer.returncode, answer.stderr) == (0, "")
    lines = dict(line.split(":", 1) for line in answer.stdout.splitlines() if line)
    lines = {key: value.strip() for key, value in lines.items()}
    assert lines["format"] == "v3.0"
    assert lines["size"] == "3 episodes, 9 frames, 15 fps"
    assert lines["cameras"].split(", ") == [f"{c} 48x32" for c in SCHEMAS["droid"] if ".images." in c]
    assert lines["actions"] == "action [2], action.joint_position [7], action.gripper_position [1]"
    assert (lines["robot"], lines["tasks"]) == ("Franka", "2")
    assert lines["main"].endswith(
        "1 episodes held out; 8 dimensions of state, 2 of actions; cameras wrist_left, exterior_1_left, exterior_2_left"
    )


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_dataset_of_a_schema_has_that_schema(schema, written):
    assert main([str(written(schema)), "--schema", schema]) == 0


def test_a_url_with_an_equals_sign_is_a_dataset(written, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENTAU_CACHE", str(tmp_path / "cache"))
    (tmp_path / "date=2024").symlink_to(written("droid"))
    assert main([f"file://{tmp_path}/date=2024/"]) == 0
    assert "3 episodes, 9 frames, 15 fps" in capsys.readouterr().out


def test_the_arguments_of_a_training_are_checked(written, capsys):
    root = written("droid_cosmos")
    composed = ["+recipe=lerobot", f"data.sources.main.root={root}", f"data.sources.two.root={root}"]
    assert main([*composed, "data.sources.two.actions=[action.joint_position]", "data.sources.two.robot_type=b"]) == 0
    out = capsys.readouterr().out
    assert "main: " in out and "two: " in out and "8 dimensions of state, 7 of actions" in out
    assert_refused(capsys, [*composed, "data.sources.two.state=[nothing]"], "'nothing'", "data.sources.two.state")
    assert_refused(capsys, [str(root), "data.sources.main.state=[nothing]"], "'nothing'", "data.sources.main.state")
    for arguments, what in (
        ([str(root), "data.chunk_lenght=8"], "unknown key 'data.chunk_lenght'"),
        ([], "nothing to"),
    ):
        assert main(arguments) == 2
        assert what in capsys.readouterr().err


def test_a_directory_with_an_equals_sign_is_a_directory(written, tmp_path, capsys):
    root = shutil.copytree(written("any"), tmp_path / "date=2026")
    assert main([str(root)]) == 0


def test_channels_first_images_are_measured_by_their_names(make_dataset):
    camera = {"dtype": "image", "shape": [3, 48, 64], "names": ["channels", "height", "width"]}
    root = make_dataset("any")
    info = read_info(make_dataset("any", features=features_of(root) | {"observation.images.front": camera}), "main")
    assert "observation.images.front 64x48" in describe(info)


def test_the_other_schema_is_named_where_it_fits(written, capsys):
    root = written("droid_cosmos")
    assert_refused(capsys, [str(root), "--schema", "droid"], "lacks columns", "has the droid_cosmos schema")


@pytest.mark.parametrize("schema", ["droid", "droid_cosmos"])
def test_every_column_of_a_schema_is_needed(schema, written, make_dataset):
    features = features_of(written(schema))
    for column in SCHEMAS[schema]:
        root = make_dataset(schema, features={c: f for c, f in features.items() if c != column})
        with pytest.raises(UserError, match=f"lacks column {re.escape(column)} of the {schema} schema"):
            check_schema(read_info(root, "main"), schema)


def test_a_misspelt_column_is_answered_with_the_nearest_one(written, make_dataset, capsys):
    features = {c.replace("wrist_left", "wrist_lefft"): f for c, f in features_of(written("droid")).items()}
    root = make_dataset("droid", features=features)
    assert_refused(capsys, [str(root), "--schema", "droid"], "did you mean 'observation.images.wrist_lefft'?")


def test_a_camera_that_is_a_vector_is_refused(written, make_dataset, capsys):
    wrist = {"observation.images.wrist_left": {"dtype": "float32", "shape": [7]}}
    root = make_dataset("droid", features=features_of(written("droid")) | wrist)
    assert_refused(capsys, [str(root), "--schema", "droid"], "wrist_left is float32, not a camera")


def test_a_path_that_is_no_dataset_is_refused(tmp_path, capsys):
    assert_refused(capsys, [str(tmp_path / "nowhere")], "doesn't exist", "nowhere")
    (tmp_path / "file").touch()
    assert_refused(capsys, [str(tmp_path / "file")], "is not a directory")
    (tmp_path / "empty").mkdir()
    assert_refused(capsys, [str(tmp_path / "empty")], "no meta/info.json", "holds meta/ and data/")


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"fps": 15}', "\udcff", "[" * 100_000])
def test_a_broken_info_file_is_refused(content, make_dataset, capsys):
    root = make_dataset()
    (root / "meta" / "info.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert_refused(capsys, [str(root)], "meta/info.json", str(root / "meta" / "info.json"))


@pytest.mark.parametrize("key", ["codebase_version", "fps", "features"])
def test_a_missing_or_wrong_key_is_named(key, make_dataset, capsys):
    assert_refused(capsys, [str(make_dataset(**{key: None}))], f"has no '{key}'")
    named = "format [] can't be read" if key == "codebase_version" else f"'{key}' must be"
    assert_refused(capsys, [str(make_dataset(**{key: []}))], named)


def test_a_format_that_training_cannot_read_is_refused(make_dataset, capsys):
    root = make_dataset(codebase_version="v2.2")
    assert_refused(capsys, [str(root)], "format v2.2 can't be read, only v3.0, v2.1 and v2.0", "convert")


def test_a_feature_of_a_wrong_shape_is_named(make_dataset, capsys):
    root = make_dataset(features={"action": {"dtype": "float32", "shape": "7"}})
    assert_refused(capsys, [str(root)], "'features.action.shape' must be a list of at most 8 whole numbers")


def test_what_the_training_does_without_may_be_missing(make_dataset, capsys):
    missing = dict.fromkeys(("total_episodes", "total_frames", "total_tasks"))
    assert main([str(make_dataset(**missing))]) == 0
    assert "unknown episodes, unknown frames, 15 fps" in capsys.readouterr().out


@pytest.mark.parametrize("names", [("actions", "state"), ("actions", "observation.state")], ids=str)
def test_columns_of_other_names_are_proposed(names, tmp_path, capsys):
    """As openpi's conversion of LIBERO names them."""
    columns = {name: vector(2) for name in names}
    root = write(tmp_path / "set", Dataset((3, 4), cameras={}, columns={"action": vector(2), **columns}))
    path = root / "meta" / "info.json"
    info = json.loads(path.read_text())
    del info["features"]["action"]
    path.write_text(json.dumps(info))
    assert_refused(
        capsys, [str(root)], "no actions", "main.actions=[actions] takes others", f"number columns: {', '.join(names)}"
    )
    assert main([str(root), "data.sources.main.actions=[actions]"]) == 0
    assert ("main.state=[state] takes others" in capsys.readouterr().err) == ("state" in names)


def test_a_wrong_schema_name_is_a_usage_error(tmp_path):
    answer = run(tmp_path, "--schema", "dorid")
    assert answer.returncode == 2
    assert "droid_cosmos" in answer.stderr and "Traceback" not in answer.stderr
