"""The machine's faults keep their own words, whoever meets them: no file is blamed for them, nor they for a file."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opentau_train import cli
from opentau_train.data.decode.parquet import RowError, RowReader
from opentau_train.data.decode.video import VideoPool
from opentau_train.data.decode.video_file import VideoError
from opentau_train.data.lerobot.identity import end_of
from opentau_train.data.load.stream import ShardDataset
from opentau_train.errors import EXIT_FAULT, Fault, UserError, check_machine_read, machine_fault
from opentau_train.sinks.base import SinkContext
from opentau_train.sinks.jsonl import JsonlSink
from tests.fake_source import global_batches, with_data
from tests.lerobot_writer import DEFAULT_COLUMNS, Camera, Dataset, write
from tests.limits import no_room, refuse
from tests.unit.data.load.test_real_stream import BATCH, flip, mixture, truncate

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

WORDS = {
    errno.EMFILE: ("too many open files", "ulimit -n"),
    errno.ENFILE: ("too many open files on the machine", "fs.file-max"),
    errno.ENOMEM: ("out of memory", "data.num_workers"),
    errno.ENOSPC: ("the disk is full", "make room"),
    errno.EDQUOT: ("the disk is full", "quota"),
    errno.EIO: ("disk or the file server fails", "dmesg"),
    errno.ESTALE: ("disk or the file server fails", "mount"),
    errno.ENOTCONN: ("file server is not there", "mount"),
}


@pytest.mark.parametrize("code", WORDS, ids=errno.errorcode.get)
def test_a_fault_of_the_machine_has_words_a_place_and_a_remedy(code):
    fault = machine_fault(OSError(code, os.strerror(code)), "/data/file")
    assert fault is not None and WORDS[code][0] in fault.what and WORDS[code][1] in fault.remedy
    assert errno.errorcode[code] in fault.what and os.uname().nodename in fault.where
    assert "/data/file" in fault.where
    named = machine_fault(OSError(code, os.strerror(code), "/data/other"), "/data/file")
    assert named is not None and "/data/other" in named.where


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "x"), OSError("x"), ValueError("x"), EOFError()])
def test_what_is_wrong_with_a_file_is_no_fault_of_the_machine(error, tmp_path):
    assert machine_fault(error) is None
    (tmp_path / "file").write_bytes(b"whole")
    check_machine_read(error, tmp_path / "file")
    check_machine_read(error, tmp_path / "missing")


def test_torch_says_no_memory_and_no_shared_memory_in_words_only():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**62, dtype=torch.uint8)
    fault = machine_fault(refused.value)
    assert fault is not None and "out of memory" in fault.what
    fault = machine_fault(RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left"))
    assert fault is not None and "no shared memory" in fault.what and "--shm-size" in fault.remedy


def test_a_library_that_wants_absurd_amounts_of_memory_has_a_damaged_file(tmp_path):
    """And where the machine has none left, it is the machine."""
    path = tmp_path / "file"
    path.write_bytes(b"whole")
    check_machine_read(MemoryError("of 2**60 bytes"), path)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 2**20, hard))
    try:
        with pytest.raises(Fault, match="out of memory"):
            check_machine_read(MemoryError(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_disk_that_fails_is_not_taken_for_a_damaged_file(tmp_path):
    """FFmpeg gives what it got before the error, and calls it damaged."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    refuse(path)
    with pytest.raises(Fault, match="EIO"):
        check_machine_read(VideoError(f"{path}: the frame at 1 s is damaged"), path)


def test_the_limit_of_open_files_is_raised_to_the_hard_one():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        assert cli.answer(lambda: 0) == 0
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_wherever_it_comes_from_the_command_line_explains_it(capsys):
    def work() -> int:
        with open("/dev/full", "w") as file:
            file.write("x")
        return 0

    assert cli.answer(work) == EXIT_FAULT
    told = capsys.readouterr().err
    assert told.startswith("error: the disk is full: ENOSPC") and "Traceback" not in told


# -- reading ---------------------------------------------------------------------------------------------------------

FILES = {
    "video": "videos/observation.images.front/chunk-000/file-001.mp4",
    "rows": "data/chunk-000/file-001.parquet",
}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Four episodes, one file of rows and of frames each."""
    dataset = Dataset(
        lengths=(6, 7, 6, 5),
        cameras={"observation.images.front": Camera(gop=4, episodes_per_file=1)},
        columns=DEFAULT_COLUMNS,
        episodes_per_data_file=1,
    )
    return write(tmp_path_factory.mktemp("healthy") / "set", dataset)


def opened(root, tmp_path, *overrides):
    sources = [f"data.sources.main.root={root}", "~data.sources.old", "data.sources.main.val_split_ratio=0"]
    return mixture(tmp_path, *sources, *overrides)


def stream(found, tmp_path, workers=0):
    found = with_data(found, num_workers=workers)
    quarantine = tmp_path / "quarantine.jsonl"
    return global_batches(found, found.tape(BATCH), quarantine, size=1, first=0, last=5), quarantine


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", FILES)
def test_a_disk_that_fails_ends_the_stream_and_quarantines_nothing(kind, workers, healthy, tmp_path):
    root = shutil.copytree(healthy, tmp_path / "set")
    found = opened(root, tmp_path)
    refuse(root / FILES[kind])
    parts, quarantine = stream(found, tmp_path, workers)
    errors = [part.error for (part,) in parts if part.error is not None]
    assert len(errors) == 1 and isinstance(errors[0], Fault), errors
    assert "EIO" in errors[0].what and FILES[kind] in errors[0].where
    assert not quarantine.exists()


def test_no_more_files_ends_the_stream_and_quarantines_nothing(healthy, tmp_path):
    found = opened(healthy, tmp_path)
    parts, quarantine = stream(found, tmp_path)
    with no_room():
        ((part,),) = parts
    assert isinstance(part.error, Fault) and "ulimit -n" in part.error.what
    assert not quarantine.exists()


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("skip_bad", [True, False])
def test_validation_leaves_out_no_window_for_the_machines_sake(kind, skip_bad, healthy, tmp_path):
    root = shutil.copytree(healthy, tmp_path / "set")
    found = opened(root, tmp_path)
    refuse(root / FILES[kind])
    windows = found.tape(24).owned(range(1), 0, 1, 0, 1)
    (shard,) = ShardDataset(found, lambda worker, num_workers: iter(windows), train=False, skip_bad=skip_bad)
    assert isinstance(shard.error, Fault) and not shard.left_out


def test_readers_of_video_and_rows_say_that_no_file_can_be_opened(healthy):
    cursor = VideoPool().cursor()
    rows, path = RowReader(["action"]), healthy / FILES["rows"]
    with no_room():
        with pytest.raises(Fault, match="too many open files"):
            cursor.read(healthy / FILES["video"], 0.0, 1e-3)
        with pytest.raises(Fault, match="too many open files"):
            rows.slice(path, 0, 7)
        with pytest.raises(Fault, match="too many open files"):
            end_of(str(healthy / FILES["rows"]))
    assert cursor.read(healthy / FILES["video"], 0.0, 1e-3).width and rows.slice(path, 0, 7).num_rows == 7


@pytest.mark.parametrize("harm", [truncate, flip, lambda path: path.unlink()], ids=["truncated", "flipped", "missing"])
def test_damaged_files_stay_bad_data(harm, healthy, tmp_path):
    root = shutil.copytree(healthy, tmp_path / "set")
    for kind in FILES:
        harm(root / FILES[kind])
    with pytest.raises(RowError):
        RowReader(["action"]).slice(root / FILES["rows"], 0, 7)
    cursor = VideoPool().cursor()
    with pytest.raises(VideoError):
        for frame in range(7):
            cursor.read(root / FILES["video"], frame / 30, 1e-3)


@pytest.mark.parametrize("name", ["meta/info.json", "meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet"])
def test_metadata_on_a_disk_that_fails_is_no_mistake_of_the_users(name, healthy, tmp_path):
    root = shutil.copytree(healthy, tmp_path / "set")
    refuse(root / name)
    with pytest.raises(Fault, match="EIO"):
        opened(root, tmp_path, "data.sources.main.links=[/proc]")


# -- writing ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_under_the_quarantine_ends_the_stream_with_its_place(healthy, tmp_path):
    root = shutil.copytree(healthy, tmp_path / "set")
    found = opened(root, tmp_path)
    truncate(root / FILES["video"])
    (tmp_path / "quarantine.jsonl").symlink_to("/dev/full")
    parts, quarantine = stream(found, tmp_path)
    errors = [part.error for (part,) in parts if part.error is not None]
    assert isinstance(errors[0], Fault) and "the disk is full" in errors[0].what and str(quarantine) in errors[0].where


def test_a_full_disk_under_the_numbers_names_their_file(tmp_path):
    sink = JsonlSink(context=SinkContext(tmp_path, "x", 1, 0, {}))
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, sink._file.fileno())
    os.close(full)
    with pytest.raises(Fault, match="the disk is full") as raised:
        sink.write(1, {"a": 1.0})
    assert "metrics.jsonl" in raised.value.where


@given(*[st.text(max_size=20)] * 3)
def test_names_of_any_kind_leave_an_error_its_three_lines(what, where, remedy):
    """Also on its way between processes."""
    error = UserError(f"key '{what}' is odd", where=where, remedy=remedy)
    assert len(str(error).splitlines()) == 1 + bool(error.where) + bool(error.remedy)
    again = pickle.loads(pickle.dumps(UserError("odd", where="here", remedy="that", details=f"  a\n  b {remedy}")))
    assert str(again).startswith("odd\n  a\n  b ") and str(again).endswith("\n  where:  here\n  remedy: that")
