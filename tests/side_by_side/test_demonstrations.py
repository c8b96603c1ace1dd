"""Demonstrations of a simulator's expert, read by LeRobot itself."""

from __future__ import annotations

import numpy as np
import pytest

from opentau_train.simulation.demonstrations import Wanted, demonstrate, write
from tests.simulators import line

pytestmark = pytest.mark.lerobot


def test_demonstrations_are_a_dataset_of_lerobots(lerobot, tmp_path):
    """Every row, picture and text, over two files of each kind; and statistics of state and actions."""
    tree, wanted = line(), Wanted(12)
    write(tmp_path / "set", tree, wanted, 2, 60.0)
    dataset = lerobot.Dataset("own/set", root=tmp_path / "set", video_backend="pyav")
    made = list(demonstrate(tree, wanted, 1, 60.0))
    assert dataset.num_episodes == 12 and dataset.fps == 10 and len(dataset) == sum(len(d.actions) for d in made)
    assert dataset.meta.robot_type == "point" and dataset.meta.camera_keys == ["observation.images.eye"]
    row = 0
    for number, demonstration in enumerate(made):
        for frame in range(len(demonstration.actions)):
            item = dataset[row]
            assert (item["episode_index"], item["frame_index"], item["task"]) == (number, frame, "come here")
            np.testing.assert_array_equal(np.atleast_1d(item["observation.state"]), demonstration.state[frame])
            np.testing.assert_array_equal(np.atleast_1d(item["action"]), demonstration.actions[frame])
            seen = item["observation.images.eye"].permute(1, 2, 0).numpy() * 255
            assert np.abs(seen - demonstration.images["eye"][frame]).max() < 6  # what the codec loses
            row += 1
    stats = dataset.meta.stats["action"]
    np.testing.assert_allclose(stats["mean"], np.concatenate([d.actions for d in made]).mean(0), atol=1e-6)
