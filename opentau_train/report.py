"""What the program says to a person: the log's destinations, the mixture's table, what to look at next."""

from __future__ import annotations

import logging
import logging.handlers
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import yaml

from opentau_train.data.mixture import Dataset, Mixture
from opentau_train.errors import Explained, UserError
from opentau_train.evaluate import ValidationPlan

ROOT = logging.getLogger("opentau_train")


class Console:
    """The program's log on a terminal, and in a file once the run directory is known (with what came before)."""

    def __init__(self, stream: TextIO, is_main: bool):
        self.is_main = is_main
        level = logging.INFO if is_main else logging.ERROR
        ROOT.setLevel(level)
        ROOT.propagate = False
        self.buffer = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)
        shown = logging.StreamHandler(stream)
        shown.setFormatter(logging.Formatter("%(message)s"))
        ROOT.handlers = [shown, self.buffer]

    def also_to(self, path: Path) -> None:
        """Append to `path` from now on, beginning with all that was logged before. Rank 0 only."""
        if not self.is_main:
            return
        file = logging.FileHandler(path)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.buffer.setTarget(file)
        self.buffer.close()
        ROOT.handlers = [ROOT.handlers[0], file]

    def write_down(self, text: str) -> None:
        """In the file only: an error's text, which the command line itself prints."""
        record = ROOT.makeRecord(ROOT.name, logging.ERROR, "", 0, text, (), None)
        for handler in ROOT.handlers[1:]:
            handler.handle(record)


@contextmanager
def log_to(stream: TextIO, is_main: bool) -> Iterator[Console]:
    before = ROOT.level, ROOT.propagate, ROOT.handlers
    console = Console(stream, is_main)
    try:
        yield console
    except Explained as error:
        console.write_down(str(error))
        raise
    finally:
        for handler in ROOT.handlers:
            handler.close()
        level, ROOT.propagate, ROOT.handlers = before
        ROOT.setLevel(level)


def begin_run(run_dir: Path, tree: dict[str, Any]) -> None:
    """Make the run directory and write down what runs. Raises `UserError` where it can't be written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(as_yaml(tree))
    except OSError as error:
        raise UserError(
            f"the run directory can't be written: {error}",
            where=str(run_dir),
            remedy="set paths.run_dir, or paths.root, to a directory that you can write",
        ) from error


def mixture_table(mixture: Mixture, plan: ValidationPlan, num_parameters: int) -> str:
    """The start's summary: a line a source, then the batch's shape."""
    head = ("source", "episodes", "val", "windows", "weight", "share", "windows/epoch", "control mode", "cameras")
    total = sum(mixture.draws)
    rows: list[tuple[str, ...]] = [head]
    for dataset, drawn in zip(mixture.datasets, mixture.draws, strict=True):
        modes = sorted({mixture.groups[g].control_mode for g in np.unique(dataset.group_of)})
        rows.append(
            (
                dataset.name,
                str(len(dataset.source.episodes)),
                str(int(dataset.held_out.sum())),
                str(dataset.train.num_windows),
                weight_cell(dataset, drawn),
                f"{drawn / max(total, 1):.1%}",
                str(drawn),
                ",".join(modes),
                ",".join(dataset.source.cameras) or "none",
            )
        )
    spec = mixture.spec
    return "\n".join(
        [
            *align(rows),
            f"batch: state {spec.state_dim}, actions {spec.chunk_length} x {spec.action_dim}, "
            f"{len(spec.cameras)} cameras {spec.image_size[0]}x{spec.image_size[1]}, history {spec.history}; "
            f"validation: {len(plan.windows)} windows; policy: {num_parameters / 1e6:.2f} M parameters",
        ]
    )


def weight_cell(dataset: Dataset, drawn: int) -> str:
    """A dataset's weight in a table: the configured one, or what it is without one. `drawn` windows an epoch."""
    if dataset.settings.weight is not None:
        return f"{dataset.settings.weight:g}"
    return "natural" if drawn else "validation"


def align(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of cells as lines with columns of equal width."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def next_steps(run_dir: Path, step: int, stop: int, num_bad: int) -> str:
    """The last words: where everything is and what to look at. `num_bad`: windows that were replaced."""
    said = {0: f"finished at step {step}", 1: f"preempted at step {step}", 2: f"interrupted at step {step}"}[stop]
    lines = [f"{said}. Run directory: {run_dir}"]
    if (run_dir / "tensorboard").is_dir():
        lines.append(f"  curves:      tensorboard --logdir {run_dir}/tensorboard")
    lines.append(f"  numbers:     {run_dir}/metrics.jsonl")
    lines.append(f"  checkpoint:  {run_dir}/checkpoints/last (weights in pretrained_model/)")
    if num_bad:
        lines.append(f"  unreadable:  {num_bad} windows were replaced by others, see {run_dir}/quarantine.jsonl")
    if stop:
        lines.append(f"  go on with:  the same command and resume=auto paths.run_dir={run_dir}")
    return "\n".join(lines)


def as_yaml(tree: dict[str, Any]) -> str:
    """A plain configuration tree as YAML, keys in the order they were composed."""
    return yaml.safe_dump(tree, sort_keys=False)
