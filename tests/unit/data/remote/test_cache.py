"""The cache of files that a node's processes share: whole files, written once, within their bound."""

import errno
import fcntl
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opentau_train.data.remote.cache import Cache, TooLarge

FORK = multiprocessing.get_context("fork")


def cache_of(folder: Path, capacity: int) -> Cache:
    cache = Cache(folder)
    cache.resize(capacity)
    return cache


def put(cache: Cache, name: str, size: int) -> Path:
    path = cache.folder / "hash" / "set" / "data" / name
    cache.fill(path, size, lambda file: file.write(bytes(size)))
    return path


def files_of(cache: Cache) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in cache.folder.rglob("*") if p.is_file() and p.name != ".ledger"}


def used(cache: Cache) -> int:
    with cache._ledger() as ledger:
        return ledger.used


def age(cache: Cache) -> None:
    """Make every file a second older: some disks' clocks are coarse."""
    for path in cache.folder.rglob("*"):
        if path.is_file():
            stat = path.stat()
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - 10**9))


@pytest.mark.parametrize("error", [OSError(errno.EIO, "no"), KeyboardInterrupt()])
def test_a_file_whose_writing_failed_is_absent_and_takes_no_room(tmp_path, error):
    cache = cache_of(tmp_path / "cache", 100)

    def write(file):
        file.write(b"half")
        file.flush()
        raise error

    with pytest.raises(type(error)):
        cache.fill(cache.folder / "hash" / "set" / "data" / "a", 10, write)
    assert not files_of(cache) and used(cache) == 0
    assert put(cache, "a", 10).stat().st_size == 10


def _fill(cache: Cache, path: Path, log: Path, start) -> None:
    start.wait()

    def write(file):
        with open(log, "a") as lines:
            lines.write("written\n")
        for _ in range(10):
            file.write(b"x")
            file.flush()
            time.sleep(0.01)

    cache.fill(path, 10, write)
    assert path.read_bytes() == b"x" * 10


def test_processes_that_want_the_same_file_write_it_once(tmp_path):
    cache, log, start = cache_of(tmp_path / "cache", 100), tmp_path / "log", FORK.Event()
    path = cache.folder / "hash" / "set" / "data" / "a"
    processes = [FORK.Process(target=_fill, args=(cache, path, log, start)) for _ in range(6)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * 6
    assert log.read_text() == "written\n"
    assert used(cache) == 10


def test_a_process_that_was_killed_while_it_wrote_leaves_no_file_and_no_room_taken(tmp_path):
    cache, half = cache_of(tmp_path / "cache", 100), FORK.Event()
    path = cache.folder / "hash" / "set" / "data" / "a"

    def die(file):
        file.write(b"half")
        file.flush()
        half.set()
        signal.pause()

    process = FORK.Process(target=cache.fill, args=(path, 90, die))
    process.start()
    half.wait()
    assert not path.exists()
    process.kill()
    process.join()
    put(cache, "b", 50)  # needs what the dead one had reserved
    assert files_of(cache) == {"b": 50} and used(cache) == 50
    put(cache, "a", 40)
    assert path.stat().st_size == 40


def test_the_least_recently_used_files_go_and_metadata_never(tmp_path):
    cache = cache_of(tmp_path / "cache", 100)
    meta = cache.folder / "hash" / "set" / "meta" / "info.json"
    cache.fill(meta, 20, lambda file: file.write(bytes(20)))
    for name in "abc":
        age(cache)
        put(cache, name, 25)
    age(cache)
    put(cache, "a", 25)  # used again, not written: b is now the oldest
    age(cache)
    put(cache, "d", 25)
    assert set(files_of(cache)) == {"info.json", "a", "d"}  # c too: a tenth of the room is left free


def test_a_file_larger_than_the_room_beside_the_metadata_is_refused(tmp_path):
    cache = cache_of(tmp_path / "cache", 100)
    cache.fill(cache.folder / "hash" / "set" / "meta" / "info.json", 20, lambda file: file.write(bytes(20)))
    put(cache, "a", 80)
    with pytest.raises(TooLarge):
        put(cache, "b", 81)
    assert "b" not in files_of(cache)


def test_unfinished_files_of_others_are_waited_for(tmp_path):
    cache, begun, finish = cache_of(tmp_path / "cache", 100), FORK.Event(), FORK.Event()

    def slowly(file):
        begun.set()
        finish.wait()
        file.write(bytes(60))

    path = cache.folder / "hash" / "set" / "data" / "a"
    slow = FORK.Process(target=cache.fill, args=(path, 60, slowly))
    slow.start()
    begun.wait()
    other = FORK.Process(target=put, args=(cache, "b", 60))
    other.start()
    time.sleep(0.2)
    assert other.is_alive() and files_of(cache).get("b") is None
    finish.set()
    slow.join()
    other.join()
    assert slow.exitcode == other.exitcode == 0
    assert files_of(cache) == {"b": 60}


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 40)), max_size=20), st.integers(40, 120))
def test_the_files_never_take_more_than_the_capacity(tmp_path_factory, wanted, capacity):
    cache, sizes = cache_of(tmp_path_factory.mktemp("cache"), capacity), {}
    for name, size in wanted:
        size = sizes.setdefault(name, size)
        path = put(cache, str(name), size)
        assert path.stat().st_size == size
        assert sum(files_of(cache).values()) == used(cache) <= capacity


def test_a_file_that_is_removed_while_it_is_read_is_read_to_its_end(tmp_path):
    cache = cache_of(tmp_path / "cache", 100)
    with open(put(cache, "a", 60), "rb") as file:
        put(cache, "b", 60)
        assert set(files_of(cache)) == {"b"}
        assert len(file.read()) == 60


def test_no_lock_outlives_its_process(tmp_path):
    cache, locked = cache_of(tmp_path / "cache", 100), FORK.Event()

    def lock():
        with open(cache.folder / ".ledger", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            locked.set()
            signal.pause()

    process = FORK.Process(target=lock)
    process.start()
    locked.wait()
    process.kill()
    process.join()
    assert put(cache, "a", 10).exists()
