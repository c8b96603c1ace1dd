"""A trained policy for a robot.

from opentau_train import load_policy

policy = load_policy("runs/droid/checkpoints/best")
actions = policy.act({"wrist": picture, "state": q, "task": "open the drawer"})     # [T, A] in the robot's units
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from opentau_train.checkpoints import pretrained
from opentau_train.checkpoints.pretrained import Loaded
from opentau_train.checkpoints.weight_files import locate
from opentau_train.data.batch import Batch
from opentau_train.data.convention import Convention
from opentau_train.deploy.latency import Latency, measure
from opentau_train.deploy.limits import Limits, check_finite
from opentau_train.deploy.observations import Observation, Reader
from opentau_train.deploy.robots import Robot, robots_of
from opentau_train.deploy.stream import Execution, Stream
from opentau_train.errors import UserError, did_you_mean
from opentau_train.models.draws import ACTION_DRAW, Draws
from opentau_train.models.sampling import SteppedPolicy


def load_policy(
    path: str | Path,
    device: torch.device | str = "cpu",
    *,
    norm_head: str | None = None,
    dataset: str | None = None,
    base: str | Path | None = None,
    trust: Sequence[str] = (),
) -> RobotPolicy:
    """The policy at `path`: a run (its newest checkpoint), a checkpoint (`RUN/checkpoints/best`), its
    `pretrained_model/`, a file that `tools.export` wrote, or a name on the Hugging Face Hub (`OWNER/NAME`,
    `OWNER/NAME@REVISION`) of one of these. `norm_head`: for which of its robots; `dataset`: as which of its datasets
    the robot speaks, where those of one norm head weren't converted alike; `base`: where frozen weights that a
    checkpoint leaves out lie now; `trust`: modules that the file may name classes of, besides this package and
    installed plugins: nothing else that it names is called.

    Raises `UserError` where there is none.
    """
    place = locate(str(path), "load_policy")
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else []
    if len(files) == 1 and not (place / "policy.json").is_file():  # an exported file by itself, as on the Hub
        place = files[0]
    loaded = pretrained.load_policy(place, device, base, trust)
    loaded = loaded if dataset is None else loaded.as_dataset(dataset)
    policy = RobotPolicy(loaded, torch.device(device), robots_of(loaded))
    return policy if norm_head is None else policy.for_robot(norm_head)


@dataclass(frozen=True)
class RobotPolicy:
    """A policy on a `device`. `robots` {norm head (robot_type::control_mode): what it reads and gives of that kind of
    robot}; `norm_head`, the one that is meant where none is said: the only one, or the one of `for_robot`.

    May be used by several threads at a time.
    """

    loaded: Loaded
    device: torch.device
    robots: Mapping[str, Robot]
    norm_head: str | None = None

    def for_robot(
        self,
        norm_head: str | None = None,
        *,
        fps: float | None = None,
        convention: Convention | Mapping[str, Any] | None = None,
    ) -> RobotPolicy:
        """The same policy for one of its robots. Raises `UserError` where it wasn't trained on it, on actions at `fps`,
        or on state and actions of that `convention` (as `data.sources.NAME.convention`)."""
        robot = self.robot(norm_head)
        robot.check(fps, convention)
        return replace(self, norm_head=robot.norm_head)

    def robot(self, norm_head: str | None = None) -> Robot:
        """The robot of a norm head. Raises `UserError` where there is none, or none is said and there are several."""
        head = norm_head or self.norm_head
        if head is None and len(self.robots) == 1:
            head = next(iter(self.robots))
        if head is not None and head in self.robots:
            return self.robots[head]
        what = "the policy knows several robots" if head is None else f"the policy wasn't trained on '{head}'"
        raise UserError(
            f"{what}{did_you_mean(head or '', self.robots)}",
            where="norm_head",
            remedy=f"say which: norm_head= one of {', '.join(self.robots) or '(none: an older version saved it)'}",
        )

    @property
    def norm_heads(self) -> tuple[str, ...]:
        """The robots that it was trained on, as robot_type::control_mode."""
        return tuple(self.robots)

    @property
    def cameras(self) -> tuple[str, ...]:
        return self.robot().cameras

    @property
    def state_names(self) -> tuple[str, ...]:
        return self.robot().state_names

    @property
    def action_names(self) -> tuple[str, ...]:
        return self.robot().action_names

    @property
    def fps(self) -> float:
        """Steps of a chunk a second."""
        return self.robot().fps

    @property
    def chunk_length(self) -> int:
        """Steps of a chunk, T."""
        return self.robot().chunk_length

    @property
    def convention(self) -> Convention:
        """What state and actions are, as far as it was declared."""
        return self.robot().convention

    @property
    def history(self) -> int:
        """How many earlier frames it looks at, h."""
        return self.loaded.spec.history

    def act(
        self,
        observation: Observation | Sequence[Observation],
        *,
        norm_head: str | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        limits: Limits | Literal["refuse", "clip"] | None = None,
    ) -> NDArray[np.float32]:
        """The chunk [T, A'] of an observation, or [B, T, A'] of several, in the robot's units, dimensions and
        convention.

        An observation has pictures by camera, `state`, and `task`; or the columns of a dataset. Cameras may be missing.
        What is drawn is a function of `seed`: one for all observations, or one for each. `steps`: of a policy that
        samples in steps, None: as it was trained. `limits`: see `Limits`.

        Raises `UserError` for what doesn't fit the policy, `UnsafeActions` for actions that aren't finite or are
        refused.
        """
        one = isinstance(observation, Mapping)
        observations: Sequence[Observation] = [observation] if one else observation  # type: ignore[list-item,assignment]
        robot = self.robot(norm_head)
        batch = self.batch(observations, robot.norm_head, seed)
        chunks = self.sample(batch.to(self.device), steps)
        actions = self.in_units(chunks, batch, limits)
        return actions[0] if one else actions

    def stream(
        self,
        horizon: int | None = None,
        *,
        ensemble: float | None = None,
        realtime: int | None = None,
        seed: int = 0,
        steps: int | None = None,
        limits: Limits | Literal["refuse", "clip"] | None = None,
    ) -> Stream:
        """Actions one at a time, for one episode: `stream.step(observation)` is the next action [A'].

        `horizon`: how many actions of a chunk are executed before the next one is computed; None: all of them, half of
        them with `realtime`, 1 with an `ensemble`. See `Execution`. Raises `UserError` for what doesn't go together.
        """
        if horizon is None:
            length = self.chunk_length if realtime is None else max(realtime, self.chunk_length // 2)
            horizon = 1 if ensemble is not None else length
        return Stream(self, Execution(horizon, ensemble, realtime, seed, steps, limits))

    def benchmark(
        self, observation: Observation | None = None, *, steps: int | None = None, repeats: int = 20
    ) -> Latency:
        """How long a chunk of an observation takes, part by part; None: of pictures of 480 x 640."""
        return measure(self, observation, steps, repeats)

    def batch(self, observations: Sequence[Observation], norm_head: str, seed: int | Sequence[int] = 0) -> Batch:
        """What the policy gets of observations of one kind of robot, on the CPU. Raises `UserError`."""
        if not observations:
            raise UserError("there is no observation", where="act", remedy="give one, or a list of some")
        seeds = [seed] * len(observations) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(observations):
            what = f"{len(seeds)} seeds for {len(observations)} observations"
            raise UserError(what, where="seed", remedy="give one for all, or one for each")
        reader = self.readers[norm_head]
        batch = self.loaded.observe([reader.read(observation) for observation in observations], norm_head)
        keys = np.array([seed % 2**64 for seed in seeds], np.uint64)
        return batch.replace(key=torch.from_numpy(keys.view(np.int64)))

    @torch.no_grad()
    def sample(self, batch: Batch, steps: int | None = None) -> torch.Tensor:
        """Normalised chunks [B, T, A] of a batch on the policy's device. Raises `UserError` where it has no steps."""
        draws, policy = Draws(batch.key, ACTION_DRAW), self.loaded.policy
        with self.autocast():
            if steps is None:
                return policy.sample_actions(batch, draws)
            return self.stepped("steps", steps).sample_actions(batch, draws, steps)

    def stepped(self, what: str, steps: int) -> SteppedPolicy:
        """The policy, if it samples in steps. Raises `UserError` where it doesn't, or for a number that is none."""
        policy = self.loaded.policy
        if not isinstance(policy, SteppedPolicy):
            name = type(policy).__name__
            raise UserError(f"{name} doesn't sample in steps", where=what, remedy=f"leave {what} out")
        if steps < 1:
            raise UserError(f"{what}={steps} is no number of steps", where=what, remedy=f"set it to {policy.num_steps}")
        return policy

    def in_units(
        self, chunks: torch.Tensor, batch: Batch, limits: Limits | Literal["refuse", "clip"] | None = None
    ) -> NDArray[np.float32]:
        """[B, T, A'] of normalised chunks, in the robot's units. Raises `UnsafeActions`."""
        robot = self.robots[batch.norm_head[0]]
        normalised = chunks[:, : robot.chunk_length].float().cpu()
        check_finite(normalised.numpy())
        if limits is not None:
            limits = Limits(limits) if isinstance(limits, str) else limits
            normalised = torch.from_numpy(limits.held(normalised.numpy(), robot.range))
        actions = self.loaded.units(normalised, batch)
        check_finite(actions)
        return actions

    def autocast(self) -> torch.autocast:
        """The precision that it was trained in."""
        low = self.loaded.meta["config"].get("trainer", {}).get("precision", "no") != "no"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=low)

    @cached_property
    def readers(self) -> dict[str, Reader]:
        """{norm head: what reads its robot's observations}."""
        spec, wants = self.loaded.spec, self.loaded.policy.wants()
        prompted = any("prompt" in transform.reads for transform in wants.transforms.values())
        sizes = {head: self.loaded.pipelines[head].picture_size(spec.image_size) for head in self.robots}
        return {
            head: Reader(robot, spec.cameras, sizes[head], spec.scaling, spec.history, prompted)
            for head, robot in self.robots.items()
        }
