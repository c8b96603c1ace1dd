"""A tool's `--out` file: a place that can't be written to is the user's mistake."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from opentau_train.errors import UserError, check_machine


@contextmanager
def writing(path: Path, argument: str = "--out") -> Iterator[None]:
    """Stands around code that makes, opens or writes `path` or its directory: an OSError becomes a `UserError` naming
    it, and the `argument` that gave it."""
    try:
        yield
    except OSError as error:
        check_machine(error, path)
        raise UserError(
            f"can't write {path}: {error.strerror or error}", where=argument, remedy="give a file that can be written"
        ) from error


def check_place(path: Path, argument: str = "--out") -> None:
    """Raises `UserError` where the file or folder `path` can't be made: below what is no directory or can't be written,
    or in a directory at the root of the filesystem that isn't there, which is most often a typing mistake."""
    path = path.absolute()
    there = next(above for above in path.parents if above.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = f"{there} is not a directory" if not there.is_dir() else f"{there} doesn't allow it"
        remedy = "give a place that can be written"
        raise UserError(f"{path} can't be written: {what}", where=argument, remedy=remedy)
    _check_root(path, argument)


def _check_root(path: Path, argument: str) -> None:
    top = Path(path.anchor).joinpath(*path.parts[1:2])
    if len(path.parts) > 2 and not top.exists():
        remedy = f"make it first, or leave out the first '/' of {path}"
        raise UserError(f"there is no directory {top}", where=argument, remedy=remedy)


def make_directory(path: Path, argument: str = "--out") -> None:
    """Make the directory of the file `path`, and those above it, before anything is computed. Raises `UserError`."""
    _check_root(path.absolute(), argument)
    with writing(path, argument):
        path.parent.mkdir(parents=True, exist_ok=True)


def check_format(out: Path) -> None:
    """Raises `UserError` where the file's suffix names no format that pictures can be written in."""
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise UserError(f"{out} names no format of pictures", where="--out", remedy="give a file that ends in .png")


def check_page(out: Path) -> None:
    """Raises `UserError` where the file's suffix isn't a page's."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{out} names no page", where="--out", remedy="give a file that ends in .html")


def check_absent(out: Path, force: bool, argument: str = "--out") -> None:
    """Raises `UserError` where there is such a file, and nobody said that it may be overwritten."""
    if out.exists() and not force:
        raise UserError(f"{out} is there already", where=argument, remedy="name another file, or add --force")
