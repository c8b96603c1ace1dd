"""Statistics of a camera's pictures, as LeRobot's datasets have them: exact, from how often each value was seen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


@dataclass(frozen=True)
class Colours:
    """`counts` [3, 256] i64: how often a channel (red, green, blue) had a value; `num` pictures."""

    counts: NDArray[np.int64] = field(repr=False)
    num: int

    @classmethod
    def of(cls, pictures: NDArray[np.uint8]) -> Colours:
        """Of `pictures` [N, H, W, 3] uint8 RGB."""
        counts = [np.bincount(pictures[..., channel].ravel(), minlength=256) for channel in range(3)]
        return cls(np.stack(counts), len(pictures))

    @classmethod
    def total(cls, parts: Iterable[Colours]) -> Colours:
        """Of all `parts`' pictures together, one at least."""
        every = list(parts)
        return cls(np.sum([part.counts for part in every], axis=0), sum(part.num for part in every))

    def statistics(self) -> dict[str, list]:
        """{min, max, mean, std, q01, ...: [3, 1, 1], black 0 and white 1; count: [pictures]}. A quantile is the lowest
        value that at least so many have not above."""
        value, share = np.arange(256) / 255, self.counts / self.counts.sum(axis=1, keepdims=True)
        mean = share @ value
        seen = self.counts > 0
        numbers = {
            "min": value[seen.argmax(axis=1)],
            "max": value[255 - seen[:, ::-1].argmax(axis=1)],
            "mean": mean,
            "std": np.sqrt(np.sum(share * (value - mean[:, None]) ** 2, axis=1)),
        }
        upto = np.cumsum(self.counts, axis=1)
        for name, quantile in QUANTILES.items():
            numbers[name] = value[(upto >= quantile * upto[:, -1:]).argmax(axis=1)]
        return {kind: each.reshape(3, 1, 1).tolist() for kind, each in numbers.items()} | {"count": [self.num]}
