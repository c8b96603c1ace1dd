"""Each remedy is tried: what an error of the metadata says to do makes the run start. And the check says what the
training says."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from opentau_train import cli
from opentau_train.config.settings import load_settings
from opentau_train.data.mixture.open import open_mixture
from opentau_train.errors import UserError
from opentau_train.tools import check
from tests.gr00t_dataset import ABSENT, EGO, write_gr00t
from tests.lerobot_writer import Camera, Dataset, vector, write

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
CAMERAS = {FRONT: Camera(size=(16, 16)), WRIST: Camera(size=(16, 16))}
LENGTHS = (6, 5, 7, 4, 6)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2372\n"
OVERRIDE = re.compile(r"(?:data|validation)\.[\w.]+=(?:\[[^\]]*\]|[^\s,;:]+)")
"""A setting in the text of a remedy."""
ON_DISK = re.compile(r"restore|download|convert|git lfs pull")
"""Words of a remedy that mends the files."""


@dataclass(frozen=True)
class Trouble:
    """A good dataset of `version` (or GR00T's), what `spoil` does to it, the `settings` of its source, and what to put
    where a remedy leaves the choice: {its placeholder: a value}."""

    spoil: Callable[[Path], object] = lambda root: None
    version: str = "v2.1"
    settings: tuple[str, ...] = ()
    choice: Mapping[str, str] = field(default_factory=dict)


def unlink(pattern: str) -> Callable[[Path], object]:
    return lambda root: [path.unlink() for path in root.glob(pattern)]


def write_all(pattern: str, text: str) -> Callable[[Path], object]:
    return lambda root: [path.write_text(text) for path in root.glob(pattern)]


def point(pattern: str) -> Callable[[Path], object]:
    return write_all(pattern, POINTER)


def change_info(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def spoil(root: Path) -> None:
        path = root / "meta/info.json"
        info = json.loads(path.read_text())
        change(info)
        path.write_text(json.dumps(info))

    return spoil


def set_column(name: str, values: Callable[[list], pa.Array]) -> Callable[[Path], object]:
    def spoil(root: Path) -> None:
        for path in root.glob("meta/episodes/*/file-000.parquet"):
            table = pq.read_table(path)
            column = values(table[name].to_pylist())
            pq.write_table(table.set_column(table.column_names.index(name), name, column), path)

    return spoil


def set_column_of(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def change_rows(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], object]:
    return lambda root: [pq.write_table(change(pq.read_table(path)), path) for path in root.glob("data/**/*.parquet")]


def rename_numbers(root: Path) -> None:
    """As some converters write them: `actions` for `action`."""
    for path in root.glob("data/**/*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.rename_columns(["actions" if n == "action" else n for n in table.column_names]), path)
    change_info(lambda info: info["features"].update(actions=info["features"].pop("action")))(root)


VIDEO = f"videos/chunk-000/{FRONT}/episode_000002.mp4"
HELD_OUT = "val_episodes=[2,3]"
TROUBLES = {
    "nan": Trouble(set_column(f"videos/{WRIST}/file_index", lambda v: pa.array([float("nan"), *v[1:]])), "v3.0"),
    "text": Trouble(set_column("data/file_index", lambda v: pa.array([str(n) for n in v])), "v3.0"),
    "cut_seconds": Trouble(
        set_column(f"videos/{FRONT}/from_timestamp", lambda v: pa.array([int(n) for n in v])), "v3.0"
    ),
    "no_tasks": Trouble(unlink("meta/tasks.jsonl")),
    "no_episodes_file": Trouble(unlink("meta/episodes/*/*.parquet"), "v3.0"),
    "pointer_tasks": Trouble(point("meta/tasks.*"), "v3.0"),
    "pointer_rows": Trouble(point("data/**/*.parquet")),
    "pointer_video": Trouble(point(VIDEO)),
    "later_format": Trouble(change_info(lambda info: info.update(codebase_version="v3.1")), "v3.0"),
    "earlier_format": Trouble(change_info(lambda info: info.update(codebase_version="v1.6"))),
    "wrong_fps": Trouble(change_info(lambda info: info.update(fps="fast"))),
    "rows_missing": Trouble(unlink("data/chunk-000/episode_000002.parquet"), settings=("exclude_episodes=[1]",)),
    "rows_missing_v30": Trouble(unlink("data/**/*.parquet"), "v3.0"),
    "rows_empty": Trouble(write_all("data/**/*_000002.parquet", ""), settings=("exclude_episodes=[1]",)),
    "column_of_text": Trouble(
        change_rows(lambda t: set_column_of(t, "action", pa.array([str(v) for v in t["action"].to_pylist()]))), "v3.0"
    ),
    "no_column": Trouble(change_rows(lambda t: t.drop(["task_index"]))),
    "no_episode_index": Trouble(change_rows(lambda t: t.drop(["episode_index"])), "v3.0"),
    "pointer_rows_with_control_modes": Trouble(
        lambda root: (
            change_rows(lambda t: t.append_column("control_mode", pa.array(["joint"] * len(t))))(root),
            change_info(lambda i: i["features"].update(control_mode={"dtype": "string", "shape": [1]}))(root),
            point("data/**/*.parquet")(root),
        )
    ),
    "no_task": Trouble(write_all("meta/tasks.jsonl", "")),
    "width_of_a_billion": Trouble(change_info(lambda info: info["features"]["action"].update(shape=[10**9])), "v3.0"),
    "held_out_video_empty": Trouble(write_all(VIDEO, ""), settings=(HELD_OUT,), choice={"val_episodes": "[3]"}),
    "held_out_video_missing": Trouble(unlink(VIDEO), settings=(HELD_OUT,), choice={"val_episodes": "[3]"}),
    "camera_without_files": Trouble(version="gr00t", settings=(f"cameras=[{EGO},{ABSENT}]",)),
    "no_videos": Trouble(lambda root: shutil.rmtree(root / "videos")),
    "no_timestamps": Trouble(change_info(lambda info: info["features"].pop("timestamp"))),
    "no_actions": Trouble(rename_numbers),
    "unknown_slice": Trouble(version="gr00t", settings=("state=[left_legg]",)),
    "unknown_column": Trouble(settings=("state=[observation.stat]",)),
    "unknown_camera": Trouble(settings=("cameras=[observation.images.frnt]",)),
    "unknown_mode": Trouble(settings=("control_mode_column=mood",), choice={"NAME": "joint"}),
    "narrow": Trouble(settings=("data.action_dim=2",)),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Callable[[str], Path]:
    """A dataset of each format, never changed."""
    folder = tmp_path_factory.mktemp("remedies")

    def make(version: str) -> Path:
        root = folder / version
        if not root.exists() and version == "gr00t":
            write_gr00t(root)
        elif not root.exists():
            write(root, Dataset(LENGTHS, 10, version, CAMERAS, episodes_per_data_file=5))
        return root

    return make


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    return cli.compose(["+recipe=lerobot"])


@pytest.fixture
def tree_of(composed, tmp_path) -> Callable[[Path, dict[str, str]], dict[str, Any]]:
    """(a dataset, {setting: its text}) -> the tree that `+recipe=lerobot` has with them."""

    def change(root: Path, settings: dict[str, str]) -> dict[str, Any]:
        tree = copy.deepcopy(composed)
        paths = {"data.sources.main.root": str(root), "paths.cache_dir": str(tmp_path)}
        for path, value in {**settings, **paths}.items():
            *above, key = path.split(".")
            place = tree
            for name in above:
                place = place[name]
            place[key] = yaml.safe_load(value)
        return tree

    return change


def start(tree: dict[str, Any]) -> None:
    """Open the data as a training does, up to its statistics."""
    open_mixture(load_settings(tree))


def keyed(settings: tuple[str, ...]) -> dict[str, str]:
    parts = (setting.partition("=") for setting in settings)
    return {key if key.startswith("data.") else f"data.sources.main.{key}": value for key, _, value in parts}


def remedied(error: UserError, trouble: Trouble) -> list[dict[str, str]]:
    """The settings after each way that the remedy offers, those apart that mend files."""
    now = keyed(trouble.settings)
    nearest = re.search(r"did you mean '([^']+)'", str(error))
    if nearest:
        return [{key: f"[{nearest[1]}]" for key in now}]
    ways = []
    for override in OVERRIDE.findall(error.remedy):
        key, _, value = override.partition("=")
        extra = {k: v for k, v in keyed(tuple(f"{k}={v}" for k, v in trouble.choice.items())).items() if k in now}
        ways.append({**now, **extra, key: trouble.choice.get(value, value)})
    return ways


@pytest.mark.parametrize("name", TROUBLES)
def test_the_remedy_of_an_error_makes_the_run_start(name, good, tree_of, tmp_path):
    trouble = TROUBLES[name]
    whole, root = good(trouble.version), tmp_path / "set"
    shutil.copytree(whole, root)
    trouble.spoil(root)
    settings = keyed(trouble.settings)
    with pytest.raises(UserError) as caught:
        start(tree_of(root, settings))
    with pytest.raises(UserError, match=f"^{re.escape(str(caught.value))}$"):
        check.check(tree_of(root, settings), "any", 0)

    ways = remedied(caught.value, trouble)
    assert ways or ON_DISK.search(caught.value.remedy), caught.value.remedy
    for way in ways:
        start(tree_of(root, way))
        assert str(root) in check.check(tree_of(root, way), "any", 0)[0]
    if ON_DISK.search(caught.value.remedy):
        shutil.rmtree(root)
        shutil.copytree(whole, root)
        start(tree_of(root, {k: v for k, v in settings.items() if k != "data.sources.main.cameras"}))


def null_in_episodes(*numbers: int, nested: bool) -> Callable[[pa.Table], pa.Table]:
    """A change of rows: a state of the episodes has no value, or one that is no number."""

    def change(table: pa.Table) -> pa.Table:
        values = table["observation.state"].to_pylist()
        first = [table["episode_index"].to_pylist().index(number) for number in numbers]
        spoiled = [([*v[:-1], float("nan")] if nested else None) if i in first else v for i, v in enumerate(values)]
        place = table.column_names.index("observation.state")
        return table.set_column(place, "observation.state", pa.array(spoiled, pa.list_(pa.float32())))

    return change


def renamed(table: pa.Table) -> pa.Table:
    return table.rename_columns(["observation.state" if n == "action" else n for n in table.column_names])


SPOILED = {
    "damaged_file": lambda root, rows: (root / "data/chunk-000/file-001.parquet").write_bytes(b"PAR1"),
    "column_twice": lambda root, rows: pq.write_table(renamed(rows), root / "data/chunk-000/file-001.parquet"),
    "null": lambda root, rows: pq.write_table(
        null_in_episodes(2, nested=False)(rows), root / "data/chunk-000/file-001.parquet"
    ),
    "nan_in_two": lambda root, rows: pq.write_table(
        null_in_episodes(2, 3, nested=True)(rows), root / "data/chunk-000/file-001.parquet"
    ),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_one_remedy_leaves_out_all_that_a_spoiled_file_of_rows_costs(spoil, tree_of, tmp_path):
    """What is left out already stays out."""
    root = write(tmp_path / "set", Dataset(LENGTHS, cameras={}))
    spoil(root, pq.read_table(root / "data/chunk-000/file-001.parquet"))
    with pytest.raises(UserError) as caught:
        start(tree_of(root, keyed(("exclude_episodes=[0]",))))
    (way,) = OVERRIDE.findall(caught.value.remedy)
    assert way.startswith("data.sources.main.exclude_episodes=[0,2")
    start(tree_of(root, keyed((way,))))


def test_datasets_that_cannot_share_a_norm_head_are_refused_by_the_check_too(tmp_path, capsys):
    one = write(tmp_path / "one", Dataset((5, 4), cameras={}))
    other = write(tmp_path / "other", Dataset((5, 4), cameras={}, columns={"action": vector(2)}))
    both = ["+recipe=lerobot", f"data.sources.main.root={one}", f"data.sources.other.root={other}"]
    with pytest.raises(UserError, match="share norm head") as caught:
        open_mixture(load_settings(cli.compose([*both, f"paths.cache_dir={tmp_path}"])))
    assert check.main(both) == 2
    assert capsys.readouterr().err.endswith(f"error: {caught.value}\n")
    assert re.search(r"set (data\.sources\.other\.robot_type)", caught.value.remedy)
    assert check.main([*both, "data.sources.other.robot_type=another"]) == 0
