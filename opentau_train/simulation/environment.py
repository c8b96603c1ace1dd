"""What is declared of an environment, in conf/simulation/NAME.yaml: how it is made, and what its observations and
actions are called. Nothing here imports a simulator.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from opentau_train.config import typed
from opentau_train.config.bounds import Count, positive
from opentau_train.data.convention import Convention
from opentau_train.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Environment:
    """An environment of gymnasium's API, and the names that a policy knows its parts by."""

    env: dict[str, Any]
    """{_target_, options}: a class or function that makes it, called in a process of its own. It has `reset(seed=)`,
    `step(action)` and `close()`; a seed says all of an episode's start."""
    actions: tuple[str, ...]
    """The names of an action's numbers, in order."""
    success: str
    """The key of `info` that is true, or above 0, at a step that has reached the goal. The episode then ends."""
    fps: Annotated[float, positive]
    """Steps a second."""
    max_steps: Count
    """An episode that has not reached the goal by then has failed."""
    robot_type: str
    control_mode: str = "default"
    cameras: dict[str, str] = field(default_factory=dict)
    """{the policy's camera: where the observation has its picture, [H, W, 3] uint8; a/b is the entry b of a}"""
    state: str | None = None
    """Where the observation has the state [S]; None: it has none."""
    state_names: tuple[str, ...] = ()
    action_range: tuple[float, float] | None = None
    """Numbers outside are clipped to it before a step."""
    task: str | None = None
    """Which task the environment is made with, where it has several."""
    prompt: str | None = None
    """What the policy is told; None: the task's name in words."""
    convention: Convention = field(default_factory=Convention)
    """What the numbers mean, as far as that is known (docs/data.md)."""
    expert: dict[str, Any] | None = None
    """{_target_, options}: called with the environment before each episode, gives a function from an observation to an
    action [A]. None: nothing is known that could demonstrate the task."""
    expert_noise: tuple[float, ...] = ()
    """Standard deviation of what is added to each number of the expert's action before it is executed."""

    install: str | None = None
    """What to install where the module of `env` is missing."""

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if self.prompt is not None else re.sub(r"-v\d+$", "", self.task or "").replace("-", " ")

    def check(self, path: str) -> None:
        if self.state is not None and not self.state_names:
            raise UserError(f"{path}.state_names is empty", remedy="name the numbers of the state, in order")
        if self.expert_noise and len(self.expert_noise) != len(self.actions):
            raise UserError(
                f"{path}.expert_noise has {len(self.expert_noise)} numbers, an action {len(self.actions)}",
                remedy="give one for each of the action's numbers",
            )


_ABSENT = object()


def declared(tree: Mapping[str, Any], path: str) -> Environment:
    """The environment that `tree` declares. Raises `UserError` for mistakes in it."""
    return typed.build(Environment, tree, path)


def at(observation: Any, place: str) -> Any:
    """The entry of nested mappings that `place` leads to, "" being the observation itself. Raises `UserError`."""
    value = observation
    for key in filter(None, place.split("/")):
        # Asked for once: a mapping may draw its pictures when they are read, `in` among the ways.
        entry = value.get(key, _ABSENT) if isinstance(value, Mapping) else _ABSENT
        if entry is _ABSENT:
            known = list(value) if isinstance(value, Mapping) else []
            raise UserError(
                f"the observation has no '{place}'{did_you_mean(key, known)}",
                where="the environment's cameras and state",
                remedy=f"it has {', '.join(map(str, known)) or f'no entries: it is {type(value).__name__}'}",
            )
        value = entry
    return value
