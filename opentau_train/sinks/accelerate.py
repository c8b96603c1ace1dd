"""Experiment trackers, through accelerate's tracker classes: W&B, MLflow, trackio, SwanLab, TensorBoard."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from numpy.typing import NDArray

from opentau_train.errors import UserError
from opentau_train.sinks.base import Sink, SinkContext

WITH_IMAGES = ("wandb", "swanlab")


class TrackerSink(Sink):
    """One run of `tracker` in its `project` (MLflow: experiment). `options` go to the tracker's own `init`.

    A resumed run continues the same tracker run. The steps between its checkpoint and the kill are sent again: MLflow
    and trackio keep both, W&B keeps the first, and as a resume is exact the two are equal. Images go to W&B and
    SwanLab; the configuration is stored as the run's parameters, with dotted keys. MLflow's names are `mlflow_name`'s.

    Accelerate's process state is used as it stands: in a run of several processes the program has made it before.
    Raises `UserError` when the tracker's package is missing.
    """

    def __init__(
        self,
        *,
        context: SinkContext,
        tracker: Literal["wandb", "mlflow", "trackio", "swanlab", "tensorboard"],
        project: str,
        options: dict[str, Any] | None = None,
    ):
        if tracker not in {str(name.value) for name in get_available_trackers()}:
            raise UserError(
                f"the tracker '{tracker}' needs the Python package '{tracker}', which is not installed",
                where=f"logger.{tracker}",
                remedy=f"pip install {tracker}, or leave it out of logger=[...]",
            )
        PartialState()  # accelerate's trackers log through it
        self._tracker = _make(tracker, project, options or {}, context)
        # Only rank 0 builds sinks, so every call is the main process's own.
        self._tracker.main_process_only = False
        self._tracker.start()
        if tracker == "mlflow":
            _mlflow_id(context.run_dir).write_text(self._tracker.tracker.info.run_id)
        self._name = mlflow_name if tracker == "mlflow" else str
        self._with_images = tracker in WITH_IMAGES
        self._tracker.store_init_configuration(flatten(context.config))

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self._tracker.log({self._name(tag): float(value) for tag, value in row.items()}, step=step)

    def image(self, step: int, tag: str, array: NDArray[np.uint8]) -> None:
        if self._with_images:
            self._tracker.log_images({tag: [array]}, step=step)

    def close(self) -> None:
        self._tracker.finish()


def run_id(run_dir: Path) -> str:
    """16 hexadecimal digits that name a run directory: the same after a restart, another for another directory."""
    return hashlib.blake2b(str(run_dir.resolve()).encode(), digest_size=8).hexdigest()


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """{`a.b.c`: scalar} of a nested configuration; lists and nulls as text."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def mlflow_name(tag: str) -> str:
    """`Validation/MSE/N` -> `Validation/MSE.N`: MLflow's file store keeps a metric in a file named by its tag, and
    `Validation/MSE` can't be a file and a directory."""
    head, _, last = tag.rpartition("/")
    return f"{head}.{last}" if last in ("N", "StdErr") else tag


def _make(tracker: str, project: str, options: dict[str, Any], context: SinkContext) -> GeneralTracker:
    """The tracker, not started, told how to find its run again when it is resumed."""
    identity = run_id(context.run_dir)
    if tracker == "mlflow":
        known = _mlflow_id(context.run_dir)
        continued = {"run_id": known.read_text().strip()} if known.exists() else {"run_name": context.run_name}
        return LOGGER_TYPE_TO_CLASS[tracker](experiment_name=project, **{**continued, **options})
    own: dict[str, Any] = {
        "wandb": {"id": identity, "name": context.run_name, "resume": "allow", "dir": str(context.run_dir)},
        "trackio": {"name": f"{context.run_name}-{identity[:8]}", "resume": "allow"},
        "swanlab": {"id": identity, "experiment_name": context.run_name, "resume": "allow"},
        "tensorboard": {"logging_dir": str(context.run_dir)},
    }[tracker]
    return LOGGER_TYPE_TO_CLASS[tracker](run_name=project, **{**own, **options})


def _mlflow_id(run_dir: Path) -> Path:
    """MLflow gives out its run ids itself: this file keeps ours."""
    return run_dir / "mlflow_run_id"
