"""Actions one at a time: chunks are executed in parts, averaged, or computed while the robot moves."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opentau_train import rng
from opentau_train.data.batch import Batch
from opentau_train.deploy.limits import Limits
from opentau_train.deploy.observations import Observation
from opentau_train.deploy.realtime import Reach, tail_of
from opentau_train.errors import UserError
from opentau_train.models.act import TemporalEnsemble
from opentau_train.models.draws import ACTION_DRAW, Draws
from opentau_train.models.sampling import FlowSampler
from opentau_train.threads import in_background, settle

if TYPE_CHECKING:
    from opentau_train.deploy.policy import RobotPolicy


@dataclass(frozen=True)
class Execution:
    """How chunks of T steps become actions.

    `horizon`: so many actions of a chunk are executed before the next one is computed. `ensemble`: one is computed at
    every step, and what they say of a step is averaged, with `models.act.TemporalEnsemble`'s coefficient. `realtime`:
    the next chunk is computed while the robot executes so many more actions of the last one, and goes on from them. One
    of the two may be set. `seed`, `steps` and `limits`: of `RobotPolicy.act`; each chunk draws numbers of its own.
    """

    horizon: int
    ensemble: float | None = None
    realtime: int | None = None
    seed: int = 0
    steps: int | None = None
    limits: Limits | Literal["refuse", "clip"] | None = None

    def check(self, length: int) -> None:
        """Raises `UserError` for what chunks of `length` steps can't be."""
        delay = self.realtime or 0
        if self.ensemble is not None and (self.realtime is not None or self.horizon != 1):
            what, remedy = "an ensemble asks for a chunk at every step", "leave out horizon and realtime"
        elif not 0 <= 2 * delay <= length:
            what = (
                f"realtime={delay}: of a chunk's {length} steps so many are executed before the next one is begun, too"
            )
            remedy = f"set realtime between 0 and {length // 2}"
        elif not max(1, delay) <= self.horizon <= length - delay:
            what = f"horizon={self.horizon}: a chunk has {length} steps{f', and realtime={delay}' if delay else ''}"
            remedy = f"set horizon between {max(1, delay)} and {length - delay}"
        else:
            return
        raise UserError(what, where="stream", remedy=remedy)


@dataclass(frozen=True)
class Plan:
    """A chunk: `actions` [T, A'] in the robot's units, and as predicted (`chunk` [1, T, A]) for its `batch`."""

    actions: NDArray[np.float32]
    chunk: Tensor
    batch: Batch


class Stream:
    """One episode of a robot: `step` is called once for each observation, `policy.fps` times a second.

    Earlier frames that a policy looks at are those of the steps before. Not for several threads at a time.
    """

    def __init__(self, policy: RobotPolicy, execution: Execution):
        self.policy, self.execution, self.robot = policy, execution, policy.robot()
        execution.check(self.robot.chunk_length)
        if execution.realtime is not None and not isinstance(policy.loaded.policy, FlowSampler):
            name = type(policy.loaded.policy).__name__
            what = f"{name} has no flow that could be led to the last chunk"
            raise UserError(what, where="realtime", remedy="leave realtime out, or average chunks: ensemble=0.01")
        self.reset()

    def reset(self) -> None:
        """A new episode begins."""
        self.num_plans, self._place = 0, 0
        self._frames: deque[Mapping[str, NDArray[np.uint8]]] = deque(maxlen=self.policy.history + 1)
        self._plan: Plan | None = None
        self._next: Future[Plan] | None = None
        self._average = None if self.execution.ensemble is None else TemporalEnsemble(self.execution.ensemble)

    def step(self, observation: Observation) -> NDArray[np.float32]:
        """The action [A'] in the robot's units. Raises as `RobotPolicy.act`, of an earlier observation where chunks are
        computed meanwhile; the next step then begins anew."""
        if self.policy.history:
            observation = self._with_history(observation)
        horizon, delay = self.execution.horizon, self.execution.realtime or 0
        if self._next is None and (self._plan is None or self._place >= horizon):
            goes_on = self.execution.realtime is not None and self._place == horizon
            last = self._plan if goes_on else None

            def call() -> Plan:
                return self._planned(observation, last)

            self._next = in_background(call, "chunk") if goes_on and delay else settle(call)
        if self._next is not None and (self._plan is None or self._place >= horizon + delay):
            made, self._next = self._next, None
            self._plan, self._place = made.result(), 0 if self._plan is None else delay
        assert self._plan is not None, "made at the first step"
        action = self._plan.actions[self._place]
        self._place += 1
        if self._average is None:
            return action
        return self._average.update(torch.from_numpy(self._plan.actions)[None])[0].numpy()

    def _planned(self, observation: Observation, last: Plan | None) -> Plan:
        """The chunk of an observation, which goes on from the `last` one."""
        policy, execution = self.policy, self.execution
        seed = rng.fold_one(execution.seed % 2**64, self.num_plans)
        self.num_plans += 1
        batch = policy.batch([observation], self.robot.norm_head, seed)
        here = batch.to(policy.device)
        chunk = policy.sample(here, execution.steps) if last is None else self._led(here, batch, last)
        return Plan(policy.in_units(chunk, batch, execution.limits)[0], chunk, batch)

    @torch.no_grad()
    def _led(self, here: Batch, batch: Batch, last: Plan) -> Tensor:
        policy, execution, flow = self.policy, self.execution, self.policy.loaded.policy
        assert isinstance(flow, FlowSampler), "`__init__` refuses others"
        reach = Reach(self.robot.chunk_length, execution.horizon, execution.realtime or 0)
        tail = tail_of(policy.loaded.pipelines[self.robot.norm_head], (last.batch, last.chunk), batch, reach)
        with policy.autocast():
            steps = flow.num_steps if execution.steps is None else execution.steps
            return flow.denoise(here, flow.context(here), Draws(here.key, ACTION_DRAW), steps, tail.lead)

    def _with_history(self, observation: Observation) -> dict[str, Any]:
        """The observation with the frames of the steps before; the first picture of a camera stands for those before
        it, and the last one for steps that it missed."""
        read = self.policy.readers[self.robot.norm_head].read(observation)
        before = self._frames[-1] if self._frames else {}
        self._frames.append({**before, **{camera: frames[-1] for camera, frames in read["images"].items()}})
        images = {}
        for camera in read["images"]:
            seen = [frames[camera] for frames in self._frames if camera in frames]
            missing = self.policy.history + 1 - len(seen)
            images[camera] = np.stack(seen[:1] * missing + seen)
        return {**read, "images": images}
