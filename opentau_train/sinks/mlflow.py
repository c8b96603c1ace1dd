"""MLflow; the server is the environment variable MLFLOW_TRACKING_URI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opentau_train.sinks.trackers import TrackerSink


class MlflowSink(TrackerSink):
    """`project` is MLflow's experiment. A resumed run sends the steps after its checkpoint again, and MLflow keeps both
    rows; as a resume is exact the two are equal."""

    tracker = "mlflow"
    project_option = "experiment_name"
    remedy = "look at MLFLOW_TRACKING_URI and its server"

    def identity(self) -> dict[str, Any]:
        id_file = self._run_id_file
        return {"run_id": id_file.read_text().strip()} if id_file.exists() else {"run_name": self._context.run_name}

    @staticmethod
    def name_of(tag: str) -> str:
        """`Validation/MSE/N` -> `Validation/MSE.N`: MLflow's file store keeps a metric in a file named by its tag, and
        `Validation/MSE` can't be a file and a directory."""
        head, _, last = tag.rpartition("/")
        return f"{head}.{last}" if last in ("N", "StdErr") else tag

    def _store_configuration(self, config: dict[str, bool | int | float | str]) -> None:
        if not self._run_id_file.exists():  # a continued run has it, and MLflow refuses a parameter that has changed
            self._run_id_file.write_text(self._run.tracker.info.run_id)
            super()._store_configuration(config)

    @property
    def _run_id_file(self) -> Path:
        """MLflow gives out its run ids itself: this file keeps ours."""
        return self._context.run_dir / "mlflow_run_id"
