"""Files that come from strangers (datasets, checkpoints, exported policies), taken as data, never as code: plain files
of a bounded size that lie where they must, trees of a bounded depth, and classes that somebody has vouched for.

What isn't so raises `Refused`, an OSError, which readers tell as they tell any file that can't be read.
"""

from __future__ import annotations

import json
import os
import pickle
import stat
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from opentau_train.errors import Explained, UserError, check_machine

MAX_PIXELS = 50_000_000
"""Of a picture, unless the settings say otherwise: a file of a kilobyte may claim to hold one of gigabytes."""
MOST_BYTES = 64 * 2**20
"""Of a file of JSON, unless its reader says otherwise."""
MOST_VALUES = 2**23
"""Values in one file of JSON: each takes up to a hundred bytes of memory."""
MALFORMED = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError, RecursionError, TypeError, ValueError),
    *(pickle.UnpicklingError, zipfile.BadZipFile),
)
"""What comes of a tree that holds other things than its reader expects."""


class Refused(OSError):
    """A file is not read; the text says why."""


class Outside(Refused):
    """A link leads to another `folder` than the files may lie in."""

    def __init__(self, what: str, folder: str):
        super().__init__(what)
        self.folder = folder


def check_plain(path: Path | str) -> None:
    """Raises `Refused` for a FIFO, a socket or a device, whose reading may never end, and FileNotFoundError."""
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a NUL, or half of a surrogate pair
        raise Refused(f"no file can have this name: {error}") from error
    if not stat.S_ISREG(mode):
        raise Refused("it is a directory" if stat.S_ISDIR(mode) else "it is no plain file")


def read_bytes(path: Path | str, most: int = MOST_BYTES) -> bytes:
    """The file's content. Raises `Refused` where it isn't plain or has more bytes than `most`, and OSError."""
    check_plain(path)
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise Refused(f"it has more than {most:,} bytes, the most that are read of such a file")
    return content


def read_json(path: Path | str, most: int = MOST_BYTES) -> Any:
    """The content of a file of JSON. Raises as `read_bytes` and `parse` do."""
    return parse(read_bytes(path, most))


def read_mapping(path: Path | str, most: int = MOST_BYTES) -> dict[str, Any]:
    """The mapping that a file of JSON holds. Raises as `read_json` does, and ValueError where it holds none."""
    return mapping(read_json(path, most))


def mapping(tree: Any) -> dict[str, Any]:
    """`tree`, a mapping. Raises ValueError where it is none."""
    if not isinstance(tree, dict):
        raise ValueError("it holds no mapping")
    return tree


def parse(content: bytes | str) -> Any:
    """The tree of a text of JSON. Raises ValueError for what is none, is nested too deep or has half of a character,
    and `Refused` for more than `MOST_VALUES`."""
    comma, bracket, brace = (b",", b"[", b"{") if isinstance(content, bytes) else (",", "[", "{")
    num = content.count(comma) + content.count(bracket) + content.count(brace)  # type: ignore[arg-type]
    if num > MOST_VALUES:
        raise Refused(f"it has more than {MOST_VALUES:,} values")
    try:
        tree = json.loads(content)
        if (b"\\u" if isinstance(content, bytes) else "\\u") in content:  # type: ignore[operator]
            json.dumps(tree, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    return tree


@contextmanager
def understood(what: str, where: Path | str) -> Iterator[None]:
    """Raises `UserError` for whatever goes wrong while the tree of a file is made sense of, which may hold anything:
    `what` can't be read of the file `where`."""
    try:
        yield
    except Explained:
        raise
    except (*MALFORMED, AssertionError, RuntimeError) as error:
        check_machine(error, where)
        raise UserError(
            f"{what} can't be read: {in_a_line(error)}",
            where=str(where),
            remedy="take another copy of it, or an older one, from somebody whom you trust",
        ) from error


def in_a_line(error: BaseException) -> str:
    """The kind and the text of an error, short enough for a message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def check_inside(path: str, allowed: Collection[str]) -> None:
    """Raises `Outside` where the file at the absolute `path` lies in none of the directories `allowed` (`places`), once
    links are followed. One that isn't there passes."""
    if "\0" in path:
        raise Refused("it has a name that no file can have")
    folder, name = os.path.split(path)
    real = os.path.realpath(path) if os.path.islink(path) else os.path.join(_real(folder), name)
    if not any(real == place or real.startswith(place + os.sep) for place in allowed):
        raise Outside(f"a link leads out of the dataset's directory, to {real}", _led_to(path))


def _led_to(path: str) -> str:
    """The directory that the last link of a path leads to, or to a file of."""
    while not os.path.islink(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    real = os.path.realpath(path)
    return real if os.path.isdir(real) else os.path.dirname(real)


def places(root: Path, others: Collection[str] = ()) -> tuple[str, ...]:
    """The directories that the files of a dataset in `root` may lie in: that one, the Hub's cache that it is a snapshot
    of, and the `others` that its user names."""
    real = Path(os.path.realpath(root))
    cache = [str(real.parents[1])] if real.parent.name == "snapshots" else []
    return (str(real), *cache, *(os.path.realpath(os.path.expanduser(other)) for other in others))


def links(folder: str) -> Iterator[str]:
    """The links in `folder` and in its folders, which aren't followed."""
    for place, folders, files in os.walk(folder):
        yield from (path for name in (*folders, *files) if os.path.islink(path := os.path.join(place, name)))


@lru_cache(4096)
def _real(folder: str) -> str:
    return os.path.realpath(folder)
