"""What writes the datasets of tests and benchmarks leaves the process as it was."""

import os

from tests.lerobot_writer import AV1, Camera, picture, write_video


def test_encoding_av1_leaves_the_scheduling_of_this_process_alone(tmp_path):
    """SVT-AV1 makes a thread of root's a real-time one, and what it starts afterwards, too."""
    camera = Camera("libsvtav1", (64, 64), gop=2, options=AV1)
    write_video(tmp_path / "a.mp4", camera, [(i / 30, picture(0, i, "wrist", (64, 64))) for i in range(3)])
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
