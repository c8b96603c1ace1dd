"""trackio, a local dashboard."""

from __future__ import annotations

from typing import Any

from opentau_train.sinks.trackers import TrackerSink, run_id


class TrackioSink(TrackerSink):
    """A resumed run sends the steps after its checkpoint again, and trackio keeps both rows; as a resume is exact the
    two are equal."""

    tracker = "trackio"

    def identity(self) -> dict[str, Any]:
        return {"name": f"{self._context.run_name}-{run_id(self._context.run_dir)[:8]}", "resume": "allow"}
