"""The errors that users meet, the machine's faults in words, and the exit codes that scripts see.

A `UserError` is a mistake in configuration or data: it is printed once (by rank 0), without a
traceback, and ends the program with `EXIT_USER`. Everything else is a fault and ends with `EXIT_FAULT`; a `Fault` is
one that its message explains, printed in the same form.
"""

from __future__ import annotations

import difflib
import errno
import mmap
import os
import re
import resource
import shutil
import socket
from collections.abc import Iterable
from enum import Enum
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG

EXIT_OK = 0
EXIT_FAULT = 1
EXIT_USER = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: a checkpoint is saved, start again with resume=auto
EXIT_INTERRUPTED = 130  # Ctrl-C: a checkpoint is saved


_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a name in a file could do to a terminal, but for new lines."""

_BREAK = re.compile(r"\s*\n\s*")
"""Names and other programs' texts may have several lines; an error's parts have one each."""


def _escaped(character: re.Match[str]) -> str:
    return character[0].encode("unicode_escape").decode()


class Explained(Exception):
    """What is wrong, where, and the remedy, in at most three short lines.

    `what` names the thing, `where` the key, dataset, episode or file, `remedy` what to do about it. `details`: lines
    of the program's own that follow the first.
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = "", details: str = ""):
        what, where, remedy = (_CONTROL.sub(_escaped, _BREAK.sub(" ", text)) for text in (what, where, remedy))
        self.what, self.where, self.remedy, self.details = what, where, remedy, _CONTROL.sub(_escaped, details)
        lines = [what, self.details] if details else [what]
        if where:
            lines.append(f"  where:  {where}")
        if remedy:
            lines.append(f"  remedy: {remedy}")
        super().__init__("\n".join(lines))

    def __reduce__(self):
        return (_rebuild, (type(self), self.what, self.where, self.remedy, self.details))


def _rebuild(cls: type[Explained], what: str, where: str, remedy: str, details: str) -> Explained:
    """Unpickle with keywords: errors cross process boundaries (loader workers, other ranks)."""
    return cls(what, where=where, remedy=remedy, details=details)


class UserError(Explained, ValueError):
    """A user's mistake, in configuration or data."""


class Teller(Enum):
    """Who prints a fault."""

    RANK_0 = "rank 0"
    """Rank 0 prints it for all ranks, which raise the same fault."""
    THIS_RANK = "this rank"
    """This rank prints it at once: no other one knows of it, or this one was chosen to."""
    ANOTHER_RANK = "another rank"


class Fault(Explained, RuntimeError):
    """A fault of the surroundings that no line of the program explains (a full disk, a rank that is gone)."""

    def __init__(
        self, what: str, *, where: str = "", remedy: str = "", details: str = "", teller: Teller = Teller.RANK_0
    ):
        super().__init__(what, where=where, remedy=remedy, details=details)
        self.teller = teller


class BadSample(RuntimeError):
    """A window of a dataset that can't be read: a fault of the file, not of the configuration.

    The stream substitutes it and writes it to the quarantine; validation reports it. `remedy`: what a user can do,
    where the cause tells it.
    """

    def __init__(self, dataset: str, episode: int, frame: int, cause: str, remedy: str = ""):
        self.dataset, self.episode, self.frame, self.cause, self.remedy = dataset, episode, frame, cause, remedy
        super().__init__(f"dataset {dataset}, episode {episode}, frame {frame}: {cause}")

    def __reduce__(self):
        return (type(self), (self.dataset, self.episode, self.frame, self.cause, self.remedy))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`: did you mean 'x'?` for the nearest of `known`, nothing where none is near."""
    near = difflib.get_close_matches(word, sorted(str(k) for k in known), n=1, cutoff=0.5)
    return f": did you mean '{near[0]}'?" if near else ""


def fits_nothing(kind: str, where: str, pattern: str, names: Iterable[str]) -> UserError:
    """No name of a `kind` (`trainable parameter`, ...) among `names` fits the `pattern` that the key `where` has."""
    names = list(names)
    near = did_you_mean(pattern.replace("*", ""), [*names, *{part for name in names for part in name.split(".")}])
    shown = ", ".join(names[:: max(1, len(names) // 6)])
    return UserError(
        f"no {kind}'s name fits '{pattern}'{near}",
        where=where,
        remedy=f"write it over whole names, with * for anything; the policy has {len(names)}, such as {shown}",
    )


# -- the machine's faults, in words of their own --------------------------------------------------------------------

SHARED_MEMORY = "/dev/shm"
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
            if S_ISREG(status.st_mode):  # to read a FIFO would never end
                _read_through(str(path), status.st_size, status.st_mtime_ns)
        else:
            check_machine(error, path)
    except ValueError:
        return  # no file can have this name
    except OSError as refusal:
        check_machine(refusal, path)


def shared_memory_fault(what: str) -> Fault:
    """Shared memory can't be had: `what` couldn't be done."""
    return Fault(
        f"no shared memory: {what}",
        where=f"{SHARED_MEMORY}{_room(SHARED_MEMORY)} on {socket.gethostname()}",
        remedy="enlarge it (docker run --shm-size=8g, or --ipc=host) and have it writable, remove what others left in "
        "it, or lower data.num_workers",
        teller=Teller.THIS_RANK,
    )


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
