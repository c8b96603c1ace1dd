"""How long a policy takes for a chunk, part by part."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from opentau_train.deploy.observations import Observation
from opentau_train.deploy.robots import Robot
from opentau_train.errors import UserError
from opentau_train.models.draws import ACTION_DRAW, Draws
from opentau_train.models.sampling import SteppedPolicy

if TYPE_CHECKING:
    from opentau_train.deploy.policy import RobotPolicy

T = TypeVar("T")
CAMERA = (480, 640)
"""(H, W) of a picture where no observation is given."""


@dataclass(frozen=True)
class Latency:
    """Medians in milliseconds of `repeats` chunks: `preprocess`, an observation to the policy's inputs; `prefix`, what
    is computed once for a chunk (of a policy without steps the whole); `steps`, all `num_steps` of them together;
    `units`, back to the robot's. `seconds`, how long the robot executes the chunk of `chunk_length` steps."""

    preprocess: float
    prefix: float
    steps: float
    units: float
    num_steps: int
    repeats: int
    device: str
    chunk_length: int
    seconds: float

    @property
    def total(self) -> float:
        return self.preprocess + self.prefix + self.steps + self.units

    def __str__(self) -> str:
        rows = {"preprocess": self.preprocess, "prefix": self.prefix, f"{self.num_steps} steps": self.steps}
        rows |= {"units": self.units, "total": self.total}
        lines = [f"{name:<12}{value:9.2f} ms" for name, value in rows.items()]
        chunk = f"a chunk of {self.chunk_length} steps lasts {self.seconds * 1000:.0f} ms"
        return "\n".join([*lines, f"medians of {self.repeats} on {self.device}; {chunk}"])


def measure(policy: RobotPolicy, observation: Observation | None, steps: int | None, repeats: int) -> Latency:
    """See `RobotPolicy.benchmark`."""
    if repeats < 1:
        raise UserError(f"repeats={repeats} is no number of chunks", where="benchmark", remedy="set repeats=20")
    robot, network = policy.robot(), policy.loaded.policy
    if steps is not None:
        policy.stepped("steps", steps)
    num_steps = (network.num_steps if steps is None else steps) if isinstance(network, SteppedPolicy) else 0
    given = noise(policy, robot) if observation is None else observation
    times = [_chunk(policy, given, num_steps) for _ in range(3 + repeats)][3:]  # the first ones fill caches
    preprocess, prefix, denoise, units = (1000 * median(column) for column in zip(*times, strict=True))
    seconds, device = robot.chunk_length / robot.fps, str(policy.device)
    return Latency(preprocess, prefix, denoise, units, num_steps, repeats, device, robot.chunk_length, seconds)


@torch.no_grad()
def _chunk(policy: RobotPolicy, observation: Observation, num_steps: int) -> list[float]:
    """Seconds of each part."""
    spent: list[float] = []
    timed = partial(_timed, policy.device, spent)
    network, head = policy.loaded.policy, policy.robot().norm_head
    batch = timed(lambda: policy.batch([observation], head))
    here = batch.to(policy.device)
    draws = Draws(here.key, ACTION_DRAW)
    with policy.autocast():
        if isinstance(network, SteppedPolicy):
            context = timed(lambda: network.context(here))
            chunk = timed(lambda: network.denoise(here, context, draws, num_steps))
        else:
            chunk = timed(lambda: network.sample_actions(here, draws))
            spent.append(0.0)
    timed(lambda: policy.in_units(chunk, batch))
    return spent


def _timed(device: torch.device, spent: list[float], call: Callable[[], T]) -> T:
    start = time.perf_counter()
    made = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    spent.append(time.perf_counter() - start)
    return made


def noise(policy: RobotPolicy, robot: Robot) -> Observation:
    """Something to see for all cameras of the robot, and a state with no two numbers alike, as rotations need it."""
    random = np.random.default_rng(0)
    frames = (policy.history + 1, *CAMERA, 3)
    images = {camera: random.integers(0, 256, frames, np.uint8) for camera in robot.cameras}
    return {**images, "state": np.linspace(0.1, 1.0, len(robot.state_names)), "task": "open the drawer"}
