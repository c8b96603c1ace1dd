"""Predicted chunks beside recorded ones, as a file: arrays, and a JSON text of what they are; no pickle."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opentau_train.errors import UserError

VERSION = 1


@dataclass(frozen=True)
class Recording:
    """N windows of a dataset. `predicted` and `recorded` [N, T, A'] f32 in the robot's units; `is_pad` [N, T] bool,
    steps past the episode's end; `state` [N, S'] f32; `episode` and `frame` [N] i64 as the dataset numbers them;
    `second` [N] f64, where the window begins; `milliseconds` [N] f64, how long the chunk was waited for. `about`:
    `policy`, `dataset`, `norm_head`, `seed`, `fps` of a chunk's steps, and the `action_names`, `units`, `state_names`
    of the dimensions."""

    predicted: NDArray[np.float32]
    recorded: NDArray[np.float32]
    is_pad: NDArray[np.bool_]
    state: NDArray[np.float32]
    episode: NDArray[np.int64]
    frame: NDArray[np.int64]
    second: NDArray[np.float64]
    milliseconds: NDArray[np.float64]
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.predicted)

    @property
    def errors(self) -> NDArray[np.float64]:
        """[N, T, A'] absolute errors, NaN for steps past the end."""
        errors = np.abs(self.predicted.astype(np.float64) - self.recorded)
        return np.where(self.is_pad[..., None], np.nan, errors)

    @property
    def mae(self) -> NDArray[np.float64]:
        """[A'] mean absolute error of all steps before the end."""
        return np.nanmean(self.errors, axis=(0, 1))

    @property
    def mae_of_steps(self) -> NDArray[np.float64]:
        """[T', A'] of each step of a chunk; T' steps are before the end of some window's episode."""
        there = ~self.is_pad.all(axis=0)
        return np.nanmean(self.errors[:, there], axis=0)

    @property
    def spread(self) -> NDArray[np.float64]:
        """[A'] standard deviation of the recorded actions: the error of one who knows their mean, and no more."""
        return self.recorded[~self.is_pad].astype(np.float64).std(axis=0)

    def save(self, path: Path) -> None:
        """Write the file. Raises OSError."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "about"}
        about = np.frombuffer(json.dumps({"version": VERSION, **self.about}).encode(), np.uint8)
        with path.open("wb") as file:
            np.savez_compressed(file, about=about, **arrays)

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read a file that `save` wrote. Raises `UserError`."""
        try:
            with np.load(path, allow_pickle=False) as file:
                values = {f.name: file[f.name] for f in fields(cls)}
            about = json.loads(values.pop("about").tobytes())
            if about.pop("version") != VERSION:
                raise ValueError("another version of this program wrote it")
            made = cls(about=about, **values)
            shape = made.predicted.shape
            if made.recorded.shape != shape or made.is_pad.shape != shape[:2] or shape[2] != len(about["action_names"]):
                raise ValueError("its arrays don't fit each other")
            return made
        except (OSError, ValueError, KeyError, IndexError, TypeError, zipfile.BadZipFile) as error:
            raise UserError(
                f"no recording is there: {str(error) or type(error).__name__}",
                where=str(path),
                remedy="give a file that tools.record wrote",
            ) from error
