"""A disk that is full, under each file that a run writes: one clear error, and the last good checkpoint stays."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from opentau_train.checkpoints import commit
from opentau_train.checkpoints.room import num_at_once
from opentau_train.config.settings import load_settings
from opentau_train.errors import EXIT_FAULT
from tests.lerobot_writer import Dataset, write
from tests.nightly import AT_NIGHT
from tests.program import TINY_POLICY, metrics, run


@contextmanager
def disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes at `folder`, while inside."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can't be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    root = write(tmp_path_factory.mktemp("data") / "set", Dataset(lengths=(9, 12, 8), cameras={}))
    return [
        "+recipe=lerobot",
        f"data.sources.main.root={root}",
        "data.sources.main.val_split_ratio=0",
        "data.num_workers=0",
        "data.chunk_length=4",
        "trainer.global_batch_size=4",
        "trainer.log_every=1",
        "scheduler=constant",
        "validation.every=0",
        "logger=none",
        *TINY_POLICY,
    ]


@pytest.fixture(scope="module")
def sizes(arguments, tmp_path_factory) -> tuple[int, int]:
    """What a checkpoint takes on a tmpfs, and the rest of a run."""
    run_dir = tmp_path_factory.mktemp("measured") / "run"
    done = run([*arguments, "trainer.steps=1", f"paths.run_dir={run_dir}"])
    assert done.returncode == 0, done.stderr
    taken = [(path, -(-path.stat().st_size // 4096) * 4096) for path in run_dir.rglob("*") if path.is_file()]
    of_checkpoint = sum(size for path, size in taken if "checkpoints/00000001" in str(path))
    return of_checkpoint, sum(size for path, size in taken if "checkpoints" not in str(path))


@pytest.fixture
def full(tmp_path) -> Iterator[Path]:
    """A directory without room: files can be made there, and have no content."""
    with disk(tmp_path / "full", 2**16) as folder:
        with open(folder / "filler", "wb", buffering=0) as filler, pytest.raises(OSError):
            while True:
                filler.write(bytes(4096))
        yield folder


def assert_told(ended, *texts: str) -> None:
    """One error, without a traceback, with a fault's code."""
    assert ended.returncode == EXIT_FAULT, ended.stderr
    assert "Traceback" not in ended.stderr and ended.stderr.count("error: ") == 1, ended.stderr
    for text in texts:
        assert text in ended.stderr, ended.stderr


@pytest.mark.distributed
@pytest.mark.parametrize("file", ["metrics.jsonl", "train.log", "tensorboard", "cache"])
def test_a_full_disk_under_a_file_of_the_run_is_told(file, full, arguments, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    more = [f"paths.run_dir={run_dir}", "trainer.steps=100000", "checkpoint.every=1", "checkpoint.keep_last=1"]
    if file == "cache":
        more.append(f"paths.cache_dir={full}")
    else:
        (full / file).mkdir() if file == "tensorboard" else (full / file).touch()
        (run_dir / file).symlink_to(full / file)
        more.append(f"paths.cache_dir={tmp_path / 'cache'}")
    if file == "tensorboard":
        more += ["logger=tensorboard", "logger.tensorboard.flush_seconds=0"]
    ended = run([*arguments, *more])
    assert_told(ended, "the disk is full: ENOSPC", str(full) if file == "cache" else file, "(0 MB, 0 MB free)")
    whole = commit.complete(run_dir / "checkpoints")
    if file == "train.log":
        assert f"the last good checkpoint is {whole[-1]}" in ended.stderr
    assert len(whole) <= 1 and not list((run_dir).glob("checkpoints/*.tmp"))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("share", "mode"),
    [
        (0.3, "true"),
        (0.93, "false"),
        pytest.param(0.3, "false", marks=AT_NIGHT),
        pytest.param(0.93, "true", marks=AT_NIGHT),
    ],
)
def test_a_save_without_room_is_told_by_the_next_steps_on_all_ranks(share, mode, arguments, sizes, tmp_path):
    """Room for one checkpoint and for a share of the next: up to some file of its state, or of its readable part."""
    with disk(tmp_path / "disk", int(sizes[0] * (1 + share)) + sizes[1] + 80_000) as folder:  # and rows of metrics
        run_dir = folder / "run"
        more = [f"paths.run_dir={run_dir}", f"paths.cache_dir={tmp_path / 'cache'}", "trainer.steps=100000"]
        more += ["checkpoint.every=20", f"checkpoint.async={mode}"]
        ended = run([*arguments, *more], 2)
        good = run_dir / "checkpoints/00000020"
        assert ended.returncode == EXIT_FAULT
        assert ended.stderr.count("error: can't save") == 1, ended.stderr
        assert "No space left on device" in ended.stderr or "cut short, as it is on a full disk" in ended.stderr
        told = [f"can't save {good.with_name('00000040')}: rank ", " written, ", " free)"]
        for text in (*told, "a checkpoint takes ", f"the last good checkpoint is {good}"):
            assert text in ended.stderr, ended.stderr
        assert sorted(p.name for p in good.parent.iterdir()) == ["00000020", "last"]
        assert max(metrics(run_dir)) < 60, "told at the next save only"
        assert "the run's checkpoints will take" in ended.stderr  # before the first step
        written = (run_dir / "train.log").read_text()
        assert written.index("checkpoints will take") < written.index("saved ")


def test_the_checkpoints_that_are_there_at_once_are_counted(arguments):
    def num(*more: str, step: int = 0, num_there: int = 0) -> int:
        from opentau_train import cli

        settings = load_settings(cli.compose([*arguments, "trainer.steps=100", *more]))
        return num_at_once(settings, step, num_there)

    assert num("checkpoint.every=0") == 1
    assert num("checkpoint.every=10", "checkpoint.keep_last=null") == 10
    assert num("checkpoint.every=30", "checkpoint.keep_last=null") == 4
    assert num("checkpoint.every=10", "checkpoint.keep_last=2") == 3
    assert num("checkpoint.every=10", "checkpoint.keep_last=2", "validation.every=10") == 5  # best and lowest
    assert num("checkpoint.every=10", "checkpoint.keep_last=2", "checkpoint.keep_every=50") == 5
    assert num("checkpoint.every=10", "checkpoint.keep_last=null", step=90, num_there=9) == 10
