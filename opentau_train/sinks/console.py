"""Progress for people: bars on a terminal, one line an interval elsewhere, a table after each validation pass.

All of it goes through the program's log, so that `train.log` holds it too.
"""

from __future__ import annotations

import datetime
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from opentau_train.sinks.base import Sink, SinkContext
from opentau_train.sinks.jsonl import last_validation
from opentau_train.sinks.reading import has_terminal
from opentau_train.sinks.stages import SAVE, VALIDATION, Clock, StageBar, stage_of
from opentau_train.sinks.table import SHOWN, headline, table

log = logging.getLogger(__name__)
ROOT = logging.getLogger("opentau_train")

COLUMNS = (
    ("Training/Loss", "loss", "{:.4f}", 8),
    ("Training/Epoch", "epoch", "{:.2f}", 6),
    ("wait", "wait", "{:.0%}", 4),
    ("Training/GradNorm", "grad", "{:.3g}", 8),
    ("Training/LearningRate", "lr", "{:.2e}", 8),
    ("Training/SamplesPerSecond", "samples/s", "{:.0f}", 6),
)
"""(tag, label, format, width), what matters most first: a narrow terminal shows the first ones. `wait` is the share of
a step's time that went by without data."""

LEFT = "LEFT"
ENDS = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<" + LEFT + "]"
"""The bar of a terminal that has room for nothing else. `LEFT` is not tqdm's: its own would take each step for as long
as a validation makes it."""

ONLY_IN_FILE = {"only_in_file": True}
"""Marks a record that the bar shows already."""


class ConsoleSink(Sink):
    """Writes to standard error, so that what a command prints on standard output can be piped."""

    def __init__(self, *, context: SinkContext):
        self._total, self._start = context.total_steps, context.start_step
        self._every = context.config.get("trainer", {}).get("log_every")
        self._clock = Clock(self._start, self._total, _stages_every(context.config))
        self._stage: StageBar | None = None
        self._chance = {term.upper(): math.log(num) for term, num in context.classes.items()}
        self._before = last_validation(context.run_dir) if context.start_step else {}
        self._changes: dict[str, float] = {}
        self._bar: tqdm | None = None
        self._fields: list[str] = []
        self._closing = ExitStack()
        if has_terminal():
            self._bar = tqdm(
                total=context.total_steps, initial=context.start_step, desc=context.run_name, unit="step",
                file=sys.stderr, dynamic_ncols=True, miniters=1, bar_format=ENDS.replace(LEFT, "?"),
            )  # fmt: skip
            self._closing.callback(self._bar.close)
            self._closing.enter_context(logging_redirect_tqdm([ROOT]))  # else a line of the log is glued to the bar
            *others, terminal = ROOT.handlers  # where tqdm has put its own
            terminal.addFilter(lambda record: not hasattr(record, "only_in_file"))
            ROOT.handlers = [terminal, *others]  # the terminal's comes first, as `log.Console` has it

    def advance(self, step: int) -> None:
        """Move the bar. Without one, tell the first step, so that nobody waits an interval to see that it runs."""
        if self._bar is not None:
            self._bar.bar_format = fitting(self._bar, self._fields, tqdm.format_interval(round(self._clock.left(step))))
            self._bar.update(step - self._bar.n)
        elif step == self._start + 1 and self._every != 1:
            seconds = self._clock.now() - self._clock.began
            then = "" if self._every is None else f"; from now on a line every {self._every} steps"
            log.info("step %d/%d taken after %.1f s%s", step, self._total, seconds, then)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        if any(tag.startswith("Training/") for tag in row):
            self._progress(step, row)
        if any(tag.startswith(SHOWN) for tag in row):
            self._end_stage()
            loss = headline(row, self._before, self._changes)
            below = table(row, self._before, self._changes, self._chance, _width())
            log.info("validation at step %d%s\n%s", step, loss and f": {loss}", below)
            self._before, self._changes = dict(row), {}

    def compare(self, changes: Mapping[str, float]) -> None:
        self._changes = dict(changes)

    def stage(self, part: str, done: int, total: int) -> None:
        """Show a validation or a save as a bar of its own, and count its time."""
        stage = stage_of(part)
        if stage != self._clock.stage:
            self._end_stage()
            self._clock.enter(stage)
            if stage is not None and self._bar is not None:
                self._stage = StageBar(stage, self._clock.mean(stage) if stage == SAVE else None)
        if self._stage is not None:
            self._stage.move(done, total)

    def _end_stage(self) -> None:
        if self._stage is not None:
            self._stage.close()
            self._stage = None

    def close(self) -> None:
        self._end_stage()
        self._closing.close()

    def _progress(self, step: int, row: Mapping[str, float]) -> None:
        row = dict(row)
        if row.get("Timing/Step", 0) > 0 and "Timing/DataWait" in row:
            row["wait"] = row["Timing/DataWait"] / row["Timing/Step"]
        parts = [(label, form.format(row[tag]), width) for tag, label, form, width in COLUMNS if tag in row]
        parts.append(("eta", str(datetime.timedelta(seconds=round(self._clock.left(step)))), 8))
        if row.get("Training/SkippedSteps", 0):
            parts.append(("skipped", f"{row['Training/SkippedSteps']:.0f}", 0))
        self._fields = [f"{label} {text}" for label, text, _ in parts if label != "eta"]
        texts = [f"step {step:>{len(str(self._total))}}/{self._total}", *(f"{n} {t:>{w}}" for n, t, w in parts)]
        log.info("  ".join(texts), extra=None if self._bar is None else ONLY_IN_FILE)
        if self._bar is not None:
            self.advance(step)


def _stages_every(config: Mapping[str, Any]) -> dict[str, int | None]:
    """{stage: steps between two}, as `Clock` takes it."""
    validation, save = (config.get(section, {}).get("every") for section in ("validation", "checkpoint"))
    return {VALIDATION: validation or None, SAVE: save}


def fitting(bar: tqdm, fields: Sequence[str], left: str) -> str:
    """The `bar_format` of a line that the terminal's width holds: with as many `fields` as fit, the first ones first,
    beside a bar of ten columns; where not even the run's name fits, without it. `left`: the time until the end."""
    about = {**bar.format_dict, "prefix": bar.desc.removesuffix(": "), "ncols": None, "postfix": None}
    shown, ends = bar.format_dict["ncols"] or 80, ENDS.replace(LEFT, left)
    needed = len(tqdm.format_meter(**{**about, "bar_format": ends.replace("{bar}", "")})) + 10
    name = about["prefix"]
    if needed + len(name) + 1 <= shown // 2:
        ends, needed = "{desc} " + ends, needed + len(name) + 3
    for field in fields:
        needed += len(field) + 2
        if needed > shown:
            break
        ends += "  " + field.replace("{", "{{").replace("}", "}}")
    return ends


def _width() -> int:
    """Columns of the terminal; 80 where there is none."""
    return max(60, os.get_terminal_size(sys.stderr.fileno()).columns) if has_terminal() else 80
