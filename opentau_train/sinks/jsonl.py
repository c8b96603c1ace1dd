"""`metrics.jsonl`: one JSON object a line, `{"step": 10, "time": unix seconds, "Training/Loss": 0.4, ...}`.

JSON has no NaN and no infinity: they are written as null. A resumed run moves the rows after its checkpoint to
`metrics.superseded.jsonl`, so that `metrics.jsonl` tells every step once.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

from opentau_train.errors import UserError, check_machine
from opentau_train.sinks.base import Sink, SinkContext


class JsonlSink(Sink):
    """Appends to `RUN_DIR/metrics.jsonl`; every row is flushed, so that `tail -f` and a killed run show it."""

    def __init__(self, *, context: SinkContext):
        context.run_dir.mkdir(parents=True, exist_ok=True)
        path = context.run_dir / "metrics.jsonl"
        if path.exists():
            _supersede(path, path.with_name("metrics.superseded.jsonl"), context.start_step)
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, step: int, row: Mapping[str, float]) -> None:
        values = {tag: float(value) if math.isfinite(value) else None for tag, value in row.items()}
        try:
            self._file.write(json.dumps({"step": step, "time": time.time(), **values}, allow_nan=False) + "\n")
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


def _steps(path: Path, text: str) -> list[tuple[str, int]]:
    """(line, its step) of every whole line: what follows the last newline was torn off by a kill."""
    lines = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(keepends=True), start=1):
        try:
            lines.append((line, int(json.loads(line)["step"])))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                "a line of the metrics is not a row of metrics, so the run can't be continued in it",
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
