"""The errors that users meet, and the exit codes that scripts see.

A `UserError` is a mistake in configuration or data: it is printed once (by rank 0), without a
traceback, and ends the program with `EXIT_USER`. Everything else is a fault and ends with `EXIT_FAULT`; a `Fault` is
one that its message explains, printed in the same form.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import Enum

EXIT_OK = 0
EXIT_FAULT = 1
EXIT_USER = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: a checkpoint is saved, start again with resume=auto
EXIT_INTERRUPTED = 130  # Ctrl-C: a checkpoint is saved


class Explained(Exception):
    """What is wrong, where, and the remedy, in at most three short lines.

    `what` names the thing, `where` the key, dataset, episode or file, `remedy` what to do about it.
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = ""):
        self.what, self.where, self.remedy = what, where, remedy
        lines = [what]
        if where:
            lines.append(f"  where:  {where}")
        if remedy:
            lines.append(f"  remedy: {remedy}")
        super().__init__("\n".join(lines))

    def __reduce__(self):
        return (_rebuild, (type(self), self.what, self.where, self.remedy))


def _rebuild(cls: type[Explained], what: str, where: str, remedy: str) -> Explained:
    """Unpickle with keywords: errors cross process boundaries (loader workers, other ranks)."""
    return cls(what, where=where, remedy=remedy)


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

    def __init__(self, what: str, *, where: str = "", remedy: str = "", teller: Teller = Teller.RANK_0):
        super().__init__(what, where=where, remedy=remedy)
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
