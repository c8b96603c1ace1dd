"""Progress for people: a bar on a terminal, one line an interval elsewhere, a table after each validation pass."""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from tqdm import tqdm

from opentau_train.sinks.base import Sink, SinkContext

VALIDATION = "Validation/"
COLUMNS = (
    ("Training/Loss", "loss", "{:.4f}"),
    ("Training/GradNorm", "grad", "{:.3g}"),
    ("Training/LearningRate", "lr", "{:.2e}"),
    ("Training/SamplesPerSecond", "samples/s", "{:.0f}"),
)


class ConsoleSink(Sink):
    """Writes to standard error, so that what a command prints on standard output can be piped."""

    def __init__(self, *, context: SinkContext):
        self._total, self._start, self._began = context.total_steps, context.start_step, time.monotonic()
        self._last_pass: dict[str, float] = {}
        self._bar: tqdm | None = None
        if _has_terminal():
            self._bar = tqdm(
                total=context.total_steps, initial=context.start_step, desc=context.run_name, unit="step",
                file=sys.stderr, dynamic_ncols=True,
            )  # fmt: skip

    def write(self, step: int, row: Mapping[str, float]) -> None:
        if any(tag.startswith("Training/") for tag in row):
            self._progress(step, {label: form.format(row[tag]) for tag, label, form in COLUMNS if tag in row}, row)
        scores = read_scores(row)
        if scores:
            self._print(f"validation at step {step}\n{table(scores, self._last_pass)}")
            self._last_pass = {f"{s.group}/{s.term}": s.value for s in scores}

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _progress(self, step: int, parts: dict[str, str], row: Mapping[str, float]) -> None:
        if row.get("Training/SkippedSteps", 0):
            parts["skipped"] = f"{row['Training/SkippedSteps']:.0f}"
        if self._bar is not None:
            self._bar.set_postfix(parts, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        seconds = (time.monotonic() - self._began) / max(step - self._start, 1) * (self._total - step)
        parts["eta"] = str(datetime.timedelta(seconds=round(seconds)))
        self._print("  ".join([f"step {step}/{self._total}", *(f"{label} {text}" for label, text in parts.items())]))

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)


def _has_terminal() -> bool:
    """Whether a bar can be drawn: some containers give a terminal without a width, where it would stay empty."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


@dataclass(frozen=True)
class Score:
    """One number of a validation pass: `group` is `dataset/control_mode`, "" for the mixture; `num` and `stderr` are
    None where the row doesn't tell them."""

    group: str
    term: str
    value: float
    num: float | None
    stderr: float | None


def read_scores(row: Mapping[str, float]) -> list[Score]:
    """The scores among the tags of a row, in its order; `/N` and `/StdErr` tags belong to the score before them."""
    scores = []
    for tag, value in row.items():
        if tag.startswith(VALIDATION) and not tag.endswith(("/N", "/StdErr")):
            group, _, term = tag.removeprefix(VALIDATION).rpartition("/")
            scores.append(Score(group, term, value, row.get(f"{tag}/N"), row.get(f"{tag}/StdErr")))
    return scores


def table(scores: list[Score], before: Mapping[str, float]) -> str:
    """An aligned table, one line a group and the mixture last: N, each term with its standard error, and the change
    against `before` ({`group/term`: value} of the last pass)."""
    groups = sorted({s.group for s in scores}, key=lambda group: (group == "", group))
    terms = list(dict.fromkeys(s.term for s in scores))
    cells = {(s.group, s.term): s for s in scores}
    lines = [["group", "N", *(label for term in terms for label in (term, "change"))]]
    for group in groups:
        nums = [s.num for s in scores if s.group == group and s.num is not None]
        line = [group or "mixture", f"{max(nums):.0f}" if nums else ""]
        for term in terms:
            line += _cell(cells.get((group, term)), before)
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )


def _cell(score: Score | None, before: Mapping[str, float]) -> tuple[str, str]:
    if score is None:
        return "", ""
    last = before.get(f"{score.group}/{score.term}")
    value = f"{score.value:.5f}" if score.stderr is None else f"{score.value:.5f} ± {score.stderr:.5f}"
    return value, "" if last is None else f"{score.value - last:+.5f}"
