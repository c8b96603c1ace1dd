"""What the program says to a person: the log's destinations, the mixture's table, what to look at next."""

from __future__ import annotations

import logging
import logging.handlers
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from opentau_train.errors import Explained

ROOT = logging.getLogger("opentau_train")


class Console:
    """The program's log on a terminal, and in a file once the run directory is known (with what came before)."""

    def __init__(self, stream: TextIO, is_main: bool):
        self.is_main = is_main
        level = logging.INFO if is_main else logging.ERROR
        ROOT.setLevel(level)
        ROOT.propagate = False
        self.buffer = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)
        terminal = logging.StreamHandler(stream)
        terminal.setFormatter(logging.Formatter("%(message)s"))
        ROOT.handlers = [terminal, self.buffer]

    def also_to(self, path: Path) -> None:
        """Append to `path` from now on, beginning with all that was logged before. Rank 0 only."""
        if not self.is_main:
            return
        file = logging.FileHandler(path)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.buffer.setTarget(file)
        self.buffer.close()
        ROOT.handlers = [ROOT.handlers[0], file]

    def write_down(self, text: str) -> None:
        """Write an error's text to the file only: the command line itself prints it."""
        record = ROOT.makeRecord(ROOT.name, logging.ERROR, "", 0, text, (), None)
        for handler in ROOT.handlers[1:]:
            handler.handle(record)


@contextmanager
def log_to(stream: TextIO, is_main: bool) -> Iterator[Console]:
    """While inside, the program's log goes to `stream`; an error that leaves is written to the log's file too."""
    before = ROOT.level, ROOT.propagate, ROOT.handlers
    console = Console(stream, is_main)
    try:
        yield console
    except Explained as error:
        console.write_down(str(error))
        raise
    finally:
        handlers = ROOT.handlers
        level, ROOT.propagate, ROOT.handlers = before
        ROOT.setLevel(level)
        for handler in handlers:  # last: a file on a full disk can't be closed without an error
            handler.close()
