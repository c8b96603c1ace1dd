"""The DROID sample's own world in closed loop: its arm, its table, its ball and its cameras (`data/builtin/`).

The hand must come to the ball, whose place only the pictures show, and close. Nothing is simulated but kinematics: the
arm follows its commands with the sample's lag, no joint faster than `_MAX_STEP`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from opentau_train import rng
from opentau_train.data.builtin import arm, scene

_WORKSPACE = np.array([(0.33, 0.67), (-0.38, 0.38)])  # x and y of the ball's centre, m, as in the sample
_APART = 0.2  # m between the hand's first place and the ball
_LAG = 0.3  # share of the last command in the measured joints
_MAX_STEP = 0.15  # rad a joint turns in a step: 2.2 rad/s, as a Panda's may
_NEAR = 0.04  # m from the hand to where it touches the ball
_CLOSED = 0.5
_COLOURS = tuple(scene.COLOURS)


def touch_pose(places: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N, 6] pose (m, rad) of the hand at balls that lie at `places` [N, 2] (m), as the sample's episodes reach it."""
    x, y = places.T
    height = (1.8 + 2.0 * (x - 0.5)) * scene.BALL_RADIUS
    return np.column_stack([x, y, height, np.pi + 0.5 * y, -0.8 * (x - 0.5), 0.4 * np.arctan2(y, x)])


class ReachBall:
    """Actions [8] are absolute: seven joints (rad), or the hand's pose (m, rad) where `control` is ee (then [7]), and
    the gripper, 0 open to 1 closed; `state` is the same, measured. `pixels` {camera: [180, 320, 3] uint8}. `info` tells
    `is_success`, and the `distance` (m)."""

    def __init__(self, control: Literal["joint", "ee"] = "joint"):
        self.control = control
        self._backdrops = {name: scene.backdrop(camera) for name, camera in scene.EXTERIOR.items()}

    def reset(self, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        low, high = _WORKSPACE.T
        places = low + (high - low) * rng.uniform(rng.fold(rng.key(seed, "reach"), np.arange(64)), 2)
        start = places[0]
        self.place = next(p for p in places[1:] if np.linalg.norm(p - start) >= _APART)
        colour = rng.uniform(rng.key(seed, "colour"))[0]
        self.colour = scene.COLOURS[_COLOURS[int(colour * len(_COLOURS))]]
        poses = arm.reach(touch_pose(np.stack([start, self.place])))
        self.goal = poses[1]
        self._command = self._measured = np.append(poses[0], 0.0)
        return self._observation(), self._info()

    def step(self, action: NDArray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        action = np.asarray(action, np.float64)
        joints = action[:7] if self.control == "joint" else arm.reach(action[None, :6])[0]
        turned = np.clip(joints - self._command[:7], -_MAX_STEP, _MAX_STEP)
        command = np.append(self._command[:7] + turned, np.clip(action[-1], 0.0, 1.0))
        self._measured = command + _LAG * (self._command - command)
        self._command = command
        info = self._info()
        return self._observation(), -info["distance"], info["is_success"], False, info

    def close(self) -> None:
        """Nothing is held."""

    def _info(self) -> dict[str, Any]:
        tool, wanted = (arm.cartesian(joints[None])[0, :3] for joints in (self._measured[:7], self.goal))
        distance = float(np.linalg.norm(tool - wanted))
        return {"distance": distance, "is_success": distance < _NEAR and bool(self._measured[7] > _CLOSED)}

    def _observation(self) -> dict[str, Any]:
        measured = self._measured[None, :7]
        body = measured[0] if self.control == "joint" else arm.cartesian(measured)[0]
        ball = np.append(self.place, scene.BALL_RADIUS)
        world = scene.World(arm.frames(measured)[0], 1.0 - self._measured[7], ball, self.colour)
        pixels = {n: scene.render_exterior(c, self._backdrops[n], world) for n, c in scene.EXTERIOR.items()}
        return {
            "pixels": {"wrist_left": scene.render_wrist(world), **pixels},
            "state": np.append(body, self._measured[7]),
        }


def expert(env: ReachBall) -> Callable[[Mapping[str, Any]], NDArray[np.float64]]:
    """Goes straight to the ball, 0.05 rad a step, and closes the gripper there."""

    def act(observation: Mapping[str, Any]) -> NDArray[np.float64]:
        way = env.goal - env._command[:7]
        joints = env._command[:7] + way * min(1.0, 0.05 / max(1e-9, float(np.abs(way).max())))
        body = joints if env.control == "joint" else arm.cartesian(joints[None])[0]
        return np.append(body, float(np.abs(way).max() < 0.05))

    return act
