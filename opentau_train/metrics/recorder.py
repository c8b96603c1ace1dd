"""The flight recorder: which samples each step saw on each rank, and each one's losses. `tools/why.py` reads it.

    RUN/flight/rank00000-000001.jsonl     one line a step; a new file every 16 MiB, the oldest of a rank go

A line holds the step's numbers, `batch` (the first sample number t of its global batch, and the next one's), and one
column a property of this rank's samples, in slot order. Steps are counted as in metrics.jsonl: line N belongs to the
step that made the policy of step N.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from opentau_train.data.batch import Batch
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.order.tape import Tape
from opentau_train.distributed.world import World
from opentau_train.errors import UserError
from opentau_train.step import StepTaken, TrainState

FOLDER = "flight"
MAX_BYTES = 16 * 2**20
MAX_FILES = 64
"""Files kept a rank: 1 GiB, some 70,000 steps of 256 samples."""
_STEP = re.compile(rb'\{"step":(\d+),')
_COLUMNS = frozenset({"t", "dataset", "episode", "frame", "pass", "weight"})
_KEYS = _COLUMNS | {"step", "rank", "time", "grad_norm", "lr", "datasets", "loss_weights", "batch", "sum", "count"}

log = logging.getLogger(__name__)


class FlightRecorder:
    """Writes one rank's lines into `run_dir/flight`. Each line is flushed, so that a killed run has all its steps."""

    def __init__(
        self,
        run_dir: Path,
        tape: Tape,
        mixture: Mixture,
        world: World,
        *,
        max_bytes: int = MAX_BYTES,
        max_files: int = MAX_FILES,
    ):
        self.folder, self.tape, self.rank = run_dir / FOLDER, tape, world.rank
        self.share = world.data_rank, world.data_size
        self.datasets = [d.name for d in mixture.datasets]
        self.max_bytes, self.max_files = max_bytes, max_files
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open_next()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, state: TrainState, batch: Batch, taken: StepTaken) -> None:
        """Record that the step which led to `state` trained on this rank's `batch`, with the losses of `taken`,
        which it waits for on an accelerator."""
        if self._file.tell() > self.max_bytes:
            self._file.close()
            self._open_next()
        terms, order = taken.losses[0][1], taken.rows.argsort()
        (windows,) = self.tape.owned(range(state.step - 1, state.step), *self.share, 0, 1)
        pairs = {
            name: [torch.cat([micro[name][i].detach().cpu() for _, micro in taken.losses])[order] for i in range(2)]
            for name in terms
        }
        line = {
            "step": state.step,
            "rank": self.rank,
            "time": time.time(),
            "grad_norm": float(taken.grad_norm),
            "lr": taken.lr,
            "datasets": self.datasets,
            "loss_weights": state.policy.loss_weights,
            "batch": [self.tape.first_sample(state.step - 1), self.tape.first_sample(state.step)],
            "t": windows.t.tolist(),
            "dataset": batch.dataset_index.tolist(),
            "episode": batch.episode_index.tolist(),
            "frame": batch.frame_index.tolist(),
            "pass": batch.pass_index.tolist(),
            "weight": batch.weight.tolist(),
            "sum": {name: _short(total) for name, (total, _) in pairs.items()},
            "count": {name: _short(count) for name, (_, count) in pairs.items()},
        }
        self._file.write((json.dumps(line, separators=(",", ":")) + "\n").encode())
        self._file.flush()

    def _open_next(self) -> None:
        files = _files(self.folder, self.rank)
        for old in files[: max(0, len(files) + 1 - self.max_files)]:
            old.unlink()
        number = int(files[-1].stem.rpartition("-")[2]) + 1 if files else 1
        path = self.folder / f"rank{self.rank:05d}-{number:06d}.jsonl"
        self._file = open(path, "ab")  # noqa: SIM115 (closed by __exit__)


def _short(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def _files(folder: Path, rank: int | None = None) -> list[Path]:
    """The recorder's files, oldest first a rank."""
    return sorted(folder.glob(f"rank{'*' if rank is None else f'{rank:05d}'}-*.jsonl"))


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


def _lines(run_dir: Path, steps: range) -> list[dict[str, Any]]:
    """The lines of `steps`, oldest first, with a warning of each that is garbled."""
    parsed_lines = []
    for path, number, step, line in _numbered(run_dir):
        if step is None or step in steps:
            parsed = None if step is None else _parse(line)
            if parsed is None:
                log.warning("%s, line %d is garbled and passed over", path, number)
            else:
                parsed_lines.append(parsed)
    return sorted(parsed_lines, key=lambda line: line["time"])


def _numbered(run_dir: Path) -> Iterator[tuple[Path, int, int | None, bytes]]:
    """(file, line number, step, line) of every line that ends, as that of a killed run may not. The step stands first:
    most lines are passed over without being parsed. None where the line doesn't begin like that."""
    for path in _files(run_dir / FOLDER):
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
