"""Comet."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from opentau_train.sinks.trackers import TrackerSink, run_id


class CometSink(TrackerSink):
    """A resumed run goes on with the same experiment, and sends the steps after its checkpoint again; as a resume is
    exact both are equal. Offline, each start leaves an archive of its own, which `comet upload` sends later."""

    tracker = "comet_ml"
    takes_images = True
    remedy = "look at COMET_API_KEY, or set logger.comet_ml.options.online=false to upload later with comet upload"

    def identity(self) -> dict[str, Any]:
        # Its keys have 32 to 50 letters and digits.
        return {"experiment_key": 2 * run_id(self._context.run_dir)}

    def _start(self, options: dict[str, Any]) -> None:
        super()._start(options)
        self._run.tracker.set_name(self._context.run_name)

    def _log_image(self, step: int, tag: str, array: NDArray[np.uint8]) -> None:
        self._run.tracker.log_image(array, name=tag, step=step)
