"""How a reader opens a file: as it lies on this machine, or after somebody has brought it here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

T = TypeVar("T")


class Opener(Protocol):
    """`opener(path, open)` is what `open(path)` gives, the file being at `path` by then. Raises what `open` raises, and
    OSError for a file that can't be had."""

    def __call__(self, path: Path, open: Callable[[Path], T]) -> T: ...


def open_here(path: Path, open: Callable[[Path], T]) -> T:
    """The `Opener` of files that lie on this machine."""
    return open(path)
