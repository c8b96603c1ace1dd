"""The manifest of a checkpoint, `files.json`: every file with its size and a hash of its bytes.

Sizes are looked at wherever a checkpoint is looked for, which costs nothing. Hashes are compared before one is read:
a flipped bit of an exponent would otherwise train on to a NaN, or to worse without a word.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import NamedTuple

from opentau_train import strangers
from opentau_train.errors import UserError, check_machine

MANIFEST = "files.json"
FLUSH_EVERY = 0.1
"""Seconds."""
_CHUNK = 1 << 26


class File(NamedTuple):
    """A file as it was written: its size in bytes, and the hexadecimal XXH3-128 (Collet 2019) of its content, None
    where an older version wrote the manifest."""

    size: int
    xxh3: str | None


def digest(path: Path) -> str:
    """The file's hash, for `File`. It goes through the pages that the system holds of a file just written."""
    try:  # here: a policy in one file is read without it
        import xxhash
    except ImportError as error:
        remedy = "pip install xxhash, or give a file of tools.export, which needs none"
        raise UserError(f"a checkpoint's hashes need a package: {error}", where=str(path), remedy=remedy) from error
    state = xxhash.xxh3_128()
    strangers.check_plain(path)
    with open(path, "rb") as file:
        if path.stat().st_size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as content:
                for start in range(0, len(content), _CHUNK):
                    state.update(content[start : start + _CHUNK])
    return state.hexdigest()


def describe(folder: Path, paths: Iterable[Path]) -> dict[str, File]:
    """{path inside `folder`: size and hash} of files in it, which are then on the disk: the processor hashes them while
    the disk writes them."""
    listed = list(paths)
    with ThreadPoolExecutor(1) as beside:
        flushing = [beside.submit(flush, path) for path in listed]
        files = {path.relative_to(folder).as_posix(): File(path.stat().st_size, digest(path)) for path in listed}
        for call in flushing:
            call.result()
    return files


@contextmanager
def flushing(folder: Path, *patterns: str) -> Iterator[None]:
    """Inside, what is written to such files of `folder` is on its way to the disk while the processor prepares more."""
    over = Event()

    def again() -> None:
        while not over.wait(FLUSH_EVERY):
            for path in (path for pattern in patterns for path in folder.glob(pattern)):
                with suppress(FileNotFoundError):  # safetensors writes under another name, and then renames
                    flush(path)

    with ThreadPoolExecutor(1) as beside:
        call = beside.submit(again)
        try:
            yield
        finally:
            over.set()
        call.result()  # the system tells of a write that failed once only


def flush(path: Path) -> None:
    """Wait until the file or directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_text(files: Mapping[str, File]) -> str:
    """The content of `files.json`."""
    return json.dumps({name: files[name]._asdict() for name in sorted(files)}, indent=1) + "\n"


def read(folder: Path) -> dict[str, File]:
    """The manifest of `folder`. Raises OSError, or ValueError where it is none."""
    tree = strangers.read_json(folder / MANIFEST)
    if not isinstance(tree, dict) or not tree:
        raise ValueError("it lists no files")
    files = {}
    for name, entry in tree.items():
        size, xxh3 = (entry.get("size"), entry.get("xxh3")) if isinstance(entry, dict) else (entry, None)
        inside = name and not Path(name).is_absolute() and ".." not in Path(name).parts
        if type(size) is not int or not (xxh3 is None or isinstance(xxh3, str)) or not inside:
            raise ValueError(f"{name[:80]!r} has no size, a hash that is none, or lies elsewhere")
        files[name] = File(size, xxh3)
    return files


def loss(folder: Path) -> str | None:
    """What a directory lacks of its manifest, by the files' sizes."""
    try:
        files = read(folder)
    except (OSError, ValueError) as error:
        check_machine(error, folder / MANIFEST)
        return f"no readable {MANIFEST} ({type(error).__name__})"
    for name, file in files.items():
        try:
            strangers.check_plain(folder / name)
            size = (folder / name).stat().st_size
        except OSError as error:
            check_machine(error, folder / name)
            return f"{name} is missing"
        if size != file.size:
            return f"{name} has {size} bytes of {file.size}"
    return None


def damage(folder: Path, below: str = "", *, part: int = 0, parts: int = 1) -> str | None:
    """Which file of a whole checkpoint has other bytes than were written, None where all have the same. Looked at are
    those in the directory `below`, and of `parts` that are alike in bytes one. Files without a hash pass.
    """
    with strangers.understood("the manifest", folder / MANIFEST):
        files = {name: file for name, file in read(folder).items() if name.startswith(below) and file.xxh3 is not None}
    largest_first = sorted(files, key=lambda name: (-files[name].size, name))
    loads = [0] * parts
    for name in largest_first:
        lightest = loads.index(min(loads))
        loads[lightest] += files[name].size
        if lightest != part:
            continue
        try:
            if digest(folder / name) != files[name].xxh3:
                return f"{name} has other bytes than were written"
        except OSError as error:
            check_machine(error, folder / name)
            return f"{name} can't be read: {error.strerror or error}"
    return None


def damaged(path: Path, why: str) -> UserError:
    """The error of a checkpoint that is to be read, and can't be trusted."""
    return UserError(
        f"the checkpoint is damaged: {why}",
        where=str(path),
        remedy="take an older one or a copy; resume=auto does so by itself. checkpoint.verify=false reads it as it is",
    )


def check(folder: Path, below: str = "", *, part: int = 0, parts: int = 1) -> None:
    """Raises `UserError` for a checkpoint that has `damage`."""
    if (why := damage(folder, below, part=part, parts=parts)) is not None:
        raise damaged(folder, why)
