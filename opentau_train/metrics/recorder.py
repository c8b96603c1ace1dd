"""The flight recorder: which samples each step saw on each rank, and each one's losses. `tools/flight.py` reads it.

    RUN/flight/rank00000-000001.jsonl     one line a step; a new file every 16 MiB, the oldest of a rank go

A line holds the step's numbers, `batch` (the first sample number t of its global batch, and the next one's), and one
column a property of this rank's samples, in slot order. Steps are counted as in metrics.jsonl: line N belongs to the
step that made the policy of step N.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from opentau_train.data.batch import Batch
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.order.tape import Tape
from opentau_train.distributed.world import World
from opentau_train.step import StepTaken, TrainState

FOLDER = "flight"
MAX_BYTES = 16 * 2**20
MAX_FILES = 64
"""Files kept a rank: 1 GiB, some 70,000 steps of 256 samples."""


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
        files = files_of(self.folder, self.rank)
        for old in files[: max(0, len(files) + 1 - self.max_files)]:
            old.unlink()
        number = int(files[-1].stem.rpartition("-")[2]) + 1 if files else 1
        path = self.folder / f"rank{self.rank:05d}-{number:06d}.jsonl"
        self._file = open(path, "ab")  # noqa: SIM115 (closed by __exit__)


def _short(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def files_of(folder: Path, rank: int | None = None) -> list[Path]:
    """The recorder's files of one rank, or of all, oldest first a rank."""
    return sorted(folder.glob(f"rank{'*' if rank is None else f'{rank:05d}'}-*.jsonl"))
