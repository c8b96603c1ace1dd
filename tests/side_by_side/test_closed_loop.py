"""The baseline of the closed loop: LeRobot trains on demonstrations by its own command, and plays what they showed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from opentau_train.errors import EXIT_OK
from opentau_train.tools import demos
from tests.nightly import at_night
from tests.program import REPO

pytestmark = pytest.mark.lerobot
SCRIPT = REPO / "benchmarks" / "baselines" / "lerobot_act.py"


def script(*words):
    subprocess.run([sys.executable, SCRIPT, *map(str, words)], cwd=REPO, check=True, timeout=600)


@at_night
@pytest.mark.timeout(900)
def test_lerobots_act_trains_on_demonstrations_and_plays_the_evaluations_starts(lerobot, tmp_path):
    short = "env.max_steps=6"
    assert demos.main(["env=reach", "episodes=2", f"out={tmp_path / 'set'}"]) == EXIT_OK
    script("train", tmp_path / "set", tmp_path / "run", "--steps", 1, "--batch", 2, "--chunk", 8)
    cost = json.loads((tmp_path / "run" / "cost.json").read_text())
    assert (cost["steps"], cost["batch"]) == (1, 2) and cost["cpu_s"] > 0
    words = ["--env", "reach", "--set", short, "--episodes", 3, "--simulators", 2]
    script("play", tmp_path / "run", tmp_path / "seen", *words)
    script("play", tmp_path / "run", tmp_path / "again", *words)
    seen, again = (json.loads((tmp_path / name / "rollout.json").read_text()) for name in ("seen", "again"))
    assert [episode["steps"] for episode in seen["episodes"]] == [6, 6, 6] and seen["env"]["max_steps"] == 6
    assert seen["episodes"] == again["episodes"] and seen["metrics"]["lerobot_act/Episodes"] == 3
