"""What a dataset must offer to be trained on: a `Source` describes it, its `Cursor`s read it forward.

`lerobot.py` has the implementation for LeRobot's formats; `docs/extending.md` shows another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from opentau_train.types import EpisodeTable, RawWindow, WindowSpec

UNKNOWN_ROBOT = "unknown"
"""`Source.robot_type` of a dataset that doesn't say."""


class Cursor(Protocol):
    """One reader that moves forward: each lane has its own. Reading backwards or jumping works and costs a seek."""

    def read(self, episode: int, frame: int, ahead: int = 0) -> RawWindow:
        """The window at `frame` of the episode at position `episode` of the table. The `ahead` frames after it will be
        asked for next, one by one: what that is good for is the cursor's own matter.

        Raises `BadSample` where the file can't give it.
        """
        ...

    def close(self) -> None: ...


class Source(Protocol):
    """A dataset, opened: metadata only, picklable and cheap to share with forked workers."""

    name: str
    """The source's name in the mixture (`data.sources.NAME`)."""
    robot_type: str
    fps: float
    cameras: tuple[str, ...]
    frame_sizes: Mapping[str, tuple[int, int]]
    """(H, W) in the files of each camera that is stored as video, (0, 0) where that isn't known: what a lane's open
    decoders cost."""
    state_names: tuple[str, ...]
    """One name a state dimension, e.g. `observation.state.joint_position[0]`."""
    action_names: tuple[str, ...]
    episodes: EpisodeTable
    fingerprint: str
    """A hash of the dataset's content as far as metadata and files tell without being read: the same for a copy."""
    rows_stamp: str
    """Changes when the rows may have, on this machine (modification times): what is cached of them depends on it."""

    def get_shuffle_blocks(self) -> NDArray[np.int32]:
        """`[N, 3]` int32 rows (position in the table, first frame, length): the runs of consecutive windows that
        the stream keeps together. By default whole episodes."""
        ...

    def cursors(self, window: WindowSpec) -> CursorFactory:
        """What makes cursors inside one worker process: they share open files."""
        ...

    def columns(self, positions: NDArray[np.int64]) -> Iterator[tuple[int, NDArray, NDArray]]:
        """(position, state [L, S] f32, actions [L, A] f32) of the episodes at `positions`; never decodes video."""
        ...


class CursorFactory(Protocol):
    """A worker's open files of one source."""

    def cursor(self) -> Cursor: ...

    def close(self) -> None: ...
