"""Where the program's log goes: a terminal, and a file of the run."""

from __future__ import annotations

import logging
import logging.handlers
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from opentau_train.errors import Explained, check_machine

ROOT = logging.getLogger("opentau_train")


class LogFile(logging.FileHandler):
    """Appends to a file. An error of the disk is kept for `check`: whoever logs isn't to end by it."""

    error: OSError | None = None

    def handleError(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`, which would print a traceback."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        else:
            self.error = self.error or error

    def check(self) -> None:
        """Raises what kept a line out of the file, if anything did."""
        if self.error is not None:
            check_machine(self.error, self.baseFilename)
            raise self.error


class Console:
    """The program's log on a terminal, and in a file once the run directory is known (with what came before)."""

    def __init__(self, stream: TextIO, is_main: bool):
        self.is_main = is_main
        self.file: LogFile | None = None
        level = logging.INFO if is_main else logging.ERROR
        ROOT.setLevel(level)
        ROOT.propagate = False
        self.buffer = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)
        terminal = logging.StreamHandler(stream)
        terminal.setFormatter(logging.Formatter("%(message)s"))
        ROOT.handlers = [terminal, self.buffer]

    def also_to(self, path: Path) -> None:
        """Append to `path` from now on, beginning with all that was logged before. Rank 0 only. Raises `Fault`, as
        `check` does from then on, where it can't be written."""
        if not self.is_main:
            return
        try:
            self.file = file = LogFile(path)
        except OSError as error:
            check_machine(error, path)
            raise
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.buffer.setTarget(file)
        self.buffer.close()
        ROOT.handlers = [ROOT.handlers[0], file]

    def check(self) -> None:
        """Raises what kept a line out of the file, if anything did."""
        if self.file is not None:
            self.file.check()

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
        console.check()
    except Explained as error:
        console.write_down(str(error))
        raise
    finally:
        handlers = ROOT.handlers
        level, ROOT.propagate, ROOT.handlers = before
        ROOT.setLevel(level)
        for handler in handlers:
            with suppress(OSError):  # of a disk that was full before: `check` has told
                handler.close()
