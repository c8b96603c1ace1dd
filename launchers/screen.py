"""Passes on what torchrun prints, without what its agent adds to a mistake that the program has told.

    torchrun ... 2>&1 | python -I screen.py

When a rank ends with an error, torchrun logs that, raises an exception of its own and shows its traceback; the
program's message stands in a box at its end. Where that message is a mistake in configuration or data (`error: ...`,
with its remedy), only the message is passed on. Of anything else every line stays.
"""

from __future__ import annotations

import os
import re
import select

LOGGED = re.compile(rb"[WE]\d{4} .*torch/distributed/(elastic|launcher|run)")
"""A line of the agent's log."""
TRACEBACK, RAISED = (
    b"Traceback (most recent call last):",
    b"torch.distributed.elastic.multiprocessing.errors.ChildFailed",
)
CAUSE, BORDER = b"  traceback : ", b"=========="
IDLE_SECONDS = 0.2
"""Part of a line is passed on when it stays one for so long."""


class Screen:
    """Holds back what may be the agent's last words, until it is clear that they are, or aren't."""

    def __init__(self) -> None:
        self.held: list[bytes] = []
        self.in_traceback = self.in_summary = False
        self.borders = 0

    def line(self, line: bytes) -> bytes:
        """What is to be passed on when `line` has come."""
        if self.in_summary:
            self.held.append(line)
            self.borders += line.startswith(BORDER)
            return self.end() if self.borders == 2 else b""
        if self.in_traceback:
            self.in_summary = line.startswith(RAISED)
            self.in_traceback = not self.in_summary and (line.startswith(b" ") or not line.strip())
            self.held.append(line)
            return b"" if self.in_summary or self.in_traceback else self.release()
        self.in_traceback = line.startswith(TRACEBACK)
        if self.in_traceback or LOGGED.match(line):
            self.held.append(line)
            return b""
        return self.release() + line

    def release(self) -> bytes:
        """What was held back."""
        held, self.held, self.borders = self.held, [], 0
        self.in_traceback = self.in_summary = False
        return b"".join(held)

    def end(self) -> bytes:
        """At the end of the summary: the mistake that is its cause, else all of it."""
        text = self.release()
        _, found, cause = text.rpartition(CAUSE)
        lines = [line.removeprefix(b"  ") for line in cause.split(b"\n")[1:] if not line.startswith(BORDER)]
        told = b"\n".join(lines).strip(b"\n") + b"\n"
        return told if found and told.startswith(b"error: ") else text


def may_wait(part: bytes) -> bool:
    """Whether it can't be told yet what the line will be that `part` begins."""
    return part.startswith((b"W", b"E")) or TRACEBACK.startswith(part[: len(TRACEBACK)])


def main() -> None:
    screen, rest = Screen(), b""
    while True:
        passes = bool(rest) and not screen.held and not may_wait(rest)
        if passes and not select.select([0], [], [], IDLE_SECONDS)[0]:
            write(rest)
            rest = b""
        new = os.read(0, 65536)
        if not new:
            break
        *lines, rest = (rest + new).split(b"\n")
        write(b"".join(screen.line(line + b"\n") for line in lines))
    write((screen.line(rest) if rest else b"") + screen.release())


def write(text: bytes) -> None:
    """All of it, however much a pipe takes at a time."""
    while text:
        text = text[os.write(1, text) :]


if __name__ == "__main__":
    main()
