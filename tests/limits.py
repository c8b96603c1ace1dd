"""A machine that refuses: few open files, a file whose bytes the system won't give, a small /dev/shm."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import resource
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opentau_train.data.decode.open_files import SPARE_FILES
from tests.program import environment


def num_open() -> int:
    return len(os.listdir("/proc/self/fd")) - 1  # the listing's own


def alone(test: Callable[..., None]) -> Callable[..., None]:
    """The test in a fork of this process, in which no other thread opens or closes a file meanwhile."""

    @functools.wraps(test)
    def forked(*arguments, **named):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                test(*arguments, **named)
                code = 0
            except BaseException:
                # Broad, and not to be split: pytest's own failures are no Exceptions. Whatever it is fails the test,
                # and none may leave this fork, which would go on as a second pytest.
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "see stderr"

    return forked


@contextlib.contextmanager
def room_for(num: int) -> Iterator[int]:
    """While inside, this process may open `num` files and the spare ones; gives the number that it may have then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()
    highest = max(4 * SPARE_FILES, *map(int, os.listdir("/proc/self/fd")))
    fill = [os.open(os.devnull, os.O_RDONLY)]
    while fill[-1] < highest:  # no gaps below, in which files would find room
        fill.append(os.open(os.devnull, os.O_RDONLY))
    limit = fill[-1] + 1 + num + SPARE_FILES
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield limit - SPARE_FILES
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in fill:
            os.close(fd)


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """While inside, this process can open no file."""
    taken: list[int] = []
    with room_for(0):
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            yield
        finally:
            for fd in taken:
                os.close(fd)


def refuse(path: Path) -> None:
    """Put a file in place of `path` that opens, and whose bytes the system answers with EIO."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


def in_small_shm(size: str, arguments: list[str]) -> subprocess.CompletedProcess:
    """Run in a mount namespace of its own whose /dev/shm has `size`."""
    mount = f'mount -t tmpfs -o size={size} none /dev/shm && exec "$@"'
    unshared = ["unshare", "--mount", "bash", "-c"]
    if os.geteuid() != 0 or subprocess.run([*unshared, "mount -t tmpfs none /mnt"], capture_output=True).returncode:
        pytest.skip("mounting a small /dev/shm needs root and unshare")
    return subprocess.run(
        [*unshared, mount, "-", *arguments], env=environment(), capture_output=True, text=True, timeout=200
    )
