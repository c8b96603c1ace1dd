"""W&B's own count of steps, which only grows, against the steps of a resumed run, which begin at its checkpoint."""

from __future__ import annotations

from typing import Any

VALIDATION, VALIDATION_STEP = "Validation/", "Validation/Step"


class Steps:
    """Where a row goes in a W&B run. W&B leaves out what comes for a step before its own.

    - A row of training that W&B has already is left out here, without W&B's warning a row.
    - A validation may be owed: it was begun before a preemption and is made up for by the resumed run, when its step
      is past. It goes with the next step; `Validation/Step`, the charts' axis of all `Validation/` tags, tells its own.
    """

    def __init__(self, run: Any):
        run.define_metric(VALIDATION_STEP, hidden=True)
        run.define_metric(f"{VALIDATION}*", step_metric=VALIDATION_STEP)
        self.online = not run.offline
        self._next: int = run.starting_step
        self._validated = int(run.summary.get(VALIDATION_STEP) or 0) if run.resumed else 0
        self._validated_at = -1  # the W&B step that has the validation of step `_validated`

    def place(self, step: int, values: dict[str, float]) -> int | None:
        """The W&B step for a row of `step`, None where W&B has it. A validation's gets its step among the values."""
        if not any(tag.startswith(VALIDATION) for tag in values):
            return None if step < self._next else self._take(step)
        if step <= self._validated:
            return None
        values[VALIDATION_STEP] = self._validated = step
        self._validated_at = self._take(max(step, self._validated_at + 1))  # one validation a W&B step
        return self._validated_at

    def place_image(self, step: int) -> int | None:
        """The same for a picture, which goes with the row of its validation."""
        return self._validated_at if step == self._validated and self._validated_at >= self._next else None

    def _take(self, step: int) -> int:
        self._next = max(self._next, step)
        return self._next
