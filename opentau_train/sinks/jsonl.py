"""`metrics.jsonl`: one JSON object a line, `{"step": 10, "time": unix seconds, "attempt": 1, "Training/Loss": 0.4}`.

JSON has no NaN and no infinity: they are written as null. The file is only appended to while a run writes it: each
start is an attempt of its own. It is written anew once, before a resumed run opens it: whoever holds the run directory
then moves the rows after its checkpoint to `metrics.superseded.jsonl`. `read_rows` reads rows of several attempts.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opentau_train.errors import UserError, check_machine
from opentau_train.sinks.base import Sink, SinkContext

FILE = "metrics.jsonl"
ABOUT = ("step", "time", "attempt")
"""The fields of a row that are no numbers of the step."""


def read_rows(run_dir: Path) -> dict[int, dict[str, Any]]:
    """{step: {tag: number}} of a run, in the order of its steps, with the `ABOUT` fields of the step's last row; None
    stands for NaN and infinities. Of a number that several attempts have written the last attempt's counts, and a line
    that a kill has cut off is left out. Raises OSError, and `UserError` for a line that is no row."""
    rows: dict[int, dict[str, Any]] = {}
    for row in sorted(_rows(run_dir / FILE), key=lambda row: (row["step"], row.get("attempt", 0))):
        rows.setdefault(row["step"], {}).update(row)
    return rows


def split(row: Mapping[str, float | None]) -> list[dict[str, float]]:
    """The numbers of a step as they were written: those of the training, then those of its validation; None is NaN."""
    numbers = {tag: math.nan if value is None else value for tag, value in row.items() if tag not in ABOUT}
    validated = {tag: value for tag, value in numbers.items() if tag.startswith(("Validation", "Timing/Validation"))}
    trained = {tag: value for tag, value in numbers.items() if tag not in validated}
    return [part for part in (trained, validated) if part]


def last_validation(run_dir: Path) -> dict[str, Any]:
    """The newest row of a validation pass, read from the file's end; empty where there is none."""
    path = run_dir / FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    whole = (line for line in reversed(lines) if '"Validation' in line and line.endswith("\n"))
    return next((json.loads(line) for line in whole), {})


class JsonlSink(Sink):
    """Appends to `RUN_DIR/metrics.jsonl`; every row is flushed, so that `tail -f` and a killed run show it."""

    def __init__(self, *, context: SinkContext):
        context.run_dir.mkdir(parents=True, exist_ok=True)
        path, attempts = context.run_dir / FILE, [0]
        if path.exists():
            attempts += [row.get("attempt", 0) for row in _rows(path)]
            _supersede(path, path.with_name("metrics.superseded.jsonl"), context.start_step)
        self._attempt = max(attempts) + 1
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, step: int, row: Mapping[str, float]) -> None:
        values = {tag: float(value) if math.isfinite(value) else None for tag, value in row.items()}
        try:
            self._file.write(
                json.dumps({"step": step, "time": time.time(), "attempt": self._attempt, **values}, allow_nan=False)
                + "\n"
            )
        except OSError as error:
            check_machine(error, self._file.name)
            raise

    def close(self) -> None:
        self._file.close()


def _supersede(path: Path, superseded: Path, start_step: int) -> None:
    """Move the rows that this run is about to write again; a run that starts at 0 writes all of them again.

    The moved rows are safe in `superseded` before `path` loses them; a row that a killed attempt has put there
    already isn't put there twice.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    steps = _steps(path, text)
    kept_until = start_step if start_step > 0 else -1
    kept = [line for line, step in steps if step <= kept_until]
    if "".join(kept) == text:
        return
    before = superseded.read_text(encoding="utf-8").splitlines(keepends=True) if superseded.exists() else []
    known = set(before)
    moved = [line for line, step in steps if step > kept_until and line not in known]
    _replace(superseded, before + moved)
    _replace(path, kept)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line, _ in _steps(path, path.read_text(encoding="utf-8", errors="replace"))]


def _steps(path: Path, text: str) -> list[tuple[str, int]]:
    """(line, its step) of every whole line: what follows the last newline was torn off by a kill."""
    lines = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(keepends=True), start=1):
        try:
            lines.append((line, int(json.loads(line)["step"])))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                "a line of the metrics is not a row of metrics",
                where=f"{path}:{number}",
                remedy="remove the line, or move the file away",
            ) from error
    return lines


def _replace(path: Path, lines: list[str]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
