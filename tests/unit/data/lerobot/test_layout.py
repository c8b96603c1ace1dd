"""Datasets as people have them on disk: links, stray files, git-lfs pointers, older formats, files that are missing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opentau_train.config.data import SourceSettings
from opentau_train.config.typed import build
from opentau_train.data.lerobot.source import LeRobotDataset
from opentau_train.data.mixture import open as mixture
from opentau_train.errors import UserError
from opentau_train.types import WindowSpec
from tests.lerobot_writer import Camera, Dataset, task_text, write

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
LENGTHS = (5, 4, 6, 3)
SET = Dataset(LENGTHS, cameras={FRONT: Camera(size=(16, 16), episodes_per_file=2)})
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 2372\n"


def open_source(root: Path, **changes) -> LeRobotDataset:
    return mixture.open_source("main", build(SourceSettings, {"root": str(root), **changes}, "data.sources.main"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """A dataset of each format, never changed."""
    folder = tmp_path_factory.mktemp("layout")
    versions = ("v3.0", "v2.1")
    made = {version: write(folder / version, replace(SET, version=version)) for version in versions}
    made["v2.0"] = shutil.copytree(made["v2.1"], folder / "v2.0")
    set_version(made["v2.0"], "v2.0")
    return made


@pytest.fixture
def copy(sets, tmp_path) -> Callable[[str], Path]:
    return lambda version: shutil.copytree(sets[version], tmp_path / "set")


def set_version(root: Path, version: object) -> None:
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps({**info, "codebase_version": version}))


def assert_whole(root: Path, **changes) -> None:
    """Every episode is there, with its rows, pictures and prompts."""
    source = open_source(root, **changes)
    assert source.episodes.length.tolist() == list(LENGTHS) and source.cameras == ("front",)
    window = source.cursors(WindowSpec(1)).cursor().read(2, 3)
    assert window.state[0] == 203.0 and window.images["front"].shape == (1, 16, 16, 3)


@pytest.mark.parametrize("version", ["v2.0", "2.0", "v2.0.0"])
def test_a_dataset_of_v20_is_read(version, copy):
    root = copy("v2.0")
    set_version(root, version)
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps({k: v for k, v in info.items() if not k.startswith("total_")}))
    assert_whole(root)


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        ("v1.6", "python -m lerobot.datasets.v2.convert_dataset_v1_to_v2"),
        ("1.0", "lerobot==0.3.3"),
        ("v2.2", "convert it to v3.0 or v2.1 with the program that wrote it"),
        ("v3.1", "convert it to v3.0 or v2.1 with the program that wrote it"),
        ("v10.0", "convert it to v3.0 or v2.1 with the program that wrote it"),
        ("three", "with the program that wrote it"),
        (3.0, "with the program that wrote it"),
    ],
)
def test_a_format_that_is_not_read_is_refused_with_what_converts_it(version, remedy, copy):
    root = copy("v2.1")
    set_version(root, version)
    with pytest.raises(UserError, match=rf"LeRobot format {version} can't be read, only v3\.0, v2\.1 and v2\.0") as e:
        open_source(root)
    assert remedy in e.value.remedy and e.value.where == str(root / "meta/info.json")


def test_the_layout_before_v20_is_known_by_its_folder(tmp_path):
    (tmp_path / "meta_data").mkdir()
    (tmp_path / "meta_data/info.json").write_text('{"codebase_version": "v1.6"}')
    with pytest.raises(UserError, match=r"LeRobot format v1 can't be read[\s\S]*convert_dataset_v1_to_v2"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "place", ["data", "data/chunk-000", "videos", "meta", "meta/episodes", "meta/episodes/chunk-000", ""]
)
def test_linked_folders_are_followed_where_their_user_says_so(place, copy, tmp_path):
    root = copy("v3.0")
    shutil.move(root / place, tmp_path / "store")
    (root / place).symlink_to(tmp_path / "store")
    if place:  # the dataset's own directory was named by the user
        with pytest.raises(UserError, match="a link leads out of the dataset's directory") as caught:
            open_source(root)
        assert caught.value.remedy.endswith(f"data.sources.main.links=[{tmp_path / 'store'}]")
    assert_whole(root, links=[str(tmp_path / "store")] if place else [])


def test_files_of_the_hubs_cache_are_links_into_it(copy, tmp_path):
    root, blobs = tmp_path / "hub/snapshots/5d0c", tmp_path / "hub/blobs"
    shutil.copytree(copy("v3.0"), root)
    blobs.mkdir()
    for number, path in enumerate(sorted(p for p in root.rglob("*") if p.is_file())):
        shutil.move(path, blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    assert_whole(root)


STRAY = {
    "chunk-000/._file-000.parquet": b"\0\5\x16\7Mac OS X",
    "chunk-000/.ipynb_checkpoints/file-000-checkpoint.parquet": None,
    ".ipynb_checkpoints/file-000.parquet": None,
    "chunk-000/file-000.parquet.lock": b"",
    "chunk-000/file-000 (1).parquet": None,
    "chunk-000/file-000-copy.parquet": None,
    ".DS_Store": b"x",
}
"""{a path in meta/episodes: its content, None = that of an episodes' file}"""


@pytest.mark.parametrize("path", STRAY)
def test_what_is_no_file_of_the_dataset_is_passed_over_with_a_line(path, copy, caplog):
    root = copy("v3.0")
    stray, episodes = root / "meta/episodes" / path, next(root.glob("meta/episodes/*/file-000.parquet"))
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(episodes.read_bytes() if STRAY[path] is None else STRAY[path])
    (root / "data/chunk-000/._file-000.parquet").write_bytes(b"x")
    (root / "meta/episodes/chunk-000/.#file-000.parquet").symlink_to("somebody@host.1")  # an editor's lock
    assert_whole(root)
    shown = path if path.count("/") < 2 and not path.startswith(".ipynb") else str(Path(path).parent)
    assert "passed over, being no file of the dataset" in caplog.text and shown in caplog.text


def test_episode_files_of_other_names_are_read_where_there_are_no_others(copy):
    root = copy("v3.0")
    for path in root.glob("meta/episodes/*/*.parquet"):
        path.rename(path.with_name(f"part-{path.stem}.parquet"))
    assert_whole(root)


@pytest.mark.parametrize("place", ["meta/episodes/chunk-000/file-001.parquet", "meta/episodes/chunk-001"])
def test_a_link_that_leads_nowhere_is_named_and_not_passed_over(place, copy):
    root = copy("v3.0")
    (root / place).unlink(missing_ok=True)
    (root / place).symlink_to(root / "gone")
    with pytest.raises(UserError, match="can't be read") as caught:
        open_source(root)
    assert caught.value.where == str(root / place)


META = {"v3.0": ["info.json", "tasks.parquet", "episodes/chunk-000/file-001.parquet"]}
META["v2.1"] = ["info.json", "tasks.jsonl", "episodes.jsonl"]


@pytest.mark.parametrize(
    ("version", "pattern"),
    [(version, f"meta/{name}") for version, names in META.items() for name in names]
    + [("v3.0", "data/**/*.parquet"), ("v2.1", "data/**/*.parquet"), ("v3.0", "videos/**/*.mp4")],
)
def test_a_git_lfs_pointer_is_called_one(version, pattern, copy):
    root = copy(version)
    paths = sorted(root.glob(pattern))
    for path in paths:
        path.write_text(POINTER)
    with pytest.raises(UserError, match="is a git-lfs pointer") as caught:
        open_source(root)
    assert caught.value.where == str(paths[0]) and "`git lfs pull`" in caught.value.remedy
    others = f"(as are {len(paths) - 1} others)"
    assert (others in caught.value.what) == (len(paths) > 1)


TEXTS = ["pick up the cup\u2028and place it", "pick it up\u0085 then wait", "a\x0bb\x0cc", "抓住红色的杯子 😀"]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
@pytest.mark.parametrize("bom", [True, False])
def test_only_a_line_feed_ends_a_line_of_json(text, bom, copy):
    root = copy("v2.1")
    tasks = [json.dumps({"task_index": i, "task": f"{text} {i}"}, ensure_ascii=False) for i in range(2)]
    mark = "\ufeff" if bom else ""
    (root / "meta/tasks.jsonl").write_bytes((mark + "\n" + "\r\n".join(tasks) + "\n\n").encode())
    rows = [json.loads(line) for line in (root / "meta/episodes.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "tasks": [text]}, ensure_ascii=False) for row in rows]
    (root / "meta/episodes.jsonl").write_bytes((mark + "\n".join(lines)).encode())
    assert_whole(root)
    assert open_source(root).cursors(WindowSpec(1)).cursor().read(1, 0).prompts == (f"{text} 1".strip(),)


@pytest.mark.parametrize("column", ["task", "__index_level_0__", "sentence"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_tasks_are_found_under_any_name_and_type_of_text(column, kind, copy):
    root = copy("v3.0")
    texts = pa.array([task_text(0), task_text(1)])
    texts = texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts.cast(kind)
    pq.write_table(pa.table({"task_index": pa.array([0.0, 1.0]), column: texts}), root / "meta/tasks.parquet")
    assert open_source(root).cursors(WindowSpec(1)).cursor().read(1, 0).prompts == (task_text(1),)


# ---------------------------------------------------------------- files that are missing


def test_missing_videos_are_told_when_the_dataset_is_opened(copy, caplog):
    root = copy("v2.1")
    (root / f"videos/chunk-000/{FRONT}/episode_000002.mp4").unlink()
    source = open_source(root, exclude_episodes=(3,))
    assert source.episodes.lacking is not None and source.episodes.lacking.tolist() == [False, False, True]
    assert "the video of camera 'front' is missing for episode 2 (6 of 15 rows)" in caplog.text
    assert "data.sources.main.exclude_episodes=[2,3]" in caplog.text
    assert not open_source(root, episodes=(0, 1)).episodes.lacking.any()


def test_a_missing_file_of_rows_is_told_when_the_dataset_is_opened(copy):
    root = copy("v2.1")
    path = root / "data/chunk-000/episode_000001.parquet"
    path.unlink()
    with pytest.raises(UserError, match=r"the rows of episode 1 are missing") as caught:
        open_source(root, exclude_episodes=(3,))
    assert caught.value.where == str(path) and "exclude_episodes=[1,3]" in caught.value.remedy
    assert open_source(root, exclude_episodes=(1, 3)).episodes.episode_index.tolist() == [0, 2]


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_a_dataset_whose_videos_are_all_missing_is_not_trained_on_blindly(version, copy):
    root = copy(version)
    shutil.move(root / "videos", root / "wideos")
    with pytest.raises(UserError, match=f"lists the video of '{FRONT}', but there is no file of it") as caught:
        open_source(root)
    assert "data.sources.main.cameras=[]" in caught.value.remedy
    assert open_source(root, cameras=()).cameras == ()


def test_a_camera_that_the_episodes_metadata_do_not_know_is_left_out(copy, caplog):
    root = copy("v3.0")
    info = json.loads((root / "meta/info.json").read_text())
    info["features"][WRIST] = info["features"][FRONT]
    (root / "meta/info.json").write_text(json.dumps(info))
    assert_whole(root)
    assert f"lists the video of '{WRIST}', but there is no file of it: left out" in caplog.text
    with pytest.raises(UserError, match=f"'{WRIST}'"):
        open_source(root, cameras=(FRONT, WRIST))


@pytest.mark.parametrize(("starts", "opens"), [([0, 1, 2, 4], True), ([0, 1, 3, 4], False)], ids=["whole", "cut_off"])
def test_whole_seconds_are_taken_unless_a_fraction_was_cut_off(starts, opens, tmp_path):
    """from_timestamp as integers, of episodes that are 1, 1, 2 and 1 s long."""
    camera = Camera(size=(16, 16), episodes_per_file=4)
    root = write(tmp_path / "set", Dataset((5, 5, 10, 5), fps=5, cameras={FRONT: camera}))
    for path in root.glob("meta/episodes/*/*.parquet"):
        table, name = pq.read_table(path), f"videos/{FRONT}/from_timestamp"
        begin = pa.array([starts[e] for e in table["episode_index"].to_pylist()])
        pq.write_table(table.set_column(table.column_names.index(name), name, begin), path)
    if opens:
        assert open_source(root).reading.stored.videos["front"].start.tolist() == starts
        return
    with pytest.raises(UserError, match="whose fraction was cut off: episode 2 is 10 rows, 3 to 4 s"):
        open_source(root)


def test_a_dataset_of_no_episodes_is_called_one(tmp_path, copy):
    root = copy("v2.1")
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps({**info, "total_episodes": 0}))
    for name in ("episodes.jsonl", "tasks.jsonl"):
        (root / "meta" / name).unlink()
    with pytest.raises(UserError, match=r"the dataset has no episodes[\s\S]*record some"):
        open_source(root)
