from pathlib import Path

import pytest

from opentau_train.sinks.base import SinkContext


@pytest.fixture
def make_context(tmp_path: Path):
    def make(start_step: int = 0, total_steps: int = 100, run_dir: Path = tmp_path) -> SinkContext:
        config = {"seed": 3, "model": {"width": 8, "bin_range": [-3.0, 3.0]}, "resume": None}
        return SinkContext(run_dir, "droid", total_steps, start_step, config)

    return make
