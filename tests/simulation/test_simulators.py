"""Real simulators: their declarations fit, a seed says all of a start, experts reach the goal, and policies that are
trained on their demonstrations play.

Each runs where it is installed (`make test-simulation` has an environment with all of them).
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from opentau_train import cli
from opentau_train.errors import EXIT_OK, UserError
from opentau_train.simulation.process import SimulatorProcess
from opentau_train.tools import demos, rollout
from tests.lerobot_writer import Camera, Dataset, vector, write
from tests.program import TINY_POLICY, train_here

if sys.platform == "linux":  # where a world is made here, as a simulator's own process is told (simulation/process.py)
    os.environ.setdefault("MUJOCO_GL", "egl")

MODULES = {"metaworld": "metaworld", "pusht": "gym_pusht", "aloha": "gym_aloha"}


def needs(name):
    lacking = importlib.util.find_spec(MODULES[name]) is None
    return pytest.mark.skipif(lacking, reason=f"needs opentau_train[{name}], which make test-simulation installs")


pytestmark = pytest.mark.simulation
EACH = [pytest.param(name, marks=needs(name)) for name in MODULES]
TASKS = ("reach-v3", "push-v3", "drawer-close-v3", "button-press-v3", "door-open-v3")


def declaration(name, *overrides):
    return cli.compose([f"+simulation@env={name}", *overrides], primary=None)["env"]


def ask(process, *call):
    process.ask(*call)
    return process.answer()


def same(one, other):
    pictures = all((one.images[camera] == other.images[camera]).all() for camera in one.images)
    return bool((one.state == other.state).all()) and pictures


@pytest.mark.parametrize("name", EACH)
def test_a_seed_says_all_of_an_episodes_start_whatever_was_before(name):
    tree = declaration(name)
    with closing(SimulatorProcess(tree, 300.0)) as process, closing(SimulatorProcess(tree, 300.0)) as other:
        first = ask(process, "reset", 3)
        assert first.images.keys() == tree["cameras"].keys() and first.state.shape == (len(tree["state_names"]),)
        assert all(picture.std() > 5 and picture.dtype == np.uint8 for picture in first.images.values())
        actions = np.zeros((3, len(tree["actions"])), np.float32) + first.state[: len(tree["actions"])]
        moved = ask(process, "act", actions, False)
        assert not same(ask(process, "reset", 4), first)
        assert same(ask(process, "reset", 3), first) and same(ask(other, "reset", 3), first)
        again = ask(other, "act", actions, False)
        assert same(again.seen, moved.seen) and again.num_steps == 3 and not moved.over


@needs("metaworld")
@pytest.mark.parametrize("task", ["reach-v3", "push-v3"])
def test_the_first_picture_has_the_goal_where_it_is(task):
    from opentau_train.simulation.metaworld import MetaWorld

    with closing(MetaWorld(task)) as env:
        for seed in (3, 4):
            env.reset(seed)
            np.testing.assert_allclose(env.world.data.site("goal").xpos, env.world._target_pos, atol=1e-6)


@needs("metaworld")
def test_of_so_many_starts_each_is_one_of_them():
    from opentau_train.simulation.metaworld import MetaWorld

    def goals(num_starts, seeds):
        with closing(MetaWorld("reach-v3", num_starts=num_starts)) as env:
            return [tuple(env.world._target_pos) for seed in seeds if env.reset(seed)]

    assert len(set(goals(None, range(20)))) == 20
    few = goals(5, range(20))
    assert len(set(few)) == 5 and few == goals(5, range(5)) * 4
    with pytest.raises(UserError, match="at least one start"):
        MetaWorld("reach-v3", num_starts=0)


@needs("metaworld")
@pytest.mark.parametrize("task", TASKS)
def test_the_experts_of_metaworld_reach_the_goal_through_noise(task):
    with closing(SimulatorProcess(declaration("metaworld", f"env.task={task}"), 300.0)) as process:
        reached = [ask(process, "demonstrate", seed, 8) for seed in range(3)]
        assert sum(made.success for made in reached) >= 2
        assert all(made.images["corner2"].shape == (len(made.actions), 64, 64, 3) for made in reached)
        assert all(np.abs(made.actions).max() <= 1 for made in reached)


@needs("metaworld")
@pytest.mark.parametrize(
    ("override", "text"),
    [("env.task=reach-v2", "did you mean 'reach-v3'?"), ("env.env.cameras=[corner9]", "did you mean 'corner")],
)
def test_what_metaworld_has_not_is_told(override, text):
    with (
        closing(SimulatorProcess(declaration("metaworld", override), 300.0)) as process,
        pytest.raises(UserError) as error,
    ):
        ask(process, "reset", 0)
    assert text in str(error.value)


def train_and_play(folder: Path, name: str, *words: str) -> dict:
    """What the tool says of a policy that learned from the dataset in `folder` for a moment."""
    run = [f"data.sources.main.root={folder / 'set'}", "trainer.steps=4", "trainer.global_batch_size=8"]
    train_here(["+recipe=lerobot", *run, "data.num_workers=0", "validation=none", *TINY_POLICY], folder / "run")
    played = [f"checkpoint={folder / 'run'}", f"env={name}", "simulators=2", f"out={folder / 'played'}", *words]
    assert rollout.main(played) == EXIT_OK
    assert (folder / "played" / "episode_1.mp4").stat().st_size > 1000
    return json.loads((folder / "played" / "rollout.json").read_text())


@needs("metaworld")
def test_from_demonstrations_to_a_success_rate_in_metaworld(tmp_path):
    words = ["env=metaworld", "task=button-press-v3", "episodes=4", f"out={tmp_path / 'set'}", "timeout=600"]
    assert demos.main(words) == EXIT_OK
    told = train_and_play(tmp_path, "metaworld", "task=button-press-v3", "episodes=3", "env.max_steps=24")
    assert told["metrics"]["metaworld_button-press-v3/Episodes"] == 3
    assert [episode["steps"] for episode in told["episodes"]] == [24, 24, 24]  # too few to press it


@pytest.mark.parametrize(
    ("name", "camera", "task"),
    [
        pytest.param("pusht", "observation.image", None, marks=needs("pusht")),
        pytest.param("aloha", "observation.images.top", "AlohaInsertion-v0", marks=needs("aloha")),
    ],
)
def test_a_policy_of_a_dataset_plays_its_simulator(tmp_path, name, camera, task):
    """Of a dataset in the form of LeRobot's for it: the same names and rate."""
    tree = declaration(name)
    columns = {
        "observation.state": vector(len(tree["state_names"]), names=tree["state_names"]),
        "action": vector(len(tree["actions"]), 0.5, names=tree["actions"]),
    }
    dataset = Dataset(lengths=(20, 20), fps=tree["fps"], cameras={camera: Camera(size=(96, 96))}, columns=columns)
    write(tmp_path / "set", dataset)
    words = ["episodes=2", "env.max_steps=3", "norm_head=arm::default", *([f"task={task}"] if task else [])]
    told = train_and_play(tmp_path, name, *words)
    assert [episode["steps"] for episode in told["episodes"]] == [3, 3]
