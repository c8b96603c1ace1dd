"""The parts of a run beside its steps, its validations and saves: their bars, and what they add to the time left."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping

from tqdm import tqdm

VALIDATION, SAVE = "validation", "saving"
_BEGINNINGS = {
    VALIDATION: ("validation", "all-reduce of the validation", "rollout of", "all-reduce of the rollout"),
    SAVE: ("save",),
}
"""{stage: how the parts are called that it is made of}"""
TICK_SECONDS = 0.5


def stage_of(part: str) -> str | None:
    """The stage that a part of the run belongs to; None for what steps are made of."""
    return next((stage for stage, beginnings in _BEGINNINGS.items() if part.startswith(beginnings)), None)


class Clock:
    """How long a run still takes: its steps, and the validations and saves to come, each as long as the mean of those
    so far. `every` {stage: steps between two; 0: after the last step only, None: never}."""

    def __init__(
        self,
        start: int,
        total: int,
        every: Mapping[str, int | None],
        now: Callable[[], float] = time.monotonic,
    ):
        self.start, self.total, self.every, self.now = start, total, dict(every), now
        self.began, self.spent = now(), dict[str, list[float]]()
        self.stage: str | None = None
        self.since = self.began

    def enter(self, stage: str | None) -> None:
        """The run is in `stage` from now on."""
        now = self.now()
        if self.stage is not None:
            self.spent.setdefault(self.stage, []).append(now - self.since)
        self.stage, self.since = stage, now

    def mean(self, stage: str) -> float | None:
        """Seconds that the stage takes; None before the first one."""
        seen = self.spent.get(stage)
        return sum(seen) / len(seen) if seen else None

    def num_to_come(self, stage: str, step: int) -> int:
        """How often the stage comes after `step`."""
        every = self.every.get(stage)
        if every is None or step >= self.total:
            return 0
        return 1 if every == 0 else -(-self.total // every) - step // every

    def left(self, step: int) -> float:
        """Seconds from now to the end, `step` being taken."""
        beside = sum(map(sum, self.spent.values())) + (self.now() - self.since if self.stage is not None else 0.0)
        steps = (self.now() - self.began - beside) / max(step - self.start, 1) * (self.total - step)
        return steps + sum((self.mean(stage) or 0.0) * self.num_to_come(stage, step) for stage in self.every)


class StageBar:
    """The bar of a stage, below that of the steps. A validation moves with its batches; a save, which says nothing of
    how far it is, with the time that such took before, on a thread."""

    def __init__(self, stage: str, expected: float | None):
        whole = "{percentage:3.0f}%|{bar}| "
        pieces = "{n_fmt}/{total_fmt} " if stage == VALIDATION else ""
        self._bars = "{desc} " + whole + pieces + "[{elapsed}<{remaining}]", "{desc} [{elapsed}]"
        self.bar = tqdm(
            desc=stage, total=expected, position=1, leave=False, file=sys.stderr, dynamic_ncols=True,
            bar_format=self._bars[expected is None],
        )  # fmt: skip
        self.bar.desc = stage  # tqdm adds a colon
        self._expected, self._done = expected, threading.Event()
        self._ticking = threading.Thread(target=self._tick, name="stage bar", daemon=True) if stage == SAVE else None
        if self._ticking is not None:
            self._ticking.start()

    def move(self, done: int, total: int) -> None:
        """`done` of the `total` pieces are."""
        if total and self._ticking is None:
            self.bar.bar_format, self.bar.total = self._bars[0], total
            if done < self.bar.n:
                self.bar.reset(total)  # another evaluator's
            self.bar.update(done - self.bar.n)

    def close(self) -> None:
        self._done.set()
        if self._ticking is not None:
            self._ticking.join()
        self.bar.close()

    def _tick(self) -> None:
        """No process is forked while a save is written: a child could find tqdm's lock taken."""
        while not self._done.wait(TICK_SECONDS):
            if self._expected is not None:
                self.bar.n = min(self.bar.format_dict["elapsed"], self._expected)
            self.bar.refresh()
