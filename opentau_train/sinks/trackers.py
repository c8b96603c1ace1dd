"""What the experiment trackers share: accelerate's tracker classes, called on a thread that training never waits for.

Each tracker is a class of its own: `WandbSink`, `MlflowSink`, `TrackioSink`, `SwanlabSink`.
"""

from __future__ import annotations

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from numpy.typing import NDArray

from opentau_train.errors import UserError
from opentau_train.sinks.background import Background
from opentau_train.sinks.base import Sink, SinkContext, of_groups
from opentau_train.threads import first_line

log = logging.getLogger(__name__)

START_SECONDS = 120.0
"""How long a tracker may take to start: longer than its own attempts, which end with a reason."""

WAIT_SECONDS = 600.0


class TrackerSink(Sink):
    """One run in the tracker's `project`. `options` go to the tracker's own `init`.

    A subclass names its `tracker` as accelerate does, and says how the run is found again (`identity`), how that class
    calls a project (`project_option`), whether it takes images, what to do when it can't be started (`remedy`), and
    what it calls a tag (`name_of`).

    A resumed run continues the same tracker run. The configuration is stored as its parameters, with dotted keys.

    Training never waits for the tracker: the calls are made on a thread, the first failure is logged as a warning and
    ends them, and at the end they have `close_seconds`. `metrics.jsonl` has every row all the same, and the numbers of
    all groups, whichever `groups` (see `of_groups`) are sent.

    Accelerate's process state is used as it stands: in a run of several processes the program has made it before.
    Raises `UserError` when the tracker's package is missing, or when it can't be started for a new run. It has worked
    for a run that is resumed, which goes on without it, with a warning.
    """

    before_data: ClassVar[bool] = True
    tracker: ClassVar[str]
    project_option: ClassVar[str] = "run_name"
    takes_images: ClassVar[bool] = False
    complete = False
    """Whether all was sent or written, after `close`."""
    remedy: ClassVar[str] = "look at its server"

    def __init__(
        self,
        *,
        context: SinkContext,
        project: str,
        options: dict[str, Any] | None = None,
        close_seconds: float = 20.0,
        groups: list[str] | None = None,
    ):
        self._groups = groups
        self._project, self._context, self._close_seconds = project, context, close_seconds
        self.check()
        PartialState()  # accelerate's trackers log through it
        self._last_step = context.start_step
        self._run: GeneralTracker
        self._calls = self._open({**self.identity(), **(options or {})})

    @classmethod
    def check(cls) -> None:
        if cls.tracker not in {str(name.value) for name in get_available_trackers()}:
            raise UserError(
                f"the tracker '{cls.tracker}' needs the Python package '{cls.tracker}', which is not installed",
                where=f"logger.{cls.tracker}",
                remedy=f"pip install {cls.tracker}, or leave it out of logger=[...]",
            )

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The options that name this run directory's run, new or continued."""

    @staticmethod
    def name_of(tag: str) -> str:
        """What the tracker calls a tag."""
        return tag

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self._last_step = step
        sent = of_groups(row, self._groups)
        self._post(lambda: self._log(step, {self.name_of(tag): float(value) for tag, value in sent.items()}))

    def image(self, step: int, tag: str, array: NDArray[np.uint8]) -> None:
        if self.takes_images:
            self._post(lambda: self._log_image(step, tag, array))

    def wait(self, seconds: float = WAIT_SECONDS) -> None:
        """Until the tracker has taken all rows so far, for at most `seconds`. Training never calls it."""
        if self._calls is not None:
            self._calls.drain(seconds)

    def close(self) -> None:
        """Finish the tracker's run."""
        if self._calls is not None:
            self._calls.post(lambda: self._run.finish())
            ended = self._calls.close(self._close_seconds)
            self.complete = ended and not self._calls.failed and not self._calls.left_out

    def _open(self, options: dict[str, Any]) -> Background | None:
        """The thread on which the tracker has started; None where it can't be for a run that is resumed."""
        return self._attempt(options)

    def _attempt(
        self, options: dict[str, Any], otherwise: str = "this run goes on without it; metrics.jsonl has its numbers"
    ) -> Background | None:
        """One start. Where it fails for a run that is resumed, the warning says what happens `otherwise`."""
        calls = Background(self.tracker, f"the numbers are in {self._context.run_dir / 'metrics.jsonl'}")
        try:
            calls.ask(partial(self._start, options), START_SECONDS)
        except Exception as error:
            # Broad, and not to be split: each tracker raises classes of its own, which can't be imported where it
            # isn't installed. None is swallowed: a first start ends with it, a resumed one warns of it.
            calls.abandon()
            what = f"the tracker '{self.tracker}' can't be started: {first_line(error)}"
            remedy = f"{self.remedy}, or leave it out of logger=[...]"
            if self._context.start_step == 0:
                raise UserError(what, where=f"logger.{self.tracker}", remedy=remedy) from error
            log.warning("%s\n  %s\n  remedy: %s", what, otherwise, remedy)
            return None
        return calls

    def _post(self, call: Callable[[], object]) -> None:
        if self._calls is not None:
            self._calls.post(call)

    # -- on the thread -----------------------------------------------------------------------------------------------

    def _start(self, options: dict[str, Any]) -> None:
        self._run = self._make(options)
        # Only rank 0 builds sinks, so every call is the main process's own.
        self._run.main_process_only = False
        self._run.start()
        self._store_configuration(flatten(self._context.config))

    def _make(self, options: dict[str, Any]) -> GeneralTracker:
        return LOGGER_TYPE_TO_CLASS[self.tracker](**{self.project_option: self._project}, **options)

    def _store_configuration(self, config: dict[str, bool | int | float | str]) -> None:
        self._run.store_init_configuration(config)

    def _log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def _log_image(self, step: int, tag: str, array: NDArray[np.uint8]) -> None:
        self._run.log_images({tag: [array]}, step=step)


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
