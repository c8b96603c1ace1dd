"""The transform that normalises by a norm head's statistics, and back to the dataset's units."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

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
        steps = self._steps(x)
        out = np.subtract(x, self.offset[steps], dtype=np.float32, casting="same_kind")
        return np.multiply(out, self.scale[steps], out=out)

    def denormalize(self, z: NDArray[np.float32]) -> NDArray[np.float32]:
        """[..., D] normalised -> in the dataset's units."""
        inverse = np.where(self.scale > 0, 1.0 / np.where(self.scale > 0, self.scale, 1.0), 0.0)
        steps = self._steps(z)
        return (z * inverse[steps] + self.offset[steps]).astype(np.float32)

    def _steps(self, x: NDArray) -> Any:
        """What picks, of `offset` and `scale`, those of the steps of `x`."""
        if self.offset.ndim == 1:
            return ...
        return np.minimum(np.arange(x.shape[-2]), len(self.offset) - 1)


Vector = tuple[float, ...] | tuple[tuple[float, ...], ...]
"""[D], or [T, D] for each step of a chunk."""


@dataclass(frozen=True)
class Normalize(Transform):
    """Normalises state and actions of each norm head: `heads` {norm head: {"state" or "actions": (offset, scale)}}, the
    numbers of one row, or of the actions those of each step."""

    heads: dict[str, dict[str, tuple[Vector, Vector]]]

    reads: ClassVar = ("state", "actions", "norm_head")
    writes: ClassVar = ("state", "actions")

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
