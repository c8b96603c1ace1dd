"""Where the numbers go: a `Sink` receives rows of tagged scalars, `Sinks` hands each row to all of them.

Only rank 0 has sinks. Tags: `Training/Loss`, `Training/MSE`, `Training/GradNorm`, `Training/LearningRate`,
`Training/SamplesPerSecond`, ...; `Validation/{dataset}/{control_mode}/{MSE,CE}` with `/N` and `/StdErr` appended for
its sample count and standard error; `Validation/{MSE,CE,Loss}` for the mixture.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.names import fits

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SinkContext:
    """What every sink is told about the run. `start_step` optimizer steps were done before this process began (0 for
    a new run); `config` is the composed configuration as plain dicts, lists and scalars."""

    run_dir: Path
    run_name: str
    total_steps: int
    start_step: int
    config: dict[str, Any]
    classes: Mapping[str, int] = field(default_factory=dict)
    """{loss term that is a cross-entropy: among how many classes}"""


class Sink(Protocol):
    """Built as `Class(context=..., **options of its YAML)`. A subclass overrides the methods for what it can show.

    A resumed run repeats the steps after its checkpoint: a sink shows each step once, from whichever attempt.
    `before_data`: it needs nothing of the data and the policy, and takes long to start or may be refused: it is opened
    before they are.
    """

    before_data: ClassVar[bool] = False

    @classmethod
    def check(cls) -> None:
        """Raises `UserError` where this machine has no such sink: asked before the data are opened."""
        return None  # not abstract: most have nothing to look at

    def advance(self, step: int) -> None:
        """An optimizer step was taken; its scalars come only once an interval."""

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """The scalars of one optimizer step (1 = after the first). A step may come in several rows."""

    def stage(self, part: str, done: int, total: int) -> None:
        """A part of the run begins ("save", "validation", "data wait", ...), or `done` of its `total` pieces are; 0 of
        0 where it has none. Called several times a step."""

    def compare(self, changes: Mapping[str, float]) -> None:
        """How the next row's validation differs from the pass before: {tag: difference}, and beside it the standard
        error of that, {tag/StdErr: ...}, from paired differences. Of the losses only, and not where it isn't known."""

    def image(self, step: int, tag: str, array: NDArray[np.uint8]) -> None:
        """A picture: `array` [H, W, 3] uint8 RGB."""

    def text(self, tag: str, text: str) -> None:
        """A text that belongs to the run as a whole, Markdown."""

    def flush(self) -> None:
        """What was written so far must survive a kill: a checkpoint follows, and a run resumed from it sends the steps
        up to it no second time."""

    def close(self) -> None:
        """Everything is on disk or sent when this returns. Called once."""


class Sinks(Sink):
    """Hands everything to each of `sinks`, in order; as a context manager it closes them, the last one first.

    All of them are closed even when one fails to, and the failure is raised afterwards.
    """

    def __init__(self, sinks: list[Sink]):
        self.sinks = sinks
        self._closing = ExitStack()
        for sink in sinks:
            self._closing.callback(sink.close)

    def advance(self, step: int) -> None:
        for sink in self.sinks:
            sink.advance(step)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        for sink in self.sinks:
            sink.write(step, row)

    def stage(self, part: str, done: int, total: int) -> None:
        for sink in self.sinks:
            sink.stage(part, done, total)

    def compare(self, changes: Mapping[str, float]) -> None:
        for sink in self.sinks:
            sink.compare(changes)

    def image(self, step: int, tag: str, array: NDArray[np.uint8]) -> None:
        for sink in self.sinks:
            sink.image(step, tag, array)

    def text(self, tag: str, text: str) -> None:
        for sink in self.sinks:
            sink.text(tag, text)

    def flush(self) -> None:
        for sink in self.sinks:
            sink.flush()

    def close(self) -> None:
        self._closing.close()

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            self._closing.close()
        except OSError as lost:
            if error is None:
                raise
            log.warning("the last numbers are lost: %s", lost)  # the error that ends the run is told, not this one


def of_groups(row: Mapping[str, float], groups: Sequence[str] | None) -> dict[str, float]:
    """The numbers of a row that a tracker is sent: those of the mixture, and of the groups (what stands in a tag before
    the term, such as `droid/joint` or a norm head) that fit one of the patterns `groups`; all where it is None."""
    if groups is None:
        return dict(row)

    @cache
    def is_chosen(group: str) -> bool:
        return not group or any(fits(group, pattern) for pattern in groups)

    return {tag: value for tag, value in row.items() if is_chosen(_group_of(tag))}


def _group_of(tag: str) -> str:
    """`dataset/control_mode` of `Validation/dataset/control_mode/MSE/N`; "" of a number of the mixture."""
    return "/".join(tag.removesuffix("/N").removesuffix("/StdErr").split("/")[1:-1])
