"""Meta-World (Yu et al. 2019; `pip install "opentau_train[metaworld]"`): 50 tasks of a Sawyer arm, and its experts.

An observation is {"pixels": {camera: [S, S, 3] uint8}, "agent_pos": [4] hand's x, y, z (m) and the gripper's opening,
"full": [39] Meta-World's own with the goal, which the experts read}. Pictures are drawn when they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP
from numpy.typing import NDArray

from opentau_train.errors import UserError, did_you_mean

_CLOSER = {"corner2": (0.75, 0.075, 0.7)}
"""Where Meta-World's vision papers put that camera."""
_UPSIDE_DOWN = ("corner", "corner2", "corner3", "corner4")


class MetaWorld:
    """The task `task`, seen by `cameras` (its own, gripperPOV among them) in `image_size` (H, W). The start, its goal
    among it, depends on the seed alone. Where `num_starts` is given there are no more than that: Meta-World's own
    benchmark of one task, MT1, trains and tests on the same 50. Raises `UserError` for a task or a camera that there
    isn't, or no starts."""

    def __init__(
        self,
        task: str,
        cameras: tuple[str, ...] = ("corner2",),
        image_size: tuple[int, int] = (64, 64),
        num_starts: int | None = None,
    ):
        if num_starts is not None and num_starts < 1:
            raise UserError(f"there is at least one start, not {num_starts}", where="num_starts", remedy="50, or null")
        self.num_starts = num_starts
        if task not in ALL_V3_ENVIRONMENTS:
            near = did_you_mean(task, ALL_V3_ENVIRONMENTS)
            raise UserError(f"Meta-World has no task '{task}'{near}", where="task", remedy="see metaworld.env_dict")
        self.task, self.cameras = task, cameras
        world = self.world = ALL_V3_ENVIRONMENTS[task]()
        # What its benchmarks set through pickled tasks: starts drawn anew, and the goal among what is observed.
        world._set_task_called, world._freeze_rand_vec, world.seeded_rand_vec = True, False, True
        world._partially_observable = False
        world.__dict__.pop("sawyer_observation_space", None)  # cached without the goal, to which it would clip
        model = world.model
        known = [model.camera(i).name for i in range(model.ncam)]
        for camera in cameras:
            if camera not in known:
                near = did_you_mean(camera, known)
                raise UserError(f"no camera is called '{camera}'{near}", where="cameras", remedy=f"it has {known}")
            if camera in _CLOSER:
                model.cam_pos[model.camera(camera).id] = _CLOSER[camera]
        # Without a GPU these take nearly all of the time: 6 frames a second with them, 400 without.
        model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
        self._renderer = mujoco.Renderer(model, *image_size)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = 0

    def reset(self, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        self.world.seed(seed if self.num_starts is None else seed % self.num_starts)
        observation, info = self.world.reset()
        # The goal is put where it belongs after the last step of the simulation, and drawn where it was before.
        mujoco.mj_forward(self.world.model, self.world.data)
        return self._observed(observation), info

    def step(self, action: NDArray[np.float32]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.world.step(action)
        return self._observed(observation), float(reward), terminated, truncated, info

    def picture(self, camera: str) -> NDArray[np.uint8]:
        """[H, W, 3] RGB of this moment, upright."""
        self._renderer.update_scene(self.world.data, camera)
        pixels = self._renderer.render()
        return pixels[::-1] if camera in _UPSIDE_DOWN else pixels

    def close(self) -> None:
        self._renderer.close()
        self.world.close()

    def _observed(self, observation: NDArray[np.float64]) -> dict[str, Any]:
        return {"pixels": _Pictures(self), "agent_pos": observation[:4], "full": observation}


class _Pictures(Mapping[str, NDArray[np.uint8]]):
    """{camera: picture}, drawn when asked for."""

    def __init__(self, world: MetaWorld):
        self._world = world

    def __getitem__(self, camera: str) -> NDArray[np.uint8]:
        if camera not in self._world.cameras:
            raise KeyError(camera)
        return self._world.picture(camera)

    def __iter__(self) -> Iterator[str]:
        return iter(self._world.cameras)

    def __len__(self) -> int:
        return len(self._world.cameras)


def expert(env: MetaWorld) -> Callable[[Mapping[str, Any]], NDArray[np.float64]]:
    """The scripted policy of the environment's task: from an observation to an action [4]."""
    policy = ENV_POLICY_MAP[env.task]()
    return lambda observation: policy.get_action(observation["full"])
