"""What a simulator draws: each picture once, and only those that somebody sees."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from opentau_train.simulation.simulator import Simulator
from tests.simulators import Line, line


class Drawn(Mapping):
    """{"eye": picture}, drawn when it is read, as Meta-World's are; `num` counts."""

    def __init__(self, env):
        self.env = env

    def __getitem__(self, camera):
        if camera != "eye":
            raise KeyError(camera)
        self.env.num_drawn += 1
        return np.full((8, 8, 3), self.env.num, np.uint8)

    def __iter__(self):
        return iter(["eye"])

    def __len__(self):
        return 1


class LazyLine(Line):
    """The line, whose picture is drawn when it is read."""

    num_drawn = 0

    def _seen(self):
        return {"place": np.array([self.place]), "pixels": Drawn(self)}


@pytest.fixture
def simulator():
    tree = line()
    env = {**tree["env"], "_target_": "tests.unit.simulation.test_simulator.LazyLine"}
    return Simulator({**tree, "env": env, "cameras": {"eye": "pixels/eye"}})


@pytest.mark.parametrize(("record", "drawn"), [(False, 1), (True, 3)])
def test_of_a_chunk_the_last_picture_is_drawn_and_all_where_they_are_kept(simulator, record, drawn):
    assert simulator.reset(0).images["eye"][0, 0, 0] == 0 and simulator.env.num_drawn == 1
    moved = simulator.act(np.full((3, 1), 0.01, np.float32), record)
    assert simulator.env.num_drawn == 1 + drawn and len(moved.frames) == (3 if record else 0)
    assert moved.num_steps == 3 and moved.seen.images["eye"][0, 0, 0] == 3
    assert [frame["eye"][0, 0, 0] for frame in moved.frames] == ([1, 2, 3] if record else [])


def test_an_episode_that_ends_within_a_chunk_shows_its_end(simulator):
    simulator.reset(0)
    moved = simulator.act(np.full((40, 1), 0.1, np.float32), True)
    assert moved.success and moved.over and moved.num_steps < 12 and len(moved.frames) == moved.num_steps
    assert moved.seen.images["eye"][0, 0, 0] == moved.num_steps and simulator.env.num_drawn == 1 + moved.num_steps


def test_a_demonstration_draws_each_moment_once(simulator):
    made = simulator.demonstrate(0, 4)
    assert simulator.env.num_drawn == len(made.actions) == len(made.images["eye"])
