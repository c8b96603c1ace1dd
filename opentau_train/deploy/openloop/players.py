"""Who predicts: a policy in this process, or one behind a server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from opentau_train.config import typed
from opentau_train.data.convention import Convention
from opentau_train.data.conventions.places import locate
from opentau_train.deploy.policy import RobotPolicy
from opentau_train.deploy.serving.client import Client
from opentau_train.errors import UserError


@dataclass(frozen=True)
class Reads:
    """What a policy reads and gives of one robot; `source`: how its training read the dataset's columns."""

    norm_head: str
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    fps: float
    chunk_length: int
    history: int
    convention: Convention
    source: Mapping[str, Any]

    def check(self, path: str) -> None:
        """Each value is bounded by itself."""

    @property
    def units(self) -> tuple[str, ...]:
        """[A'] of each action its unit, "" where none is declared."""
        made = dict.fromkeys(range(len(self.action_names)), "")
        declared = self.convention.actions
        for located in () if declared is None else locate(declared, self.action_names, "convention.actions"):
            unit = located.part.unit
            made |= dict.fromkeys(located.places, "" if unit is None or unit == "none" else unit)
        return tuple(made[place] for place in range(len(self.action_names)))


class Player(Protocol):
    """Predicts chunks for observations."""

    name: str
    reads: Reads

    def act(self, observation: Mapping[str, Any], seed: int) -> NDArray[np.float32]:
        """[T, A'] f32 in the robot's units. Raises `UserError`."""
        ...


class OwnPolicy:
    """A policy in this process, called `name`, for one of its robots."""

    def __init__(self, name: str, policy: RobotPolicy, norm_head: str | None = None):
        self.name, self._policy = name, policy
        robot = policy.robot(norm_head)
        self.reads = Reads(
            robot.norm_head,
            robot.state_names,
            robot.action_names,
            robot.fps,
            robot.chunk_length,
            policy.history,
            robot.convention,
            robot.source,
        )

    def act(self, observation: Mapping[str, Any], seed: int) -> NDArray[np.float32]:
        return self._policy.act(observation, norm_head=self.reads.norm_head, seed=seed)


class Served:
    """The policy of a server. Raises `UserError` where its metadata don't tell its robots."""

    def __init__(self, client: Client, norm_head: str | None = None):
        self.name, self._client = client.url, client
        robots = client.metadata.get("robots")
        if not isinstance(robots, dict) or not all(isinstance(told, dict) for told in robots.values()):
            raise UserError(
                "the server doesn't tell what its policy reads", where=client.url, remedy="serve it by tools.serve"
            )
        head = norm_head or client.metadata.get("norm_head") or ""
        if head not in robots:
            remedy = f"set norm_head to one of {', '.join(robots)}"
            raise UserError(f"the server's policy has no robot '{head}'", where="norm_head", remedy=remedy)
        told = {"norm_head": head, **robots[head]}
        told["chunk_length"] = told.pop("action_horizon", None)
        names = Reads.__dataclass_fields__
        self.reads = typed.build(Reads, {name: value for name, value in told.items() if name in names}, "metadata")

    def act(self, observation: Mapping[str, Any], seed: int) -> NDArray[np.float32]:
        return self._client.act({**observation, "seed": seed, "norm_head": self.reads.norm_head})
