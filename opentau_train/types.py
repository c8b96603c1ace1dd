"""What travels between the modules. All frozen; axes and dtypes stand in the docstrings.

Axes: E episodes, B samples, T action-chunk steps, A action dims, S state dims, h history, F future frames, H/W pixels,
G groups, K loss terms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from opentau_train.data.decode.decoding import AS_USUAL, Decoding


@dataclass(frozen=True)
class EpisodeTable:
    """Every episode of one source, as columns (arrays only: forked workers share their pages).

    `episode_index` [E] i64 as the dataset numbers them; `length` [E] i32 rows; `control_mode` [E] i16 codes into
    `control_modes`; `lacking` [E] whether a file of the episode is known to be missing (None: of no episode). Where an
    episode's rows and frames are stored is the source's own matter.
    """

    episode_index: NDArray[np.int64]
    length: NDArray[np.int32]
    control_mode: NDArray[np.int16]
    control_modes: tuple[str, ...]
    lacking: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.length)

    def select(self, keep: NDArray) -> EpisodeTable:
        """The episodes at the positions (or under the mask) `keep`, in that order."""
        names = ("episode_index", "length", "control_mode", *(("lacking",) if self.lacking is not None else ()))
        return dataclasses.replace(self, **{name: getattr(self, name)[keep] for name in names})


@dataclass(frozen=True)
class WindowSpec:
    """What one training window holds: `chunk_length` T actions from its frame on, and the frame's image with
    `history` h earlier ones, both at `fps` steps a second (None: the dataset's own rate). `image_size` is (H, W)
    of the batch: pictures come as the largest inside it that keeps their aspect ratio; None keeps the file's size.
    Where a read asks for them, cameras of `future_cameras` have `future` F later images too, `future_stride` steps
    after one another. `between`: of actions at another rate, what of them isn't on a straight line from row to row
    (`chunk.rows_at`). `scaling`: how pictures are brought to their size (`data.scaling`)."""

    chunk_length: int
    history: int = 0
    image_size: tuple[int, int] | None = None
    fps: float | None = None
    future: int = 0
    future_stride: int = 1
    future_cameras: tuple[str, ...] = ()
    between: Callable[[NDArray, NDArray, NDArray, NDArray], None] | None = None
    scaling: str = "bilinear"
    decoding: Decoding = AS_USUAL


@dataclass(frozen=True)
class RawWindow:
    """One window as the dataset has it, before normalisation.

    `images` {camera: [h+1, H', W', 3] uint8 RGB}, oldest first, the last one being the frame's own (frames before
    the episode's start repeat its first); `state` [S] f32; `actions` [T, A] f32 in the dataset's units, steps
    past the episode's end repeating its last row and marked in `is_pad` [T] bool; `prompts`, the texts to choose
    from (may be empty); `extra` {name: value}, what else the source reads, for transforms.

    Where the window's future was asked for, the cameras that have one give [h+1+F, H', W', 3], later frames after the
    frame's own, and `extra["future_is_pad"]` [F] bool marks those past the episode's end, which repeat its last.
    """

    images: dict[str, NDArray[np.uint8]]
    state: NDArray[np.float32]
    actions: NDArray[np.float32]
    is_pad: NDArray[np.bool_]
    prompts: tuple[str, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)


class Address(NamedTuple):
    """Which window: the dataset's place in the mixture, the episode's place in its table, the window's frame, and how
    often the dataset has been gone through before; and which of the dataset's modes its sample has, -1: a drawn one."""

    dataset: int
    episode: int
    frame: int
    pass_index: int
    mode: int = -1


LossTerms = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""{term: (sum [B] f32, count [B] f32)}: per-sample sums and counts, never a mean."""


@dataclass(frozen=True)
class BatchSpec:
    """The shape of what a mixture yields: what a policy needs to build itself.

    `cameras` in a fixed order, `image_size` (H, W), `history` h, `state_dim` S, `action_dim` A, `chunk_length` T;
    `norm_heads` and `modes` that samples have; `future` F later frames of `future_cameras`, `future_stride` steps after
    one another; `scaling`, by which pictures are brought to their size; `fields`, which the transforms add to
    `data.fields.FIELDS`.
    """

    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    history: int
    state_dim: int
    action_dim: int
    chunk_length: int
    norm_heads: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    future: int = 0
    future_stride: int = 1
    future_cameras: tuple[str, ...] = ()
    scaling: str = "bilinear"
    fields: tuple[Any, ...] = field(default=(), repr=False)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that fields name their axes by."""
        vectors = {"S": self.state_dim, "A": self.action_dim, "T": self.chunk_length}
        return vectors | {"h+1": self.history + 1, "F": self.future}

    def to_json(self) -> dict[str, Any]:
        """The spec as plain JSON data, without `fields`, which follow from the transforms."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "fields"}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> BatchSpec:
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in tree.items()}
        return cls(**values)


@dataclass(frozen=True)
class Group:
    """A row of the breakdown: the dataset's name, its control mode, the head its statistics belong to, its `share` of
    the mixture, and the `mode` of its samples, "" where all of the mixture have the same. The share is the dataset's
    weight times the group's part of its training samples. Shares have no common scale; 0 is a group that isn't trained
    on."""

    dataset: str
    control_mode: str
    norm_head: str
    share: float
    mode: str = ""

    @property
    def tag(self) -> str:
        return f"{self.dataset}/{self.control_mode}{self.mode and '/'}{self.mode}"

    @property
    def head_tag(self) -> str:
        """The tag of the norm head's groups of this mode."""
        return f"{self.norm_head}{self.mode and '/'}{self.mode}"
