"""What a dataset must offer to be trained on: `SourceOptions` say how it is read and open it, a `Source` describes it,
its `Cursor`s read it forward.

`data/lerobot/` has the implementation for LeRobot's formats; `docs/extending.md` shows another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from opentau_train.config.data import SourceSettings
from opentau_train.types import EpisodeTable, RawWindow, WindowSpec

UNKNOWN_ROBOT = "unknown"
"""`Source.robot_type` of a dataset that doesn't say."""


class Cursor(Protocol):
    """One reader that moves forward: each lane has its own. Reading backwards or jumping works and costs a seek."""

    def read(self, episode: int, frame: int, ahead: int = 0, *, future: bool = False) -> RawWindow:
        """The window at `frame` of the episode at position `episode` of the table. The `ahead` frames after it will be
        asked for next, one by one; a cursor may decode them at once, or ignore the hint. `future`: with the window's
        future frames, which is asked only of a source with cameras.

        Raises `BadSample` where the file can't give it.
        """
        ...

    def close(self) -> None: ...


class SourceOptions(Protocol):
    """What `data.sources.NAME._target_` names: a class built from the source's own options, all keys of the source that
    are no `SourceSettings`. They are checked against its signature when the configuration is."""

    selects: ClassVar[bool]
    """Whether `open` follows the settings that choose among episodes and windows or say what they are
    (`SourceSettings`' filters, control mode and robot type). Where it doesn't, the mixture refuses them."""

    def open(self, name: str, settings: SourceSettings) -> Source:
        """The dataset that is called `name` in the mixture. `settings.root` is a local directory, or None where none is
        given: whether it is needed is for the class to say. A URL comes as it was given; LeRobot's datasets alone get
        the directory that `data/remote` keeps for it.

        Raises `UserError` for what is missing, broken or unknown.
        """
        ...


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
        """A factory of cursors for one worker process, which share open files and read windows as `window` says."""
        ...

    def columns(self, positions: NDArray[np.int64]) -> Iterator[tuple[int, NDArray, NDArray]]:
        """(position, state [L, S] f32, actions [L, A] f32) of the episodes at `positions`; never decodes video. One
        that is passed over has no rows that can be read, and isn't trained on."""
        ...


@runtime_checkable
class FileSource(Source, Protocol):
    """A source of files below one directory: where that lies on a server, they are fetched before they are read."""

    def files(self, position: int) -> list[Path]:
        """What a cursor opens for the episode at `position` of the table."""
        ...


@runtime_checkable
class FiledSource(Source, Protocol):
    """A source whose `columns` several threads may go through at once, each through episodes of its own."""

    def row_files(self) -> NDArray[np.int32] | None:
        """[E] the number of the file that holds each episode's rows: those of one are best read one after another. None
        where only one thread may read."""
        ...


@runtime_checkable
class PromptedSource(Source, Protocol):
    """A source that can tell its prompts before its windows are read: what a policy can't take is refused then."""

    def prompts(self, positions: NDArray[np.int64]) -> Iterator[str]:
        """The texts that windows of the episodes at `positions` may have as prompts, some several times; never decodes
        video. Raises `UserError`."""
        ...


class Keyframes(NamedTuple):
    """At which frames an episode's videos can be entered: `frame` [K] i32 by rising episode and frame, those of episode
    e ending at `ends[e]` ([E] i64). An episode's first may be negative: so many frames before its own must be decoded
    for them."""

    ends: NDArray[np.int64]
    frame: NDArray[np.int32]


@runtime_checkable
class VideoSource(Source, Protocol):
    """A source that can tell where its videos can be entered: lanes begin there, and decode no frame in vain."""

    def keyframes(self, cache: Path) -> Keyframes | None:
        """Those of all episodes; None where they aren't known. May keep below `cache` what takes long to find out.
        Raises `UserError`."""
        ...


def whole_episodes(length: NDArray[np.int32]) -> NDArray[np.int32]:
    """[N, 3] int32 blocks (position, 0, length): every episode in one run."""
    return np.stack([np.arange(len(length)), np.zeros(len(length)), length], axis=1).astype(np.int32)


class CursorFactory(Protocol):
    """Makes the cursors of one source in one worker process, and holds the files that they share."""

    def cursor(self) -> Cursor:
        """A new cursor, for one lane."""
        ...

    def close(self) -> None:
        """Close the files. The cursors must not be used any more."""
        ...
