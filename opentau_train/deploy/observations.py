"""Observations as users have them, and as `Pipeline.observe` takes them: names, shapes, types and gaps."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from opentau_train.data.names import fits
from opentau_train.deploy.pictures import frames_of
from opentau_train.deploy.robots import Robot
from opentau_train.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

Observation = Mapping[str, Any]
"""What a robot sees and is: pictures under the names of cameras, `state`, and `task` or `prompt`; or the same under the
names of a dataset's columns."""

STATE, PROMPT = ("state", "observation.state"), ("prompt", "task")
PASSED_OVER = ("action", "action.*", "actions", "timestamp", "index", "*_index", "next.*", "*_is_pad")
"""What rows of datasets have beside what a robot sees."""


@dataclass(frozen=True)
class Reader:
    """Reads observations of one `robot`. `cameras` of the policy, other robots' among them; `size` (H, W) inside which
    it takes pictures, and the filter `scaling` that brings them to it; `history` h earlier frames; whether it
    `reads_prompts`."""

    robot: Robot
    cameras: tuple[str, ...]
    size: tuple[int, int]
    scaling: str
    history: int
    reads_prompts: bool
    _told: set[str] = field(default_factory=set, repr=False, compare=False)

    def read(self, observation: Observation) -> dict[str, Any]:
        """{"images": {camera: [h+1, H', W', 3] uint8}, "state": [S'] f32, "prompt": str}. Reading it again changes
        nothing. Raises `UserError` for what the policy doesn't read, or can't; tells once what is missing."""
        if not isinstance(observation, Mapping):
            raise self._error(f"an observation is {type(observation).__name__}, not a mapping of names to values")
        images: dict[str, NDArray[np.uint8]] = {}
        columns: dict[str, Any] = {}
        prompt = ""
        for name, value in _flat(observation):
            camera = self._camera(name)
            if name in (*PROMPT, *self.robot.prompt_columns):
                prompt = self._text(name, value)
            elif camera is not None and camera in images:
                raise self._error(f"camera '{camera}' is there twice, also as '{name}'")
            elif camera is not None:
                images[camera] = self._frames(camera, _array(value))
            elif name in STATE or self._dims(name):
                columns[name] = self._numbers(name, _array(value))
            elif not any(fits(name, pattern) for pattern in PASSED_OVER):
                raise self._error(f"the policy doesn't read '{name}'{did_you_mean(name, self.known)}")
        state = self._state(columns)
        missing = [camera for camera in self.robot.cameras if camera not in images]
        if missing:
            self._tell(f"camera {', '.join(missing)} is missing: the policy acts without it")
        if self.reads_prompts and not prompt:
            self._tell("there is no task: the policy acts without one")
        return {"images": images, "state": state, "prompt": prompt}

    @property
    def known(self) -> tuple[str, ...]:
        """The names that it reads; those of the dataset's other columns of cameras and prompts it reads, too."""
        return (*self.cameras, *STATE, *PROMPT, *self._state_columns())

    def reads(self, name: str) -> bool:
        """Whether an observation may have something of this name."""
        prompts = (*PROMPT, *self.robot.prompt_columns)
        return name in (*prompts, *STATE) or self._camera(name) is not None or bool(self._dims(name))

    def _camera(self, name: str) -> str | None:
        """The camera that a name means: its own, its column's, or its column's last part, as datasets' are named."""
        if name in self.cameras:
            return name
        camera = self.robot.columns.get(name, name.rpartition(".")[2] if name.startswith("observation.") else name)
        return camera if camera in self.cameras else None

    def _frames(self, camera: str, value: NDArray) -> NDArray[np.uint8]:
        num = len(value) if value.ndim == 4 else 1
        if num not in (1, self.history + 1):  # before they are scaled: a stranger's may be a million of one pixel
            raise self._error(f"camera '{camera}' gives {num} frames, the policy takes {self.history + 1}")
        frames = frames_of(value, camera, self.size, halved=camera in self.robot.videos, scaling=self.scaling)
        if len(frames) == self.history + 1:
            return frames
        self._tell(f"camera {camera} gives one picture, which stands for {self.history} earlier ones too")
        return np.repeat(frames, self.history + 1, axis=0)

    def _state(self, columns: Mapping[str, NDArray]) -> NDArray[np.float32]:
        """[S'] f32: the whole, or put together from columns."""
        names = self.robot.state_names
        state = np.full(len(names), np.nan, np.float32)
        for column, values in columns.items():
            places = list(range(len(names))) if column == "state" else self._dims(column) or list(range(len(names)))
            numbers = [names[place].removeprefix(f"{column}[").removesuffix("]") for place in places]
            if values.shape == (len(places),):
                state[places] = values
            elif values.ndim == 1 and all(n.isdigit() and int(n) < len(values) for n in numbers):
                state[places] = values[[int(n) for n in numbers]]  # some dimensions are left out of the training
            else:
                raise self._error(
                    f"'{column}' has the shape {list(values.shape)}, the policy reads {len(places)} numbers"
                )
        if names and not columns:
            raise self._error("there is no state")
        if not np.isfinite(state).all():
            wrong = [name for name, value in zip(names, state, strict=True) if not np.isfinite(value)]
            raise self._error(f"of the state there is no finite number for {', '.join(wrong)}")
        return state

    def _dims(self, column: str) -> list[int]:
        """The places of the state's dimensions that belong to a dataset's column."""
        return [i for i, name in enumerate(self.robot.state_names) if name.startswith((f"{column}.", f"{column}["))]

    def _state_columns(self) -> Iterable[str]:
        return {name.partition("[")[0] for name in self.robot.state_names}

    def _numbers(self, name: str, values: NDArray) -> NDArray:
        if values.dtype.kind not in "biuf":
            raise self._error(f"'{name}' is {values.dtype}, not numbers")
        return values

    def _text(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self._error(f"'{name}' is {type(value).__name__}, not a text")
        return value

    def _tell(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            log.warning("%s: %s", self.robot.norm_head, what)

    def _error(self, what: str) -> UserError:
        robot, frames = self.robot, f"{self.history + 1} frames of " if self.history else ""
        return UserError(
            what,
            where=f"the observation of {robot.norm_head}",
            remedy=f"the policy reads {frames}the cameras {', '.join(robot.cameras) or '(none)'}; state: "
            f"{', '.join(robot.state_names) or '(none)'}; {'task' if self.reads_prompts else 'no task'}",
        )


def _flat(observation: Observation) -> Iterable[tuple[str, Any]]:
    """The names and values, those under `images` among them."""
    for name, value in observation.items():
        if name == "images" and isinstance(value, Mapping):
            yield from value.items()
        else:
            yield name, value


def _array(value: Any) -> NDArray:
    return np.atleast_1d(value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value))
