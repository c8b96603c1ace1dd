"""What a client asks for, and what a server tells of its policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from opentau_train import __version__
from opentau_train.deploy.limits import Limits
from opentau_train.deploy.policy import RobotPolicy
from opentau_train.deploy.robots import Robot
from opentau_train.errors import UserError, did_you_mean
from opentau_train.models.sampling import SteppedPolicy

OPTIONS = ("seed", "steps", "norm_head")
"""Names in a client's message that are none of the observation: of `RobotPolicy.act`."""


@dataclass(frozen=True)
class Request:
    """An observation of one robot, and how its chunk is drawn. Requests of one `kind` may share a batch."""

    observation: Mapping[str, Any]
    norm_head: str
    seed: int
    steps: int | None

    @property
    def kind(self) -> tuple[str, int | None]:
        return self.norm_head, self.steps


@dataclass(frozen=True)
class Terms:
    """How a `policy` is served. `rename` {a client's name: the policy's or the dataset's; None: passed over}; `seed`
    and `steps` where a client says nothing; `limits` as of `RobotPolicy.act`; `max_batch`, how many clients' chunks are
    computed at once."""

    policy: RobotPolicy
    rename: Mapping[str, str | None] = field(default_factory=dict)
    seed: int = 0
    steps: int | None = None
    limits: Limits | Literal["refuse", "clip"] | None = None
    max_batch: int = 8

    def __post_init__(self) -> None:
        """Raises `UserError` for what the policy doesn't have."""
        if self.steps is not None:
            self.policy.stepped("steps", self.steps)
        for client, name in self.rename.items():
            if name is not None and not any(reader.reads(name) for reader in self.policy.readers.values()):
                known = [n for reader in self.policy.readers.values() for n in reader.known]
                raise UserError(
                    f"the policy doesn't read '{name}'{did_you_mean(name, known)}",
                    where=f"rename.{client}",
                    remedy=f"name one of {', '.join(dict.fromkeys(known))}",
                )

    def request(self, message: Mapping[str, Any]) -> Request:
        """What a client's message asks for. Raises `UserError`."""
        observation = self._renamed({name: value for name, value in message.items() if name not in OPTIONS})
        head, seed, steps = message.get("norm_head"), message.get("seed", self.seed), message.get("steps", self.steps)
        if head is not None and not isinstance(head, str):
            raise _option("norm_head", head, "a text")
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
            raise _option("seed", seed, "a whole number")
        if steps is not None:
            if isinstance(steps, bool) or not isinstance(steps, int | np.integer):
                raise _option("steps", steps, "a whole number")
            network = self.policy.stepped("steps", int(steps))
            most = max(network.num_steps, self.steps or 0)
            if steps > most:  # a client doesn't keep the others waiting as long as it likes
                raise UserError(
                    f"steps={steps} is over the server's {most}", where="steps", remedy=f"send up to {most}"
                )
            steps = int(steps)
        return Request(observation, self.policy.robot(head).norm_head, int(seed), steps)

    def _renamed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for client, value in values.items():
            name = self.rename.get(client, client)
            if name is None:
                continue
            if name in made:
                raise UserError(
                    f"'{name}' is there twice, also as '{client}'", where="the observation", remedy="send one"
                )
            made[name] = self._renamed(value) if name == "images" and isinstance(value, dict) else _plain(name, value)
        return made

    def metadata(self) -> dict[str, Any]:
        """What a client is told when it connects: of each robot, and at the top of the one that is meant where it names
        none."""
        policy = self.policy
        robots = {head: _told(policy, robot) for head, robot in policy.robots.items()}
        head = policy.norm_head or (next(iter(robots)) if len(robots) == 1 else None)
        network = policy.loaded.policy
        return {
            **(robots[head] if head is not None else {}),
            "norm_head": head,
            "norm_heads": list(robots),
            "robots": robots,
            "rename": dict(self.rename),
            "seed": self.seed,
            "steps": (self.steps or network.num_steps) if isinstance(network, SteppedPolicy) else None,
            "max_batch": self.max_batch,
            "server": f"opentau_train {__version__}",
        }


def _told(policy: RobotPolicy, robot: Robot) -> dict[str, Any]:
    return {
        "cameras": list(robot.cameras),
        "history": policy.history,
        "state_names": list(robot.state_names),
        "action_names": list(robot.action_names),
        "reads_prompts": policy.readers[robot.norm_head].reads_prompts,
        "fps": robot.fps,
        "action_horizon": robot.chunk_length,
        "convention": robot.convention.to_json(),
        "source": dict(robot.source),
    }


def _plain(name: str, value: Any) -> Any:
    """A value as the policy's reader takes it: lists become arrays. Raises `UserError` for what is no number or text,
    which the reader, whose users are no strangers, doesn't expect."""
    if isinstance(value, str | bool | int | float | np.generic):
        return value
    try:
        array = np.asarray(value) if isinstance(value, list | np.ndarray) else None
    except ValueError:  # lists of several lengths
        array = None
    if array is None or array.dtype.kind not in "biuf":
        kind = "a list of other things than numbers" if isinstance(value, list) else type(value).__name__
        raise UserError(
            f"'{name}' is {kind}", where="the observation", remedy="send a text, a number, or an array of numbers"
        )
    return array


def _option(name: str, value: Any, what: str) -> UserError:
    return UserError(f"{name} is {type(value).__name__}, not {what}", where=name, remedy=f"send {what}, or nothing")
