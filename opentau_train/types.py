"""What travels between the modules. All frozen; axes and dtypes stand in the docstrings.

Axes: E episodes, B samples, T action-chunk steps, A action dims, S state dims, h history, H/W pixels, G groups,
K loss terms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class EpisodeTable:
    """Every episode of one source, as columns (arrays only: forked workers share their pages).

    `episode_index` [E] i64 as the dataset numbers them; `length` [E] i32 rows; `control_mode` [E] i16 codes into
    `control_modes`. Where an episode's rows and frames are stored is the source's own matter.
    """

    episode_index: NDArray[np.int64]
    length: NDArray[np.int32]
    control_mode: NDArray[np.int16]
    control_modes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.length)

    def select(self, keep: NDArray) -> EpisodeTable:
        """The episodes at the positions (or under the mask) `keep`, in that order."""
        return EpisodeTable(
            episode_index=self.episode_index[keep],
            length=self.length[keep],
            control_mode=self.control_mode[keep],
            control_modes=self.control_modes,
        )


@dataclass(frozen=True)
class WindowSpec:
    """What one training window holds: `chunk_length` T actions from its frame on, and the frame's image with
    `history` h earlier ones, both at `fps` steps a second (None: the dataset's own rate). `image_size` is (H, W)
    of the batch: pictures come as the largest inside it that keeps their aspect ratio; None keeps the file's size."""

    chunk_length: int
    history: int = 0
    image_size: tuple[int, int] | None = None
    fps: float | None = None


@dataclass(frozen=True)
class RawWindow:
    """One window as the dataset has it, before normalisation.

    `images` {camera: [h+1, H', W', 3] uint8 RGB}, oldest first, the last one being the frame's own (frames before
    the episode's start repeat its first); `state` [S] f32; `actions` [T, A] f32 in the dataset's units, steps
    past the episode's end repeating its last row and marked in `is_pad` [T] bool; `prompts`, the texts to choose
    from (may be empty).
    """

    images: dict[str, NDArray[np.uint8]]
    state: NDArray[np.float32]
    actions: NDArray[np.float32]
    is_pad: NDArray[np.bool_]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Provenance:
    """Where a sample comes from. Never dropped, never shown to the policy's `forward`.

    `dataset_index`: the dataset's place in the mixture; `dataset_repo_id`: its deduplicated name there; `group`:
    id of (dataset, control_mode); `norm_head`: robot_type::control_mode; `pass_index`: how often the dataset has
    been gone through before.
    """

    dataset_index: int
    dataset_repo_id: str
    group: int
    norm_head: str
    episode_index: int
    frame_index: int
    pass_index: int


@dataclass(frozen=True)
class Sample:
    """One normalised, padded training sample.

    `images` {camera: [h+1, H', W', 3] uint8}, at most as large as the batch's, absent cameras left out; `state` [S]
    f32 and `actions` [T, A] f32, normalised, zero where padded; `state_dim_mask` [S], `action_is_pad` [T] and
    `action_dim_mask` [A] bool; `key`: the sample's 64-bit random key; `weight`: 0.0 for a filler that only keeps ranks
    in step.
    """

    images: dict[str, NDArray[np.uint8]]
    state: NDArray[np.float32]
    actions: NDArray[np.float32]
    state_dim_mask: NDArray[np.bool_]
    action_is_pad: NDArray[np.bool_]
    action_dim_mask: NDArray[np.bool_]
    prompt: str
    mode: str
    key: int
    provenance: Provenance
    weight: float = 1.0


@dataclass(frozen=True)
class Batch:
    """Samples stacked.

    `images` {camera: [B, h+1, 3, H, W] uint8} for every camera of the mixture, `camera_mask` {camera: [B] bool};
    `state` [B, S] f32; `state_dim_mask` [B, S] bool; `actions` [B, T, A] f32; `action_is_pad` [B, T] bool;
    `action_dim_mask` [B, A] bool; `prompt` B strings; `mode` B strings; `key` [B] i64 (the bits of the uint64
    key); `group`, `dataset_index`, `episode_index`, `frame_index`, `pass_index` [B] i64; `norm_head` B strings;
    `weight` [B] f32 (0 = filler).
    """

    images: dict[str, torch.Tensor]
    camera_mask: dict[str, torch.Tensor]
    state: torch.Tensor
    state_dim_mask: torch.Tensor
    actions: torch.Tensor
    action_is_pad: torch.Tensor
    action_dim_mask: torch.Tensor
    prompt: list[str]
    mode: list[str]
    key: torch.Tensor
    group: torch.Tensor
    dataset_index: torch.Tensor
    episode_index: torch.Tensor
    frame_index: torch.Tensor
    pass_index: torch.Tensor
    norm_head: list[str]
    weight: torch.Tensor

    def __len__(self) -> int:
        return len(self.prompt)

    def map(self, tensor, sequence) -> Batch:
        """A batch with `tensor` applied to every tensor field and `sequence` to every list field."""

        def apply(value):
            if isinstance(value, dict):
                return {name: tensor(item) for name, item in value.items()}
            return sequence(value) if isinstance(value, list) else tensor(value)

        return Batch(*(apply(getattr(self, f.name)) for f in dataclasses.fields(self)))

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        return self.map(lambda t: t.to(device, non_blocking=True), lambda s: s)

    def split(self, size: int) -> Iterator[Batch]:
        """Consecutive micro-batches of at most `size` samples."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield self.map(lambda t: t[part], lambda s: s[part])  # noqa: B023 (used at once)


@dataclass(frozen=True)
class Noise:
    """The flow's randomness for a batch: `noise` [B, T, A] f32 standard normal, `time` [B] f32 in [0, 1)."""

    noise: torch.Tensor
    time: torch.Tensor


LossTerms = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""{term: (sum [B] f32, count [B] f32)}: per-sample sums and counts, never a mean."""


@dataclass(frozen=True)
class BatchSpec:
    """The shape of what a mixture yields: what a policy needs to build itself.

    `cameras` in a fixed order, `image_size` (H, W), `history` h, `state_dim` S, `action_dim` A, `chunk_length` T.
    """

    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    history: int
    state_dim: int
    action_dim: int
    chunk_length: int


@dataclass(frozen=True)
class Group:
    """A row of the breakdown: the dataset's name, its control mode, the head its statistics belong to, and its `share`
    of the mixture: the dataset's weight times the group's part of its training windows. Shares have no common scale;
    0 is a group that isn't trained on."""

    dataset: str
    control_mode: str
    norm_head: str
    share: float

    @property
    def tag(self) -> str:
        return f"{self.dataset}/{self.control_mode}"
