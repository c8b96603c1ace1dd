"""SwanLab."""

from __future__ import annotations

from typing import Any

from opentau_train.sinks.trackers import TrackerSink, run_id


class SwanlabSink(TrackerSink):
    """SwanLab leaves out the rows of a step that it has."""

    tracker = "swanlab"
    takes_images = True

    def identity(self) -> dict[str, Any]:
        return {"id": run_id(self._context.run_dir), "experiment_name": self._context.run_name, "resume": "allow"}
