"""Weights & Biases: one run a run directory, in which each step stands once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opentau_train.sinks.background import Background
from opentau_train.sinks.jsonl import FILE, read_rows, split
from opentau_train.sinks.trackers import TrackerSink, run_id

INIT_SECONDS = 30.0
VALIDATION, VALIDATION_STEP = "Validation/", "Validation/Step"


class WandbSink(TrackerSink):
    """A resumed run is sent online what W&B lacks of the steps before; what W&B has is left out.

    A validation may be owed: it was begun before a preemption and is made up for by the resumed run, when W&B is past
    its step. It goes with the next step; `Validation/Step`, the charts' axis of all `Validation/` tags, tells its own.

    Offline, each start leaves a part with the same run id, and a part that W&B could not finish (its own process was
    killed too) is repeated in the next one. A resumed run that doesn't reach the server goes on offline.
    """

    tracker = "wandb"
    takes_images = True
    remedy = "wandb login (or WANDB_API_KEY), or logger.wandb.options.mode=offline to upload later with wandb sync"

    def identity(self) -> dict[str, Any]:
        run_dir, name = self._context.run_dir, self._context.run_name
        return {"id": run_id(run_dir), "name": name, "resume": "allow", "dir": str(run_dir)}

    def close(self) -> None:
        super().close()
        if self.complete:
            self._finished_step.write_text(f"{self._last_step}\n")

    def _open(self, options: dict[str, Any]) -> Background | None:
        uploads = f"it goes on offline, in {self._context.run_dir / 'wandb'}: wandb sync --append uploads that later"
        self._started_before = False
        calls = self._attempt(options, uploads)
        if calls is None:
            self._started_before = True
            calls = self._attempt({**options, "mode": "offline"})
        if calls is not None and self._context.start_step > 0:
            calls.post(self._catch_up)
        return calls

    # -- on the thread -----------------------------------------------------------------------------------------------

    def _start(self, options: dict[str, Any]) -> None:
        import wandb

        if self._started_before:  # W&B's own process keeps the id of a run that couldn't be started, and refuses it
            wandb.teardown()
        limits = {"init_timeout": INIT_SECONDS}
        if "finish_timeout" in wandb.Settings.model_fields:
            # It gives up sending in half of what it has at the end, and writes its file in the rest: that process dies
            # with this one. A W&B without this setting loses there what it hadn't written.
            limits["finish_timeout"] = self._close_seconds / 2
        super()._start({**options, "settings": {**limits, **options.get("settings", {})}})
        run = self._run.tracker
        run.define_metric(VALIDATION_STEP, hidden=True)
        run.define_metric(f"{VALIDATION}*", step_metric=VALIDATION_STEP)
        self._next = run.starting_step  # W&B would leave out what comes for a step before, with a warning a row
        # The step of W&B's last validation, and the W&B step that has it where this process logged it.
        self._validated = int(run.summary.get(VALIDATION_STEP) or 0) if run.resumed else 0
        self._validated_at = -1

    def _log(self, step: int, values: dict[str, float]) -> None:
        if any(tag.startswith(VALIDATION) for tag in values):
            if step <= self._validated:
                return
            # One validation a W&B step: of two that are owed, the second would write over the first.
            at = max(step, self._next, self._validated_at + 1)
            self._validated, self._validated_at = step, at
            values = {**values, VALIDATION_STEP: step}
        elif step < self._next:
            return
        else:
            at = step
        self._next = at
        super()._log(at, values)

    def _log_image(self, step: int, tag: str, array: NDArray[np.uint8]) -> None:
        """A picture goes with the row of its validation."""
        if step == self._validated and self._validated_at >= self._next:
            super()._log_image(self._validated_at, tag, array)

    def _catch_up(self) -> None:
        """Send the rows up to this run's first that W&B may lack: its own process keeps rows back for some 15 seconds,
        and a kill, a scheduler's signal to it, or a server that wasn't reached leaves them out."""
        path, after = self._context.run_dir / FILE, 0
        if self._run.tracker.offline and self._finished_step.exists():  # offline nobody else can tell what W&B has
            after = int(self._finished_step.read_text())
        for step, row in read_rows(self._context.run_dir).items() if path.exists() else []:
            if after < step <= self._context.start_step:
                for part in split(row):  # a validation has a row of its own
                    self._log(step, part)

    @property
    def _finished_step(self) -> Path:
        """The file that keeps the last step of a part that W&B finished writing."""
        return self._context.run_dir / "wandb_kept_step"
