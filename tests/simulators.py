"""Environments of gymnasium's API that misbehave as real ones do, for tests of what happens then."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np


class Line:
    """A point on a line that must come to 0: state and action are [1]. `picture` is grey, the brighter the nearer.

    What `crash` and `hang` name is done at that step of the first episode that reaches it; with `always`, of each.
    """

    def __init__(self, folder: str = "", crash: int = -1, hang: int = -1, always: bool = False, size: int = 32):
        self.folder, self.crash, self.hang, self.always, self.size = Path(folder), crash, hang, always, size

    def reset(self, seed: int):
        self.place, self.num = np.random.default_rng(seed).uniform(0.5, 1.0), 0
        return self._seen(), {}

    def step(self, action):
        self.num += 1
        for what, at in (("crash", self.crash), ("hang", self.hang)):
            if self.num == at and (self.always or self._first(what)):
                print(f"about to {what}", flush=True)
                os._exit(7) if what == "crash" else time.sleep(600)
        self.place -= float(np.clip(action[0], -0.1, 0.1))
        return self._seen(), 0.0, abs(self.place) < 0.05, False, {"won": abs(self.place) < 0.05}

    def close(self):
        pass

    def _first(self, what: str) -> bool:
        try:
            (self.folder / what).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _seen(self):
        grey = np.full((self.size, self.size, 3), int(255 * max(0.0, 1 - abs(self.place))), np.uint8)
        return {"place": np.array([self.place]), "eye": grey}


def line_expert(env: Line):
    return lambda observation: observation["place"]


def line(**options) -> dict:
    """Its declaration."""
    return {
        "env": {"_target_": "tests.simulators.Line", **options},
        "cameras": {"eye": "eye"},
        "state": "place",
        "state_names": ["x"],
        "actions": ["dx"],
        "success": "won",
        "fps": 10.0,
        "max_steps": 20,
        "robot_type": "point",
        "task": "come-here-v2",
        "expert": {"_target_": "tests.simulators.line_expert"},
        "expert_noise": [0.01],
    }
