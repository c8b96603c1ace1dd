"""What the machine refuses: its faults in words of their own, and its limit of open files."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import shutil
import socket
from functools import lru_cache
from pathlib import Path

from opentau_train.errors import Fault, Teller

SHARED_MEMORY = "/dev/shm"
SPARE_FILES = 32
"""File descriptors that are kept free for what else a process opens: sockets, logs, checkpoints."""
PROBED_BYTES = 64 * 2**20
"""What a machine that still has memory gives."""

_MORE_FILES = (
    "raise it: `ulimit -n 4096` before the start, `docker run --ulimit nofile=4096`, a service's LimitNOFILE; or lower "
    "data.num_workers"
)
_LESS_MEMORY = (
    "ask for more memory (of the scheduler, `ulimit -v`), or lower data.num_workers, data.prefetch_factor or "
    "data.lanes_per_sample; go on with resume=auto"
)
_FULL = "the disk is full", "make room or raise the quota, or name another place; go on with resume=auto"
_MENDED = "see dmesg and the mount; once it is mended, go on with resume=auto"
_FAILS, _NOT_THERE = ("the disk or the file server fails", _MENDED), ("the file server is not there", _MENDED)
_WORDS = {
    errno.EMFILE: ("too many open files in one process", _MORE_FILES),
    errno.ENFILE: ("too many open files on the machine", "end what else runs there, or raise fs.file-max"),
    errno.ENOMEM: ("out of memory", _LESS_MEMORY),
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: ("a file outgrows the limit", "raise it (`ulimit -f unlimited`); go on with resume=auto"),
    errno.EIO: _FAILS,
    errno.ESTALE: _FAILS,  # an open file that the server has forgotten
    errno.ENXIO: _FAILS,
    errno.ENODEV: _FAILS,
    errno.EHOSTDOWN: _NOT_THERE,
    errno.ETIMEDOUT: _NOT_THERE,
    errno.ENOTCONN: _NOT_THERE,  # the process behind a FUSE mount is gone
}


def machine_fault(error: BaseException, path: Path | str = "") -> Fault | None:
    """What `error` says of the machine; None where it says nothing of it. No dataset is to blame for such an error, and
    the next file would meet it too. `path`: the file, where the error names none."""
    if isinstance(error, RuntimeError) and "shared memory" in str(error):  # torch's words: it gives no number
        return shared_memory_fault(str(error).partition("\n")[0])
    code = _code(error)
    if code not in _WORDS:
        return None
    what, remedy = _WORDS[code]
    place = str(error.filename or path) if isinstance(error, OSError) else ""
    if code == errno.EMFILE:
        what += f", the limit (`ulimit -n`) is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"
    if code == errno.ENOSPC:
        place += _room(place)
    where = f"{place} on {socket.gethostname()}" if place else socket.gethostname()
    return Fault(f"{what}: {errno.errorcode[code]}", where=where, remedy=remedy, teller=Teller.THIS_RANK)


def check_machine(error: BaseException, path: Path | str = "") -> None:
    """Raises the `machine_fault` behind `error`, if there is one: called before a file is blamed for it."""
    fault = machine_fault(error, path)
    if fault is not None:
        raise fault from error


def check_machine_read(error: BaseException, path: Path) -> None:
    """As `check_machine`, where a library read `path`. What it says may be wrong both ways: FFmpeg speaks of memory and
    of input and output where a damaged file has absurd lengths, and of damage where the disk gave it half of a packet.
    So the memory, or the file's bytes, are asked for once more."""
    code = _code(error)
    try:
        if code == errno.ENOMEM:
            mmap.mmap(-1, PROBED_BYTES).close()
        elif code == errno.EIO or code not in _WORDS:
            status = os.stat(path)
            _read_through(str(path), status.st_size, status.st_mtime_ns)
        else:
            check_machine(error, path)
    except OSError as refusal:
        check_machine(refusal, path)


def shared_memory_fault(what: str) -> Fault:
    """Shared memory can't be had: `what` couldn't be done."""
    return Fault(
        f"no shared memory: {what}",
        where=f"{SHARED_MEMORY}{_room(SHARED_MEMORY)} on {socket.gethostname()}",
        remedy="enlarge it (docker run --shm-size=8g, or --ipc=host), remove what others left in it, or lower "
        "data.num_workers",
        teller=Teller.THIS_RANK,
    )


def raise_file_limit() -> None:
    """Let this process and those that it starts open as many files as the machine's hard limit allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except ValueError:  # macOS: its hard limit is larger than what it lets a process have
        return


def few_files_left() -> bool:
    """Whether this process comes near its limit of open files, whoever holds them."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return False
    try:
        lowest_free = os.open(os.devnull, os.O_RDONLY)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        return True
    os.close(lowest_free)
    return lowest_free >= limit - min(SPARE_FILES, limit // 4)


def _code(error: BaseException) -> int | None:
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return errno.ENOMEM
    return error.errno if isinstance(error, OSError) else None


def _room(place: str) -> str:
    """The size of the file system that `place` lies on, for a message; nothing where it can't be asked."""
    existing = next((p for p in (Path(place), *Path(place).parents) if p.exists()), None)
    if existing is None or not place:
        return ""
    total, _, free = shutil.disk_usage(existing)
    return f" ({total / 1e6:,.0f} MB, {free / 1e6:,.0f} MB free)"


@lru_cache(1024)
def _read_through(path: str, size: int, mtime_ns: int) -> None:
    """Read the whole file; once for a file that was found readable and hasn't changed. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        while file.read(2**20):
            pass
