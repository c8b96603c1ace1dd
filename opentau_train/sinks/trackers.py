"""Experiment trackers, through accelerate's tracker classes: W&B, MLflow, trackio, SwanLab, TensorBoard."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from numpy.typing import NDArray

from opentau_train.errors import UserError
from opentau_train.sinks.base import Sink, SinkContext
from opentau_train.sinks.wandb import Steps
from opentau_train.threads import Background, first_line

log = logging.getLogger(__name__)

WITH_IMAGES = ("wandb", "swanlab")

START_SECONDS = 120.0
"""How long a tracker may take to start: longer than its own attempts, which end with a reason."""

WANDB_INIT_SECONDS = 30.0

REMEDY = {
    "wandb": "wandb login (or WANDB_API_KEY), or logger.wandb.options.mode=offline to upload later with wandb sync",
    "mlflow": "look at MLFLOW_TRACKING_URI and its server",
}


class TrackerSink(Sink):
    """One run of `tracker` in its `project` (MLflow: experiment). `options` go to the tracker's own `init`.

    A resumed run continues the same tracker run. The steps between its checkpoint and the kill are sent again: MLflow
    and trackio keep both, W&B keeps the first, and as a resume is exact the two are equal. Online, W&B is also sent
    what it lacks of the steps before; offline, each start leaves a part with the same run id, and a part that W&B could
    not finish (its own process was killed too) is repeated in the next one. Images go to W&B and SwanLab; the
    configuration is stored as the run's parameters, with dotted keys. MLflow's names are `mlflow_name`'s.

    Training never waits for the tracker: the calls are made on a thread, the first one that fails is told in a warning
    and ends them, and at the end they have `close_seconds`. `metrics.jsonl` has every row all the same.

    Accelerate's process state is used as it stands: in a run of several processes the program has made it before.
    Raises `UserError` when the tracker's package is missing, or when it can't be started for a new run. It has worked
    for a run that is resumed: there W&B goes on offline and any other tracker is left out, with a warning.
    """

    def __init__(
        self,
        *,
        context: SinkContext,
        tracker: Literal["wandb", "mlflow", "trackio", "swanlab", "tensorboard"],
        project: str,
        options: dict[str, Any] | None = None,
        close_seconds: float = 20.0,
    ):
        self._kind, self._project, self._context = tracker, project, context
        self._close_seconds = close_seconds
        self._last_step = context.start_step
        self._remedy = f"{REMEDY.get(tracker, 'look at its server')}, or leave it out of logger=[...]"
        if tracker not in {str(name.value) for name in get_available_trackers()}:
            raise UserError(
                f"the tracker '{tracker}' needs the Python package '{tracker}', which is not installed",
                where=f"logger.{tracker}",
                remedy=f"pip install {tracker}, or leave it out of logger=[...]",
            )
        PartialState()  # accelerate's trackers log through it
        self._name = mlflow_name if tracker == "mlflow" else str
        self._steps: Steps | None = None
        self._calls: Background | None = None
        self._tracker: GeneralTracker
        attempts: list[dict[str, Any]] = [options or {}]
        if tracker == "wandb" and context.start_step > 0:
            attempts.append({**attempts[0], "mode": "offline"})
        for number, attempt in enumerate(attempts, start=1):
            calls = Background(tracker, f"the numbers are in {context.run_dir / 'metrics.jsonl'}")
            try:
                if number > 1:
                    calls.ask(_stop_wandb, START_SECONDS)
                calls.ask(partial(self._start, attempt), START_SECONDS)
                if self._steps is not None and context.start_step > 0:
                    calls.post(partial(self._catch_up, 0 if self._steps.online else self._kept_step()))
            except Exception as error:
                # Broad, and not to be split: each tracker raises classes of its own, which can't be imported where it
                # isn't installed. None is swallowed: a first start ends with it, a resumed one warns of it.
                calls.abandon()
                self._cannot_start(error, last=number == len(attempts))
            else:
                self._calls = calls
                return

    def write(self, step: int, row: Mapping[str, float]) -> None:
        values = {self._name(tag): float(value) for tag, value in row.items()}
        self._last_step = step
        self._post(lambda: self._log(step, values))

    def image(self, step: int, tag: str, array: NDArray[np.uint8]) -> None:
        if self._kind in WITH_IMAGES:
            self._post(lambda: self._log_image(step, tag, array))

    def close(self) -> None:
        if self._calls is not None:
            self._calls.post(lambda: self._tracker.finish())
            if self._calls.close(self._close_seconds) and not self._calls.failed and self._kind == "wandb":
                _wandb_kept(self._context.run_dir).write_text(f"{self._last_step}\n")

    def _post(self, call: Callable[[], object]) -> None:
        if self._calls is not None:
            self._calls.post(call)

    # -- on the thread -----------------------------------------------------------------------------------------------

    def _start(self, options: dict[str, Any]) -> None:
        if self._kind == "wandb":
            options = {**options, "settings": {**_wandb_settings(self._close_seconds), **options.get("settings", {})}}
        tracker = _make(self._kind, self._project, options, self._context)
        # Only rank 0 builds sinks, so every call is the main process's own.
        tracker.main_process_only = False
        tracker.start()
        known = _mlflow_id(self._context.run_dir)
        again = self._kind == "mlflow" and known.exists()  # MLflow refuses a parameter that has changed
        if self._kind == "mlflow":
            known.write_text(tracker.tracker.info.run_id)
        if self._kind == "wandb":
            self._steps = Steps(tracker.tracker)
        if not again:
            tracker.store_init_configuration(flatten(self._context.config))
        self._tracker = tracker

    def _log(self, step: int, values: dict[str, float]) -> None:
        if self._steps is None:
            self._tracker.log(values, step=step)
        elif (place := self._steps.place(step, values)) is not None:
            self._tracker.log(values, step=place)

    def _log_image(self, step: int, tag: str, array: NDArray[np.uint8]) -> None:
        place = step if self._steps is None else self._steps.place_image(step)
        if place is not None:
            self._tracker.log_images({tag: [array]}, step=place)

    def _catch_up(self, after: int) -> None:
        """Send the rows from step `after` to this run's first that W&B may lack: its own process keeps rows back for
        some 15 seconds, and a kill, a scheduler's signal to it, or a server that wasn't reached leaves them out."""
        path = self._context.run_dir / "metrics.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            row = json.loads(line)
            if after < (step := row.pop("step")) <= self._context.start_step:
                self._log(step, {k: float("nan") if v is None else v for k, v in row.items() if k != "time"})

    def _kept_step(self) -> int:
        """The last step of a part that W&B finished writing; offline nobody else can tell."""
        path = _wandb_kept(self._context.run_dir)
        return int(path.read_text()) if path.exists() else 0

    def _cannot_start(self, error: Exception, *, last: bool) -> None:
        what = f"the tracker '{self._kind}' can't be started: {first_line(error)}"
        if self._context.start_step == 0:
            raise UserError(what, where=f"logger.{self._kind}", remedy=self._remedy) from error
        then = "this run goes on without it; metrics.jsonl has its numbers"
        if not last:
            then = f"it goes on offline, in {self._context.run_dir / 'wandb'}: wandb sync uploads that later"
        log.warning("%s\n  %s\n  remedy: %s", what, then, self._remedy)


def _wandb_settings(close_seconds: float) -> dict[str, float]:
    """W&B's own limits of time. It gives up sending in half of what it has at the end, and writes its file in the rest:
    that process dies with this one. A W&B without this setting loses there what it hadn't written."""
    import wandb

    limits = {"init_timeout": WANDB_INIT_SECONDS}
    if "finish_timeout" in wandb.Settings.model_fields:
        limits["finish_timeout"] = close_seconds / 2
    return limits


def _stop_wandb() -> None:
    """W&B's own process keeps the id of a run that couldn't be started, and would refuse it to the next attempt."""
    import wandb

    wandb.teardown()


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
    own: dict[str, dict[str, Any]] = {
        "wandb": {
            "id": identity,
            "name": context.run_name,
            "resume": "allow",
            "dir": str(context.run_dir),
        },
        "trackio": {"name": f"{context.run_name}-{identity[:8]}", "resume": "allow"},
        "swanlab": {"id": identity, "experiment_name": context.run_name, "resume": "allow"},
        "tensorboard": {"logging_dir": str(context.run_dir)},
    }
    return LOGGER_TYPE_TO_CLASS[tracker](run_name=project, **{**own[tracker], **options})


def _mlflow_id(run_dir: Path) -> Path:
    """MLflow gives out its run ids itself: this file keeps ours."""
    return run_dir / "mlflow_run_id"


def _wandb_kept(run_dir: Path) -> Path:
    return run_dir / "wandb_kept_step"
