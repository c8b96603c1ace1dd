"""One environment and the episode that runs in it: what a simulator's process does. Imports neither torch nor, before
one is made, any simulator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opentau_train import rng
from opentau_train.config.typed import TARGET, instantiate, locate
from opentau_train.errors import UserError
from opentau_train.simulation.environment import at, declared

PATH = "simulation"
"""What errors call the declaration."""


@dataclass(frozen=True)
class Seen:
    """What the robot sees: `images` {camera: [H, W, 3] uint8 RGB}, `state` [S] f32 in the environment's units."""

    images: dict[str, NDArray[np.uint8]]
    state: NDArray[np.float32]


@dataclass(frozen=True)
class Moved:
    """After some steps of an episode: how many they were, what is `seen` then, whether the goal was reached, whether
    the episode is `over`, and the pictures after each step where they were asked for."""

    seen: Seen
    num_steps: int
    success: bool
    over: bool
    frames: list[dict[str, NDArray[np.uint8]]] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Demonstration:
    """An episode of L steps by the expert: `state` [L, S] f32 and `images` {camera: [L, H, W, 3]} before each step, the
    `actions` [L, A] f32 that the expert chose there."""

    success: bool
    state: NDArray[np.float32]
    actions: NDArray[np.float32]
    images: dict[str, NDArray[np.uint8]] = field(repr=False)


class Simulator:
    """The environment that `tree` declares (`Environment`). Raises `UserError` where it can't be made."""

    def __init__(self, tree: Mapping[str, Any]):
        self.environment = declared(tree, PATH)
        self._check_installed()
        self.env = instantiate(self.environment.env, f"{PATH}.env")
        self.num_steps = 0

    def reset(self, seed: int) -> Seen:
        """Begin the episode that `seed` says."""
        observation, _ = self.env.reset(seed=seed)
        self.num_steps = 0
        return self._see(observation)

    def act(self, actions: NDArray[np.float32], record: bool) -> Moved:
        """Take the steps `actions` [T, A], as far as the episode goes; `record`: keep what the cameras see."""
        frames: list[dict[str, NDArray[np.uint8]]] = []
        for number, action in enumerate(actions, start=1):
            observation, success, over = self._step(action)
            if record or over or number == len(actions):
                seen = self._see(observation)
                frames += [seen.images] if record else []
            if over or number == len(actions):
                return Moved(seen, number, success, over, frames)
        raise ValueError("no actions were given")

    def demonstrate(self, seed: int, hold: int) -> Demonstration:
        """The expert's episode from the start that `seed` says, with noise on what it does. It goes on until it has
        been at the goal for `hold` steps. Raises `UserError` where there is no expert."""
        declared = self.environment
        if declared.expert is None:
            raise UserError("no expert is known that could demonstrate the task", where=f"{PATH}.expert")
        observation, _ = self.env.reset(seed=seed)
        expert = instantiate(declared.expert, f"{PATH}.expert", env=self.env)
        noise, key = np.array(declared.expert_noise or 0.0), rng.key(seed, "expert")
        self.num_steps, seen, actions, left = 0, [], [], hold
        while left and self.num_steps < declared.max_steps:
            seen.append(self._see(observation))
            actions.append(self._clipped(expert(observation)))
            moved = actions[-1] + noise * rng.normal(rng.fold(key, self.num_steps), len(declared.actions))
            observation, success, over = self._step(moved)
            left -= success
            if over and not success:
                break
        pictures = {camera: np.stack([s.images[camera] for s in seen]) for camera in declared.cameras}
        return Demonstration(not left, np.stack([s.state for s in seen]), np.stack(actions), pictures)

    def _step(self, action: NDArray) -> tuple[Any, bool, bool]:
        """(observation, whether the goal is reached, whether the episode is over) after a step."""
        observation, _, terminated, truncated, info = self.env.step(self._clipped(action))
        self.num_steps += 1
        if self.environment.success not in info:
            raise UserError(
                f"a step's info has no '{self.environment.success}'",
                where=f"{PATH}.success",
                remedy=f"name one of {', '.join(map(str, info)) or 'its keys: it has none'}",
            )
        success = bool(info[self.environment.success])
        over = success or bool(terminated) or bool(truncated) or self.num_steps >= self.environment.max_steps
        return observation, success, over

    def _clipped(self, action: NDArray) -> NDArray[np.float32]:
        limits = self.environment.action_range
        action = np.asarray(action, np.float32)
        return action if limits is None else action.clip(*limits)

    def _see(self, observation: Any) -> Seen:
        declared = self.environment
        images = {camera: np.ascontiguousarray(at(observation, place)) for camera, place in declared.cameras.items()}
        state = () if declared.state is None else at(observation, declared.state)
        return Seen(images, np.array(state, np.float32))

    def _check_installed(self) -> None:
        try:
            locate(self.environment.env.get(TARGET), f"{PATH}.env")
        except UserError as error:
            if self.environment.install is None:
                raise
            raise UserError(error.what, remedy=f"install it: {self.environment.install}") from error
