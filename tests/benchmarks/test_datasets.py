"""What writes the datasets of tests and benchmarks leaves the process as it was."""

import os

import pytest

from benchmarks.support import datasets
from tests import lerobot_writer
from tests.lerobot_writer import Camera, picture


@pytest.mark.parametrize("writer", ["tests", "benchmarks"])
def test_encoding_av1_leaves_the_scheduling_of_this_process_alone(tmp_path, writer):
    """SVT-AV1 makes a thread of root's a real-time one, and what it starts afterwards, too."""
    pictures = [picture(0, i, "wrist", (64, 64)) for i in range(3)]
    if writer == "tests":
        camera = Camera("libsvtav1", (64, 64), gop=2, options=lerobot_writer.AV1)
        lerobot_writer.write_video(tmp_path / "a.mp4", camera, [(i / 30, p) for i, p in enumerate(pictures)])
    else:
        datasets.write_video(tmp_path / "a.mp4", pictures, "libsvtav1", 2, datasets.AV1)
    assert os.sched_getscheduler(0) != os.SCHED_FIFO
