"""The table of what a batch holds, and the classes of its rows.

A `Field` says what one sample has (its name, shape, dtype, what fills it where nothing is there) and how samples are
stacked, joined and cut. A new field is one line here, or one line in the transform that writes it, and whoever reads
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opentau_train.types import BatchSpec

Sample = Mapping[str, Any]
"""One sample: {field: value}, a numpy array, a number, a string, or for pictures {camera: array}. What is left out is
blank."""


@dataclass(frozen=True)
class Field:
    """A tensor [B, *dims] of the batch.

    `dims` are numbers or the names of sizes of the mixture (`BatchSpec.sizes`): T action steps, A action dims, S state
    dims, ... `fill` is the value where a sample has none, as in blank rows.
    """

    name: str
    dims: tuple[str | int, ...] = ()
    dtype: type = np.float32
    fill: Any = 0

    on_host: ClassVar[bool] = False
    """True: the batch's value stays in the host's memory, wherever its tensors are."""

    def shape(self, spec: BatchSpec) -> tuple[int, ...]:
        """The shape of one sample's value."""
        sizes = spec.sizes
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.dims)

    def blank(self, spec: BatchSpec) -> Any:
        """One sample's value where the sample has none: `fill` throughout."""
        return np.full(self.shape(spec), self.fill, self.dtype)

    def of(self, samples: Sequence[Sample], spec: BatchSpec) -> list[Any]:
        """The value of each sample, blank where it has none."""
        return [sample[self.name] if self.name in sample else self.blank(spec) for sample in samples]

    def stack(self, samples: Sequence[Sample], spec: BatchSpec) -> Any:
        """The samples' values, stacked to the batch's value."""
        values: NDArray = np.array(self.of(samples, spec), self.dtype)  # a third of what np.stack takes
        return torch.from_numpy(values.view(np.int64) if self.dtype is np.uint64 else values)

    def join(self, values: Sequence[Any], order: Sequence[int]) -> Any:
        """Row i of the result is row `order[i]` of the values laid end to end."""
        return torch.cat(list(values))[torch.tensor(order)]

    def rows(self, value: Any, index: slice | Tensor) -> Any:
        """The rows of a batch's value that `index` selects, in its order; a tensor is where the value is."""
        return value[index]

    def each(self, value: Any, call: Callable[[Tensor], Tensor]) -> Any:
        """A batch's value with `call` applied to each of its tensors."""
        return call(value)


@dataclass(frozen=True)
class TextField(Field):
    """A list of B strings."""

    dtype: type = str
    fill: str = ""

    on_host: ClassVar = True

    def blank(self, spec: BatchSpec) -> str:
        return self.fill

    def stack(self, samples: Sequence[Sample], spec: BatchSpec) -> list[str]:
        return self.of(samples, spec)

    def join(self, values: Sequence[list[str]], order: Sequence[int]) -> list[str]:
        flat = [text for value in values for text in value]
        return [flat[i] for i in order]

    def rows(self, value: list[str], index: slice | Tensor) -> list[str]:
        return value[index] if isinstance(index, slice) else [value[i] for i in index.tolist()]

    def each(self, value: list[str], call: Callable[[Tensor], Tensor]) -> list[str]:
        return value


@dataclass(frozen=True)
class TokenCounts(Field):
    """[B, K] int64, of numpy: how many tokens each sample has of each of a policy's kinds (`Batch.counted`)."""

    on_host: ClassVar = True

    def each(self, value: NDArray[np.int64], call: Callable[[Tensor], Tensor]) -> NDArray[np.int64]:
        return value


@dataclass(frozen=True)
class _PerCamera(Field):
    """{camera: [B, *dims]} for every camera of the mixture, or of the `BatchSpec`'s list `cameras`. In a sample, absent
    cameras are left out."""

    cameras: str = "cameras"

    def blank(self, spec: BatchSpec) -> dict[str, NDArray]:
        return {}

    def rows(self, value: dict[str, Tensor], index: slice | Tensor) -> dict[str, Tensor]:
        return {camera: tensor[index] for camera, tensor in value.items()}

    def each(self, value: dict[str, Tensor], call: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        return {camera: call(tensor) for camera, tensor in value.items()}

    def join(self, values: Sequence[dict[str, Tensor]], order: Sequence[int]) -> dict[str, Tensor]:
        return {camera: self._join([value[camera] for value in values], order) for camera in values[0]}

    def _join(self, tensors: list[Tensor], order: Sequence[int]) -> Tensor:
        return torch.cat(tensors)[torch.tensor(order)]


@dataclass(frozen=True)
class PictureField(_PerCamera):
    """{camera: [B, frames, 3, H, W] uint8}; `dims` name the number of frames. In a sample [frames, H', W', 3], at most
    as large as the batch's: smaller ones stand in the middle of black, absent ones are black.

    Channels stay last in memory: to move them costs more than to copy the picture, and the device does it faster.
    """

    dims: tuple[str | int, ...] = ("h+1",)
    dtype: type = np.uint8

    def shape(self, spec: BatchSpec) -> tuple[int, ...]:
        return (*super().shape(spec), *spec.image_size, 3)

    def stack(self, samples: Sequence[Sample], spec: BatchSpec) -> dict[str, Tensor]:
        values = self.of(samples, spec)
        return {c: self._stack([value.get(c) for value in values], spec) for c in getattr(spec, self.cameras)}

    def _stack(self, pictures: Sequence[NDArray | None], spec: BatchSpec) -> Tensor:
        stacked = np.zeros((len(pictures), *self.shape(spec)), np.uint8)
        middle: dict[tuple[int, ...], NDArray] = {}  # where pictures of a shape go
        for row, picture in enumerate(pictures):
            if picture is not None:
                if picture.shape not in middle:
                    middle[picture.shape] = centred(stacked, *picture.shape[1:3])
                middle[picture.shape][row] = picture
        return torch.from_numpy(stacked).movedim(-1, 2)

    def _join(self, tensors: list[Tensor], order: Sequence[int]) -> Tensor:
        """Copied once, each row from its part to its place, as the rows lie in memory."""
        joined = torch.empty((len(order), *tensors[0].movedim(2, -1).shape[1:]), dtype=torch.uint8)
        goes_to = torch.empty(len(order), dtype=torch.int64)
        goes_to[torch.tensor(order)] = torch.arange(len(order))
        start = 0
        for tensor in tensors:
            joined[goes_to[start : start + len(tensor)]] = tensor.movedim(2, -1)
            start += len(tensor)
        return joined.movedim(-1, 2)


@dataclass(frozen=True)
class PresenceField(_PerCamera):
    """{camera: [B] bool}: whether the sample has pictures of the camera."""

    dtype: type = np.bool_
    pictures: str = "images"

    def stack(self, samples: Sequence[Sample], spec: BatchSpec) -> dict[str, Tensor]:
        cameras = getattr(spec, self.cameras)
        return {c: torch.tensor([c in s.get(self.pictures, {}) for s in samples]) for c in cameras}


FIELDS: tuple[Field, ...] = (
    # What a policy sees.
    PictureField("images"),
    PresenceField("camera_mask"),
    Field("state", ("S",)),  # normalised, 0 where padded
    Field("state_dim_mask", ("S",), np.bool_),
    TextField("prompt"),
    # What it learns from.
    Field("actions", ("T", "A")),  # normalised, 0 where padded
    Field("action_is_pad", ("T",), np.bool_, True),
    Field("action_dim_mask", ("A",), np.bool_),
    TextField("mode", fill="policy"),
    Field("key", (), np.uint64),  # the sample's random key, its bits as int64
    Field("weight"),  # of the sample in the training loss; 0 = it counts nowhere, as a filler that keeps ranks in step
    # Where it comes from: never dropped, never shown to the policy's `forward`.
    Field("group", (), np.int64),  # id of (dataset, control_mode), and the mode where there are several
    Field("dataset_index", (), np.int64),  # the dataset's place in the mixture
    TextField("dataset_repo_id"),  # its deduplicated name there
    TextField("norm_head"),  # robot_type::control_mode
    Field("episode_index", (), np.int64),
    Field("frame_index", (), np.int64),
    Field("pass_index", (), np.int64),  # how often the dataset has been gone through before
)
"""The fields of every batch. Transforms add their own (`Transform.fields`), which stand after these in
`BatchSpec.fields`."""


FUTURE: tuple[Field, ...] = (
    PictureField("future", ("F",), cameras="future_cameras"),
    PresenceField("future_mask", cameras="future_cameras", pictures="future"),
    Field("future_is_pad", ("F",), np.bool_, True),  # past the episode's end, or of a sample without
)
"""The fields of batches with future frames, of the samples whose modes have them."""


def fields_of(spec: BatchSpec) -> tuple[Field, ...]:
    """All fields of a mixture's batches."""
    return FIELDS + (FUTURE if spec.future else ()) + spec.fields


def centred(out: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """The view [..., `height`, `width`, 3] of the middle of `out` [..., H, W, 3]: where a smaller picture goes."""
    top, left = (out.shape[-3] - height) // 2, (out.shape[-2] - width) // 2
    return out[..., top : top + height, left : left + width, :]
