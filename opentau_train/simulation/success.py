"""What episodes come to: a success rate with its interval, and lengths. From sums and counts."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054
"""The normal distribution's quantile of .975: intervals hold the rate in 95 of 100 experiments."""


def wilson(successes: float, num: float) -> tuple[float, float]:
    """The 95 % interval of a rate of which `num` independent trials had `successes` (Wilson 1927): inside [0, 1], and
    right for rates near its ends, where the normal one isn't. `num` > 0."""
    rate, z2 = successes / num, Z * Z
    middle = (rate + z2 / (2 * num)) / (1 + z2 / num)
    half = Z / (1 + z2 / num) * math.sqrt(rate * (1 - rate) / num + z2 / (4 * num * num))
    return max(0.0, middle - half), min(1.0, middle + half)


def success_row(results: NDArray[np.float64], num_lost: float, prefix: str) -> dict[str, float]:
    """Tags from the `results` [E, 3] (`rollout.Running`) of all ranks. Raises RuntimeError where an episode was run
    twice, or not at all."""
    if not (results[:, 2] == 1).all():
        wrong = int(np.flatnonzero(results[:, 2] != 1)[0])
        raise RuntimeError(f"{prefix}: episode {wrong} was run {results[wrong, 2]:g} times, and not once")
    num, reached = len(results), float(results[:, 0].sum())
    low, high = wilson(reached, num)
    return {
        f"{prefix}/Success": reached / num,
        f"{prefix}/Success/Low": low,
        f"{prefix}/Success/High": high,
        f"{prefix}/Episodes": float(num),
        f"{prefix}/Length": float(results[:, 1].mean()),
        f"{prefix}/Replaced": num_lost,
    }


def in_words(row: dict[str, float], prefix: str) -> str:
    """A line of that row for a person."""
    rate, low, high = (100 * row[f"{prefix}/Success{end}"] for end in ("", "/Low", "/High"))
    num, replaced = round(row[f"{prefix}/Episodes"]), round(row[f"{prefix}/Replaced"])
    lost = f", {replaced} simulators replaced" if replaced else ""
    return (
        f"{prefix}: {round(rate * num / 100)} of {num} reached the goal, {rate:.0f} % (95 %: {low:.0f} to {high:.0f}), "
        f"{row[f'{prefix}/Length']:.0f} steps on average{lost}"
    )
