"""Bad datasets, checkpoints and disks: a clear error, the right exit code, and nothing lost."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opentau_train import cli
from tests import warm
from tests.lerobot_writer import Camera, Dataset, png, vector, write
from tests.nightly import by_day
from tests.program import TINY_POLICY, command, environment, run, train_here

LENGTHS = (12, 9, 14, 10, 8, 11)
FRONT = "observation.images.front"
VIDEO = {FRONT: Camera(size=(32, 48), gop=4, episodes_per_file=2)}
SMALL = [
    "+recipe=lerobot",
    "trainer.steps=2",
    "trainer.global_batch_size=4",
    "trainer.log_every=1",
    "scheduler.warmup_steps=1",
    "data.num_workers=0",
    "data.chunk_length=4",
    "data.sources.main.val_split_ratio=0",
    "validation.every=0",
    "checkpoint.every=0",
    "logger=none",
    *TINY_POLICY,
]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "good", Dataset(lengths=LENGTHS, cameras=VIDEO))


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """train(root, *overrides) -> (exit code, stderr) of the program, in this process; its files lie in `tmp_path`."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def go(root: Path | str | None, *overrides: str) -> tuple[int, str]:
        places = [f"paths.run_dir={tmp_path / 'run'}", f"paths.cache_dir={tmp_path / 'cache'}"]
        where = [] if root is None else [f"data.sources.main.root={root}"]
        monkeypatch.setattr("sys.argv", ["opentau_train", *SMALL, *places, *where, *overrides])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), capsys.readouterr().err

    return go


def message(said: str) -> str:
    """The error at the end of what a run said."""
    return said[said.index("error: ") :] if "error: " in said else said


def assert_clear(outcome: tuple[int, str], *texts: str, code: int = 2) -> None:
    """The exit code, and one error of at most 8 lines: what (the texts), where and the remedy."""
    found, said = outcome
    assert found == code, said
    error = message(said)
    assert said.count("error: ") == 1 and "Traceback" not in said, said
    assert len(error.strip().splitlines()) <= 8, error
    for text in (*texts, "where: ", "remedy: "):
        assert text in error, error


# ---------------------------------------------------------------- a dataset that isn't what it should be


def test_a_source_without_a_root_is_refused_with_the_key_to_set(train):
    assert_clear(train(None), "data.sources.main has neither root nor repo_id", "data.sources.main.root=PATH")


def test_a_root_that_is_not_there_is_refused_with_its_name(train, tmp_path):
    outcome = train(tmp_path / "nowhere")
    assert_clear(outcome, f"{tmp_path / 'nowhere'} doesn't exist", "data.sources.main", "set data.sources.main.root")


def test_a_root_that_is_a_file_is_refused_with_its_source(train, tmp_path):
    (tmp_path / "file").write_text("x")
    assert_clear(train(tmp_path / "file"), "is not a directory", "data.sources.main")


def test_a_directory_that_is_no_dataset_is_refused_with_the_file_it_lacks(train, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_clear(train(tmp_path / "empty"), "not a LeRobot dataset", "meta/info.json", "data.sources.main.root")


@pytest.mark.parametrize("version", ["v1.6", "v2.2", "v4.0"])
def test_a_format_that_cannot_be_read_is_refused_with_those_that_can(version, train, tmp_path):
    root = write(tmp_path / "data", Dataset(lengths=(4,), cameras={}, info={"codebase_version": version}))
    assert_clear(train(root), f"format {version}", "v3.0, v2.1 and v2.0", "info.json", "convert")


@pytest.mark.parametrize(
    ("setting", "texts"),
    [
        ("state=[observation.stat]", ["'observation.stat'", "did you mean 'observation.state'?", "main.state"]),
        ("actions=[actoin]", ["'actoin'", "did you mean 'action'?", "main.actions", "timestamp"]),
        (f"actions=[{FRONT}]", [f"'{FRONT}' is a video column", "main.actions"]),
        ("cameras=[observation.images.fornt]", ["fornt", f"did you mean '{FRONT}'?", "main.cameras"]),
        ("prompt_columns=[language_instruction]", ["'language_instruction'", "task_index", "main.prompt_columns"]),
        ("control_mode_column=mode", ["'mode'", "main.control_mode_column"]),
        ("episodes=[99]", ["episode 99", "main.episodes", "6 episodes, 0 to 5"]),
    ],
    ids=str,
)
def test_a_column_camera_or_episode_that_is_not_there_is_refused_with_its_name(setting, texts, train, good):
    assert_clear(train(good, f"data.sources.main.{setting}"), *texts)


@pytest.mark.slow
def test_statistics_that_the_dataset_lacks_are_computed_from_its_rows(train, good):
    assert not (good / "meta" / "stats.json").exists()
    assert train(good, "data.normalization=quantiles")[0] == 0


@pytest.mark.parametrize(
    ("name", "spoil", "texts"),
    [
        ("info", lambda r: (r / "meta/info.json").write_text("{"), ["info.json can't be read", "restore the file"]),
        ("tasks", lambda r: (r / "meta/tasks.parquet").unlink(), ["tasks.parquet", "restore the file"]),
        ("episodes", lambda r: shutil.rmtree(r / "meta/episodes"), ["no episode metadata", "meta/episodes"]),
    ],
)
def test_metadata_that_cannot_be_read_is_refused_with_its_file(name, spoil, texts, train, tmp_path):
    root = write(tmp_path / "data", Dataset(lengths=(4, 4), cameras={}))
    spoil(root)
    assert_clear(train(root), *texts)


# ---------------------------------------------------------------- too little of it


def test_episodes_shorter_than_a_window_give_no_window(train, good):
    outcome = train(good, "data.chunk_length=32", "data.drop_tail=true")
    assert_clear(outcome, "'main' has no training window", "longest 14 frames", "chunk_length 32", "drop_tail")


@pytest.mark.slow
def test_a_window_longer_than_the_episode_trains_where_it_may_be_padded(train, good):
    assert train(good, "data.chunk_length=32")[0] == 0


def test_filters_that_leave_nothing_are_refused_with_their_source(train, good, tmp_path):
    assert_clear(train(good, "data.sources.main.exclude_episodes=[0,1,2,3,4,5]"), "no episode is left", "main")
    keep = tmp_path / "keep.json"
    keep.write_text(json.dumps({str(e): [] for e in range(len(LENGTHS))}))
    chosen = ["data.sources.main.use_filter_dict=true", f"data.sources.main.filter_dict_path={keep}"]
    assert_clear(train(good, *chosen), "main", "window")


@pytest.mark.distributed
@pytest.mark.parametrize("lengths", [(1,), (6,)], ids=["one_window", "one_episode"])
def test_fewer_episodes_than_ranks_workers_or_lanes_train(lengths, tmp_path):
    root = write(tmp_path / "data", Dataset(lengths=lengths, cameras=VIDEO))
    places = [f"paths.run_dir={tmp_path / 'run'}", f"paths.cache_dir={tmp_path / 'cache'}"]
    done = run([*SMALL, f"data.sources.main.root={root}", *places, "data.num_workers=1"], ranks=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/checkpoints/last/run.json").is_file()


# ---------------------------------------------------------------- files that are damaged


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def quarantined(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "quarantine.jsonl").read_text().splitlines()]


def substituted(run_dir: Path) -> float:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["Training/SubstitutedWindows"] for row in rows if "Training/SubstitutedWindows" in row][-1]


@pytest.mark.slow
def test_a_damaged_video_is_quarantined_and_training_goes_on(train, tmp_path):
    root = write(tmp_path / "data", Dataset(lengths=LENGTHS, cameras=VIDEO))
    damaged = sorted(root.glob("videos/**/*.mp4"))[0]
    truncate(damaged)
    assert train(root, "trainer.steps=12", "data.bad_samples.max_fraction=0.9")[0] == 0
    rows = quarantined(tmp_path / "run")
    assert {row["episode"] for row in rows} <= {0, 1} and rows, "the episodes of the damaged file"
    assert all(row["dataset"] == "main" and str(damaged) in row["cause"] for row in rows)
    assert 0 < substituted(tmp_path / "run") <= len(rows)


@pytest.mark.slow
def test_damaged_rows_are_quarantined_and_training_goes_on(train, tmp_path):
    """The images of one parquet file; its other columns, which the statistics need, are whole."""
    cameras = {FRONT: Camera(None, size=(32, 48))}
    root = write(tmp_path / "data", Dataset(lengths=LENGTHS, cameras=cameras, episodes_per_data_file=2))
    damaged = sorted(root.glob("data/**/*.parquet"))[0]
    content, start = bytearray(damaged.read_bytes()), 0
    while (start := content.find(b"\x89PNG", start)) >= 0:
        content[start : start + 4] = b"junk"
        start += 4
    damaged.write_bytes(content)
    assert train(root, "trainer.steps=12", "data.bad_samples.max_fraction=0.9")[0] == 0
    rows = quarantined(tmp_path / "run")
    assert rows and {row["episode"] for row in rows} <= {0, 1}
    assert all(str(damaged) in row["cause"] for row in rows)


def test_too_many_damaged_windows_stop_the_run(train, tmp_path):
    root = write(tmp_path / "data", Dataset(lengths=LENGTHS, cameras=VIDEO))
    truncate(sorted(root.glob("videos/**/*.mp4"))[0])
    outcome = train(root, "trainer.steps=50", "data.bad_samples.max_fraction=0.0", "data.bad_samples.grace=2")
    assert_clear(outcome, "windows could not be read", "quarantine.jsonl", "max_fraction")
    assert len(quarantined(tmp_path / "run")) >= 3


def test_videos_that_are_all_damaged_stop_the_run_with_a_name(train, tmp_path):
    root = write(tmp_path / "data", Dataset(lengths=LENGTHS, cameras=VIDEO))
    for path in root.glob("videos/**/*.mp4"):
        path.write_bytes(b"no video")
    assert_clear(train(root), "'main'", "episode", "frame", ".mp4", "repair")


@pytest.mark.slow
def test_a_damaged_validation_window_fails_the_pass_with_its_name(train, tmp_path):
    root = write(tmp_path / "data", Dataset(lengths=LENGTHS, cameras=VIDEO))
    truncate(sorted(root.glob("videos/**/*.mp4"))[0])
    split = ["data.sources.main.val_episodes=[1,4]", "data.sources.main.exclude_episodes=[3]"]
    outcome = train(root, *split, "validation.every=1")
    assert_clear(outcome, ".mp4", "dataset 'main', episode 1", "data.sources.main.exclude_episodes=[1,3] or")


@pytest.mark.slow
def test_videos_that_are_missing_are_told_at_the_start_and_training_goes_on(train, tmp_path):
    root = write(tmp_path / "data", Dataset(lengths=LENGTHS, cameras=VIDEO))
    missing = sorted(root.glob("videos/**/*.mp4"))[0]
    missing.unlink()
    code, told = train(root, "trainer.steps=12", "data.bad_samples.max_fraction=0.9")
    assert code == 0 and f"camera 'front' is missing for episodes 0, 1 (21 of 64 rows), first {missing}" in told
    assert {row["episode"] for row in quarantined(tmp_path / "run")} <= {0, 1}


@pytest.mark.slow
def test_a_missing_video_of_a_held_out_episode_ends_the_run_before_its_first_step(train, tmp_path):
    root = write(tmp_path / "data", Dataset(lengths=LENGTHS, version="v2.1", cameras=VIDEO))
    (root / f"videos/chunk-000/{FRONT}/episode_000003.mp4").unlink()
    held_out = ["data.sources.main.val_episodes=[1,3]", "validation.every=2"]
    assert_clear(train(root, *held_out), "no video of the held-out episodes 3", "main.exclude_episodes=[3]")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert train(root, *held_out, "validation.on_bad_sample=skip")[0] == 0


@pytest.mark.slow
def test_missing_rows_of_a_held_out_episode_end_the_run_before_its_first_step(train, tmp_path):
    root = write(tmp_path / "data", Dataset(lengths=LENGTHS, version="v2.1", cameras={}))
    for episode in (2, 3):
        path = root / f"data/chunk-000/episode_{episode:06d}.parquet"
        pq.write_table(pq.read_table(path).slice(0, 5), path)
    held_out = ["data.sources.main.val_episodes=[1,3]", "validation.every=2"]
    for _ in range(2):  # the second time with the statistics that the first one stored
        assert_clear(train(root, *held_out), "no rows of the held-out episodes 3", "main.exclude_episodes=[2,3]")
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert train(root, *held_out, "validation.on_bad_sample=skip")[0] == 0
    shutil.rmtree(tmp_path / "run")
    applied = ["data.sources.main.exclude_episodes=[2,3]", "data.sources.main.val_episodes=[1]", "validation.every=2"]
    assert train(root, *applied)[0] == 0


@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_a_damaged_parquet_file_is_named(how, train, tmp_path):
    root = write(tmp_path / "data", Dataset(lengths=LENGTHS, cameras={}))
    damaged = sorted(root.glob("data/**/*.parquet"))[1]
    truncate(damaged) if how == "truncated" else damaged.unlink()
    assert_clear(train(root), str(damaged), "data.sources.main.exclude_episodes")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_named(value, train, tmp_path):
    feature, values = vector(3, 0.5, names=["x", "y", "z"])

    def spoiled(episode: int, frame: int) -> list[float]:
        x, y, z = values(episode, frame)
        return [x, value if (episode, frame) == (2, 3) else y, z]

    columns = {"observation.state": vector(4), "action": (feature, spoiled)}
    root = write(tmp_path / "data", Dataset(lengths=LENGTHS, cameras={}, columns=columns))
    assert_clear(train(root), f"action.y is {value}", "'main', episode 2, frame 3", "exclude_episodes=[2]")


def test_images_that_are_none_stop_the_run_with_a_name(train, tmp_path):
    root = write(tmp_path / "data", Dataset(lengths=(6, 6), cameras={FRONT: Camera(None, size=(32, 48))}))
    for path in root.glob("data/**/*.parquet"):
        path.write_bytes(path.read_bytes().replace(b"\x89PNG", b"none"))
    assert_clear(train(root), "'main'", "episode", "frame", "parquet")


# ---------------------------------------------------------------- checkpoints and places


@pytest.fixture(scope="module")
def finished(tmp_path_factory, good) -> Path:
    """A run of two steps; copied by those who go on with it."""
    return train_here([*SMALL, f"data.sources.main.root={good}"], tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def own_run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


def test_a_run_is_not_written_over(train, good, own_run):
    before = sorted(p.relative_to(own_run) for p in own_run.rglob("*"))
    assert_clear(train(good), "already has a checkpoint of step 2", str(own_run), "resume=auto")
    assert sorted(p.relative_to(own_run) for p in own_run.rglob("*")) == before


def test_a_checkpoint_of_another_model_is_refused_with_the_difference(train, good, own_run):
    outcome = train(good, "resume=auto", "trainer.steps=4", "model.width=64")
    assert_clear(outcome, "model.width: 32 -> 64", "new run")


def test_a_checkpoint_of_other_parameters_is_refused_with_their_names(train, good, own_run):
    outcome = train(good, "resume=auto", "trainer.steps=4", "model.depth=2", "resume.force=[model.depth]")
    assert_clear(outcome, "of another model", "layers.1.", str(own_run))


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (["seed=7"], ["seed: 0 -> 7", "data plan"]),
        (["data.sources.main.weight=2"], ["data.sources.main.weight", "data plan"]),
        (["data.sources.main.exclude_episodes=[0]"], ["data.sources.main.exclude_episodes", "data plan"]),
    ],
    ids=str,
)
def test_a_changed_data_plan_is_refused_and_named(change, texts, train, good, own_run):
    assert_clear(train(good, "resume=auto", "trainer.steps=4", *change), *texts, "resume.data=restart")


def test_a_dataset_that_changed_on_disk_is_refused_and_named(train, own_run, tmp_path):
    other = write(tmp_path / "other", Dataset(lengths=(*LENGTHS[:-1], 13), cameras=VIDEO))
    assert_clear(train(other, "resume=auto", "trainer.steps=4"), "'main'", "changed", "resume.data=restart")


def test_a_path_that_is_no_checkpoint_is_refused_with_its_name(train, good, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        assert_clear(train(good, f"resume={path}"), "no complete checkpoint", str(path), "RUN/checkpoints/STEP")


@pytest.mark.parametrize("key", ["paths.run_dir", "paths.cache_dir"])
def test_a_place_that_cannot_be_written_is_refused_with_its_key(key, train, good, tmp_path):
    (tmp_path / "file").write_text("x")
    assert_clear(train(good, f"{key}={tmp_path / 'file' / 'inside'}"), "file", f"set {key}")


SLURM = {"SLURM_NNODES": "2"}


@pytest.mark.slow
@pytest.mark.parametrize("names", by_day([SLURM, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}], SLURM), ids=str)
def test_nobody_trains_several_nodes_on_the_sample_by_accident(names, tmp_path):
    arguments = ["+recipe=droid_policy", f"paths.run_dir={tmp_path / 'run'}", f"paths.cache_dir={tmp_path / 'cache'}"]
    if "WORLD_SIZE" not in names:
        outcomes = [run(arguments, **names)]
    else:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_RANK": "0"}
        ranks = [
            warm.Popen(
                command(arguments),
                env=environment(**names, **address, RANK=str(rank), GROUP_RANK=str(rank)),
                text=True,
                stderr=subprocess.PIPE,
            )
            for rank in (0, 1)
        ]
        said = ranks[0].communicate(timeout=200)[1]
        ranks[1].kill()  # what torchrun does when a rank has ended
        assert ranks[1].communicate(timeout=60)[1].count("error: ") == 0
        outcomes = [subprocess.CompletedProcess(arguments, ranks[0].returncode, "", said)]
    assert_clear((outcomes[0].returncode, outcomes[0].stderr), "DROID_ROOT is not set", "2 nodes", "export DROID_ROOT")
    assert not any(tmp_path.iterdir()), "no sample was made, no run begun"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


# ---------------------------------------------------------------- a full disk


SMALL_FILES = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024,) * 2)
runpy.run_module("opentau_train", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(params=["file_size_limit", "full_file_system"])
def small_disk(request, tmp_path, finished) -> Iterator[tuple[Path, list[str]]]:
    """(a run of two steps, how to start the program), with room for the run's small files and not for a second
    checkpoint."""
    used = sum(p.stat().st_size for p in finished.rglob("*") if p.is_file() and not p.is_symlink())
    if request.param == "file_size_limit":
        yield shutil.copytree(finished, tmp_path / "run", symlinks=True), [sys.executable, "-c", SMALL_FILES]
        return
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={used * 5 // 4}", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can't be mounted here; the limit on file sizes stands in for it")
    try:
        yield shutil.copytree(finished, disk / "run", symlinks=True), command([])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.distributed
def test_a_disk_full_during_a_save_costs_only_that_save(small_disk, good, tmp_path):
    run_dir, program = small_disk
    arguments = [*SMALL, f"data.sources.main.root={good}", f"paths.run_dir={run_dir}", "resume=auto"]
    arguments.append(f"paths.cache_dir={tmp_path / 'cache'}")
    ended = warm.run([*program, *arguments, "trainer.steps=4"], env=environment(), timeout=200)
    assert_clear((ended.returncode, ended.stderr), "can't save", "00000004", "last good checkpoint", code=1)
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["00000002", "last"]

    roomy = shutil.copytree(run_dir, tmp_path / "roomy", symlinks=True)
    again = [a for a in arguments if not a.startswith("paths.run_dir")]
    done = run([*again, f"paths.run_dir={roomy}", "trainer.steps=4"])
    assert done.returncode == 0 and "at step 2" in done.stderr, done.stderr
    assert (roomy / "checkpoints/00000004/run.json").is_file()


# ---------------------------------------------------------------- a remedy, applied, makes the run start


def applied(said: str) -> str:
    """The first setting of the source that the error's remedy names."""
    return "data.sources.main." + message(said).partition("remedy: ")[2].partition("data.sources.main.")[2].split()[0]


@pytest.mark.slow
def test_drifting_timestamps_train_with_the_tolerance_that_the_error_proposes(train, tmp_path):
    seconds = [np.arange(n) / 29 for n in LENGTHS]
    root = write(tmp_path / "data", Dataset(lengths=LENGTHS, cameras=VIDEO, version="v2.1"))
    for path, times in zip(sorted((root / "data").rglob("*.parquet")), seconds, strict=True):
        table = pq.read_table(path)
        column = pa.array(times, pa.float32())
        pq.write_table(table.set_column(table.column_names.index("timestamp"), "timestamp", column), path)
    outcome = train(root)
    assert_clear(outcome, "no frame within 0.0001 s", "tolerance_s=", "miss the video's frames by up to 0.0")
    assert train(root, applied(outcome[1]))[0] == 0


@pytest.mark.slow
def test_dimensions_without_values_train_once_dropped_as_the_error_proposes(train, tmp_path):
    feature = {"dtype": "float32", "shape": [3], "names": None}
    columns = {"observation.state": (feature, lambda e, f: [e + f / 9, math.nan, 1.0 + f]), "action": vector(2)}
    root = write(tmp_path / "data", Dataset(lengths=LENGTHS, cameras={}, columns=columns))
    outcome = train(root)
    assert_clear(outcome, "observation.state[1] is nan", "and all others", "drop_dims=[observation.state.1]")
    assert train(root, applied(outcome[1]))[0] == 0


@pytest.mark.slow
def test_a_stored_depth_trains_without_its_camera_as_the_error_proposes(train, tmp_path):
    cameras = {FRONT: Camera(None, size=(32, 48)), "observation.images.depth": Camera(None, size=(32, 48))}
    root = write(tmp_path / "data", Dataset(lengths=LENGTHS, cameras=cameras))
    for path in (root / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        cells = pa.array([{"bytes": png(np.full((32, 48), 300, np.uint16)), "path": None}] * len(table))
        place = table.column_names.index("observation.images.depth")
        pq.write_table(table.set_column(place, "observation.images.depth", cells), path)
    outcome = train(root)
    assert_clear(outcome, "'observation.images.depth': its pixels are 16 bits", f"cameras=[{FRONT}]")
    assert train(root, applied(outcome[1]))[0] == 0


@pytest.mark.slow
def test_rows_without_a_frame_of_their_own_are_told_at_start_and_cost_no_quarantine(train, tmp_path):
    root = write(tmp_path / "data", Dataset(lengths=LENGTHS, cameras=VIDEO))
    for path in sorted(root.glob("meta/episodes/**/*.parquet")):
        table = pq.read_table(path)
        ends = [to - 2 / 30 for to in table[f"videos/{FRONT}/to_timestamp"].to_pylist()]
        place = table.column_names.index(f"videos/{FRONT}/to_timestamp")
        pq.write_table(table.set_column(place, f"videos/{FRONT}/to_timestamp", pa.array(ends)), path)
    code, said = train(root, "trainer.steps=8", "data.bad_samples.max_fraction=0", "data.bad_samples.grace=0")
    assert code == 0, said
    assert "left out, having no frame of their own:\n  front  episodes 0, 1, 2, 3, 4, 5  12 rows" in said
    assert not (tmp_path / "run/quarantine.jsonl").exists()


@pytest.mark.slow
def test_an_episode_without_its_rows_is_left_out_and_the_others_train(train, tmp_path):
    root = write(tmp_path / "data", Dataset(lengths=LENGTHS, cameras={}, version="v2.1"))
    path = root / "data/chunk-000/episode_000002.parquet"
    pq.write_table(pq.read_table(path).slice(0, 5), path)
    strict = ["trainer.steps=20", "data.bad_samples.max_fraction=0", "data.bad_samples.grace=0"]
    for _ in range(2):  # the second time with the statistics that the first one stored
        code, said = train(root, *strict)
        assert code == 0, said
        assert "data.sources.main: left out, their rows not being there: episodes 2" in said
        assert not (tmp_path / "run/quarantine.jsonl").exists()
        shutil.rmtree(tmp_path / "run")
    for path in (root / "data").rglob("*.parquet"):
        pq.write_table(pq.read_table(path).slice(0, 5), path)
    assert_clear(train(root), "has rows that can be read", "data.sources.main", "restore")


@pytest.mark.slow
def test_too_many_windows_of_drifting_clocks_end_with_the_tolerance_in_the_remedy(train, tmp_path):
    """Every other row lies off its frame: a substitute is always at hand, until there were too many."""
    root = write(tmp_path / "data", Dataset(lengths=LENGTHS, cameras=VIDEO))
    for path in (root / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        frames = np.array(table["frame_index"])
        times = pa.array(frames / 30 + 0.001 * (frames % 2), pa.float32())
        pq.write_table(table.set_column(table.column_names.index("timestamp"), "timestamp", times), path)
    outcome = train(root, "trainer.steps=40")
    assert_clear(outcome, "windows could not be read", "quarantine.jsonl", "tolerance_s=0.001")
    assert train(root, "trainer.steps=8", applied(outcome[1]), "data.bad_samples.grace=0")[0] == 0
