"""The transform that normalises by a norm head's statistics, and back to the dataset's units."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from opentau_train.data.transforms.base import Record, SampleDraws, Transform


@dataclass(frozen=True)
class Affine:
    """z = (x - `offset`) * `scale` for each of D dimensions, float32; scale 0 marks one that is constant. Both are [D],
    or [T, D] for each step of a chunk, whose last row counts for longer chunks, too."""

    offset: NDArray[np.float32]
    scale: NDArray[np.float32]

    def normalize(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """[..., D] in the dataset's units -> normalised float32."""
        offset, scale = self._of_steps(x)
        out = np.subtract(x, offset, dtype=np.float32, casting="same_kind")
        return np.multiply(out, scale, out=out)

    def denormalize(self, z: NDArray[np.float32]) -> NDArray[np.float32]:
        """[..., D] normalised -> in the dataset's units."""
        offset, scale = self._of_steps(z)
        inverse = np.where(scale > 0, 1.0 / np.where(scale > 0, scale, 1.0), 0.0)
        return (z * inverse + offset).astype(np.float32)

    def _of_steps(self, x: NDArray) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Offset and scale of the steps that `x` has."""
        if self.offset.ndim == 1:
            return self.offset, self.scale
        steps = np.minimum(np.arange(x.shape[-2]), len(self.offset) - 1)
        return self.offset[steps], self.scale[steps]


Vector = tuple[float, ...] | tuple[tuple[float, ...], ...]
"""[D], or [T, D] for each step of a chunk."""


@dataclass(frozen=True)
class Normalize(Transform):
    """Normalises state and actions of each norm head: `heads` {norm head: {"state" or "actions": (offset, scale)}}, the
    numbers of one row, or of the actions those of each step."""

    heads: dict[str, dict[str, tuple[Vector, Vector]]]

    reads: ClassVar = ("state", "actions", "norm_head")
    writes: ClassVar = ("state", "actions")
    broadcasts: ClassVar = True

    def __call__(self, record: Record, draws: SampleDraws) -> Record:
        for name, affine in self.affine[record["norm_head"]].items():
            if name in record:
                record[name] = affine.normalize(record[name])
        return record

    def inverse(self, record: Record) -> Record:
        for name, affine in self.affine[record["norm_head"]].items():
            if name in record:
                record[name] = affine.denormalize(record[name])
        return record

    @cached_property
    def affine(self) -> dict[str, dict[str, Affine]]:
        """{norm head: {"state" or "actions": how it is normalised}}."""
        return {
            head: {name: Affine(*(np.array(v, np.float32) for v in vectors)) for name, vectors in of_head.items()}
            for head, of_head in self.heads.items()
        }
