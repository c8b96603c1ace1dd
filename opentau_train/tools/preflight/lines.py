"""One line a thing that was looked at: ok, warning or error. Each check gives lines; its mistakes are some, too.

All of it runs on a login node: nothing needs a device, and what only one could tell is said to be unknown.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from opentau_train.data.mixture.table import align
from opentau_train.errors import Explained
from opentau_train.log import ROOT

Status = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Line:
    """One thing that was looked at. `where` and `remedy` as in errors."""

    name: str
    status: Status
    text: str
    where: str = ""
    remedy: str = ""

    @classmethod
    def of(cls, name: str, error: Explained) -> Line:
        """The line of a mistake."""
        return cls(name, "error", error.what, error.where, error.remedy)


def table(lines: Sequence[Line]) -> str:
    """The lines as text, aligned; remedies below those that aren't ok."""
    rows = align([(line.name, line.status, line.text) for line in lines])
    shown = []
    for row, line in zip(rows, lines, strict=True):
        shown.append(row)
        if line.status != "ok":
            shown += [
                f"  {key + ':':8}{text}" for key, text in (("where", line.where), ("remedy", line.remedy)) if text
            ]
    return "\n".join(shown)


@contextmanager
def collected(name: str, lines: list[Line]) -> Iterator[None]:
    """Inside, the log's warnings become `lines` of that `name`, instead of going where the log goes."""
    before = ROOT.handlers

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                what, _, remedy = record.getMessage().partition("\n  remedy: ")
                lines.append(Line(name, "warning", what.replace("\n", " "), remedy=remedy))
            else:
                for handler in before:
                    handler.handle(record)

    ROOT.handlers = [Collect()]
    try:
        yield
    finally:
        ROOT.handlers = before


def tried(name: str, call: Callable[[], Sequence[Line]]) -> list[Line]:
    """The lines of `call`, after the warnings that it logs, or that of its mistake."""
    lines: list[Line] = []
    try:
        with collected(name, lines):
            lines += call()
    except Explained as error:
        lines.append(Line.of(name, error))
    return lines
