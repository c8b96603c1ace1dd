"""What the flight recorder (`metrics/recorder.py`) wrote, read back: the samples of a step and each one's losses."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opentau_train.errors import UserError
from opentau_train.metrics.recorder import FOLDER, files_of

_STEP = re.compile(rb'\{"step":(\d+),')
_COLUMNS = frozenset({"t", "dataset", "episode", "frame", "pass", "weight"})
_KEYS = _COLUMNS | {"step", "rank", "time", "grad_norm", "lr", "datasets", "loss_weights", "batch", "sum", "count"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recorded:
    """One sample of a recorded step. `loss` {term: its mean over the sample's supervised elements}; `share` of the
    step's loss that is this sample's, 1 in all over the global batch."""

    t: int
    rank: int
    dataset: str
    episode: int
    frame: int
    pass_index: int
    weight: float
    loss: dict[str, float]
    share: float


@dataclass(frozen=True)
class RecordedStep:
    """A step as all ranks recorded it: its samples by their number t, and the gradient's norm before clipping;
    `norms` {step: that norm} of the recorded steps around it, too."""

    step: int
    grad_norm: float
    lr: float
    loss: float
    samples: list[Recorded]
    norms: dict[int, float]

    def worst(self, num: int) -> list[Recorded]:
        """The `num` samples with the largest share of the step's loss, worst first; ties by t."""
        return sorted(self.samples, key=lambda s: (-s.share, s.t))[:num]


def read_step(run_dir: Path, step: int, neighbours: int = 0) -> RecordedStep:
    """What the recorder wrote of `step`; where a resumed run did the step again, its last time. `neighbours`: steps
    before and after, whose norms are wanted.

    Garbled lines are passed over with a warning. Raises `UserError` where nothing was recorded.
    """
    around = _lines(run_dir, range(step - neighbours, step + neighbours + 1))
    lines = [line for line in around if line["step"] == step]
    if not lines:
        raise UserError(
            f"step {step} is not in the flight recorder's files",
            where=str(run_dir / FOLDER),
            remedy=f"recorded: {_range(run_dir)}; train with flight_recorder=true to record",
        )
    # A run that was resumed on changed data took other samples for the same step.
    lines = [line for line in lines if line["batch"] == lines[-1]["batch"]]
    rows: dict[int, tuple[dict[str, Any], int]] = {}
    for line in lines:
        rows.update({t: (line, place) for place, t in enumerate(line["t"])})
    return _step(step, [rows[t] for t in sorted(rows)], {line["step"]: line["grad_norm"] for line in around})


@dataclass(frozen=True)
class Losses:
    """All samples that a run recorded, as columns [N]: `step` i64, `dataset` i64 (its place in `names`), `episode` i64
    and `loss` f64: the terms' means of the sample, weighted as training weights the terms."""

    names: tuple[str, ...]
    step: NDArray[np.int64]
    dataset: NDArray[np.int64]
    episode: NDArray[np.int64]
    loss: NDArray[np.float64]


def read_losses(run_dir: Path) -> Losses:
    """The losses of all recorded steps, of a step that a resumed run did again its last time; none where nothing was
    recorded. Garbled lines are passed over with a warning."""
    names: dict[str, int] = {}
    parts = [np.zeros((6, 0))]
    for line in _parsed(run_dir):
        places = np.array([names.setdefault(name, len(names)) for name in line["datasets"]])
        loss = np.zeros(len(line["t"]))
        for term, weight in line["loss_weights"].items():
            total, count = (np.asarray(line[what][term], float) for what in ("sum", "count"))
            loss += weight * np.divide(total, count, out=np.zeros_like(total), where=count > 0)
        step, time = (np.full(len(loss), line[key]) for key in ("step", "time"))
        parts.append(np.stack([step, places[line["dataset"]], line["episode"], loss, time, line["t"]]))
    rows = np.concatenate(parts, axis=1)
    rows = rows[:, np.argsort(-rows[4], kind="stable")]
    _, newest = np.unique(rows[[0, 5]], axis=1, return_index=True)
    rows = rows[:, np.sort(newest)]
    step, dataset, episode, loss = rows[:4, np.isfinite(rows[3]) & (rows[3] > 0)]
    return Losses(tuple(names), step.astype(np.int64), dataset.astype(np.int64), episode.astype(np.int64), loss)


def _lines(run_dir: Path, steps: range) -> list[dict[str, Any]]:
    """The lines of `steps`, oldest first, with a warning of each that is garbled."""
    return sorted(_parsed(run_dir, steps), key=lambda line: line["time"])


def _parsed(run_dir: Path, steps: range | None = None) -> Iterator[dict[str, Any]]:
    """The lines of `steps`, None: of all, with a warning of each that is garbled."""
    for path, number, step, line in _numbered(run_dir):
        if step is None or steps is None or step in steps:
            parsed = None if step is None else _parse(line)
            if parsed is None:
                log.warning("%s, line %d is garbled and passed over", path, number)
            else:
                yield parsed


def _numbered(run_dir: Path) -> Iterator[tuple[Path, int, int | None, bytes]]:
    """(file, line number, step, line) of every line that ends, as that of a killed run may not. The step stands first:
    most lines are passed over without being parsed. None where the line doesn't begin like that."""
    for path in files_of(run_dir / FOLDER):
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    start = _STEP.match(line)
                    yield path, number, int(start.group(1)) if start else None, line


def _parse(line: bytes) -> dict[str, Any] | None:
    """The line as the recorder wrote it; None where it is broken or a column isn't whole."""
    try:
        tree = json.loads(line)
    except ValueError:
        return None
    if not tree.keys() >= _KEYS:
        return None
    terms = (tree["loss_weights"], tree["sum"], tree["count"])
    if not all(isinstance(by_term, dict) and by_term.keys() == terms[0].keys() for by_term in terms):
        return None
    columns = [*(tree[name] for name in _COLUMNS), *tree["sum"].values(), *tree["count"].values()]
    return tree if all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns) else None


def _step(step: int, rows: list[tuple[dict[str, Any], int]], norms: dict[int, float]) -> RecordedStep:
    last = max((line for line, _ in rows), key=lambda line: line["time"])
    weights = last["loss_weights"]
    totals = {k: sum(line["sum"][k][i] for line, i in rows) for k in weights}
    counts = {k: sum(line["count"][k][i] for line, i in rows) for k in weights}
    present = [k for k in weights if counts[k] > 0]
    loss = sum(weights[k] * totals[k] / counts[k] for k in present)
    samples = []
    for line, i in rows:
        loss_of = {k: line["sum"][k][i] / line["count"][k][i] for k in present if line["count"][k][i] > 0}
        part = sum(weights[k] * line["sum"][k][i] / counts[k] for k in present)
        address = (line["datasets"][line["dataset"][i]], line["episode"][i], line["frame"][i], line["pass"][i])
        share = part / loss if loss else 0.0
        samples.append(Recorded(line["t"][i], line["rank"], *address, line["weight"][i], loss_of, share))
    return RecordedStep(step, last["grad_norm"], last["lr"], loss, samples, norms)


def _range(run_dir: Path) -> str:
    """The first and last recorded step, in words."""
    steps = [step for _, _, step, _ in _numbered(run_dir) if step is not None]
    return f"steps {min(steps)} to {max(steps)}" if steps else "nothing"
