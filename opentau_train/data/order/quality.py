"""The shuffle's quality as a number, from the plan alone: how much noisier a gradient is than independent windows'.

The mean of samples with weights w_i, equal variances and correlations rho_ij has the variance
`sigma^2 sum_ij w_i w_j rho_ij`, independent ones `sigma^2 sum_i w_i^2`. Their ratio is the variance inflation factor:

    VIF = 1 + sum_{i != j} w_i w_j rho_ij / sum_i w_i^2

Kish's design effect 1 + (m - 1) rho (Survey Sampling, 1965, 5.4) is the case of equal weights, clusters of m samples
and one rho. Here samples of different episodes are uncorrelated; two of one episode, d frames apart, have

    rho(d) = episode + neighbours * exp(-d / frames)

(`data.correlation`; `benchmarks/vif.py` measures it on a checkpoint). In a mixture of few episodes any two windows are
alike to some degree; what matters is how much more alike those of a batch are. So correlations count from `rho_0`, that
of two windows drawn at random: rho becomes (rho - rho_0) / (1 - rho_0). Random draws then give 1 in any mixture, and a
batch of B windows of one episode up to B.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from opentau_train.config.data import CorrelationSettings
from opentau_train.data.order.tape import Tape
from opentau_train.data.order.windows import Windows

MOMENTUM = 0.9
NEGLIGIBLE = 0.01
"""Share of the momentum's weight below which a past step is left out of its horizon."""


def inflation(
    windows: Windows, rho: CorrelationSettings, weight: NDArray[np.float64] | None = None, background: float = 0.0
) -> float:
    """The VIF of the weighted mean of the samples `windows`; `weight` [N] f64, by default equal; `background` is rho_0.
    O(N log N)."""
    if len(windows) == 0:
        raise ValueError("the variance inflation of no samples")
    weight = np.ones(len(windows)) if weight is None else weight
    cluster = windows.dataset * (windows.episode.max() + 1) + windows.episode
    order = np.argsort(cluster * (windows.frame.max() + 1) + windows.frame)
    cluster, frame, weight = cluster[order], windows.frame[order], weight[order]
    first = np.flatnonzero(np.diff(cluster, prepend=-1))
    squares = float(np.square(weight).sum())
    # All pairs of an episode: the square of its sum, less the samples' pairs with themselves.
    same_episode = float(np.square(np.add.reduceat(weight, first)).sum()) - squares
    decay = np.exp(-np.diff(frame, prepend=0) / rho.frames)
    decay[first] = 0.0
    near = 2.0 * float(weight @ (_decayed_sums(decay, weight) - weight))
    pairs = rho.episode * same_episode + rho.neighbours * near
    all_pairs = float(weight.sum()) ** 2 - squares
    return 1.0 + (pairs - background * all_pairs) / (1.0 - background) / squares


def _decayed_sums(decay: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N] S_i = weight_i + decay_i S_{i-1}: a scan over affine maps in log2 N doubling steps (Hillis & Steele 1986)."""
    total, factor, reach = weight.copy(), decay.copy(), 1
    while reach < len(total) and factor.any():
        total[reach:] = total[reach:] + factor[reach:] * total[:-reach]
        factor[reach:] = factor[reach:] * factor[:-reach]
        factor[:reach] = 0.0
        reach *= 2
    return total


def background(tape: Tape, rho: CorrelationSettings) -> float:
    """rho_0: the mean correlation of two windows drawn at random, each from a dataset by its share of the epoch."""
    total = 0.0
    share = tape.draws / tape.draws.sum()
    for blocks, chance in zip(tape.datasets, share.tolist(), strict=True):
        if chance == 0:  # a source for validation only
            continue
        length = blocks.length.astype(np.float64)
        episodes = np.bincount(blocks.episode, weights=length)
        q = math.exp(-blocks.stride / rho.frames)
        # The sum of q^|i - j| over all pairs of a block's n windows; blocks of one episode are far apart.
        pairs = length + 2 * q * (length * (1 - q) - 1 + q**length) / (1 - q) ** 2
        alike = rho.episode * np.square(episodes).sum() + rho.neighbours * pairs.sum()
        total += chance**2 * float(alike / length.sum() ** 2)
    return total


def distinct_episodes(windows: Windows) -> int:
    """How many episodes the samples come from."""
    return len(np.unique(windows.dataset * (windows.episode.max() + 1) + windows.episode))


class ShuffleQuality:
    """Predicts the variance inflation of a tape's batches; `rho` are the correlations of `data.correlation`."""

    def __init__(self, tape: Tape, rho: CorrelationSettings):
        self.tape, self.rho = tape, rho
        self.background = background(tape, rho)

    def of_batch(self, windows: Windows) -> float:
        """The VIF of the global batch `windows`."""
        return inflation(windows, self.rho, background=self.background)

    def of_momentum(self, step: int, beta: float = MOMENTUM) -> float:
        """The VIF of the exponential average of the gradients up to and with `step` (the first one is 0): step
        `step - a` has the weight beta^a, down to `NEGLIGIBLE`."""
        horizon = 1 if beta == 0 else math.ceil(math.log(NEGLIGIBLE) / math.log(beta))
        first, tape = max(0, step + 1 - horizon), self.tape
        windows = tape.windows(np.arange(tape.first_sample(first), tape.first_sample(step + 1)))
        age = step - first - np.arange(len(windows)) // tape.batch_size
        return inflation(windows, self.rho, np.power(beta, age, dtype=np.float64), self.background)

    def row(self, windows: Windows, step: int) -> dict[str, float]:
        """{tag: value} of the shuffle's quality, to log with `step`, whose global batch is `windows`."""
        return {
            "Training/DistinctEpisodes": float(distinct_episodes(windows)),
            "Training/PredictedVIF": self.of_batch(windows),
            "Training/PredictedVIFMomentum": self.of_momentum(step),
        }
