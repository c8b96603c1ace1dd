"""What the losses and gradients say of sources and episodes, with standard errors. Pure arrays.

Alignment is the cosine between the mean gradient of a source's training windows and that of held-out windows: to first
order, how much a step on the one lowers the loss of the other (Pruthi et al. 2020, TracIn; as mixture weights: Fan et
al. 2024, DoGE; by random projections: Xia et al. 2024, LESS). Errors are the jackknife's over episodes (Efron 1982),
with the sketch's added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opentau_train.tools.curating.gradients import Gradients
from opentau_train.tools.curating.sketch import cosine_error

Floats = NDArray[np.float64]

MARGIN = 2.0
"""Standard errors from which on a number counts as different from 0."""
OUTLIER = 2.0
"""Modified z-score of the loss from which on an episode that is noisy, too, is called mislabelled. By itself a score is
suspicious from 3.5 on (Iglewicz and Hoaglin 1993), but what is hard to predict needn't be wrong."""
NOISY = 0.5
"""Label noise that an episode may have: half of its labels."""
FALSE_DISCOVERIES = 0.05
"""Share of the episodes called noisy that may be sound ones (Benjamini and Hochberg 1995)."""


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error; both NaN where nothing tells. Comparisons with NaN are false."""

    value: float
    error: float

    def __str__(self) -> str:
        return "-" if math.isnan(self.value) else f"{self.value:+.2f} ± {self.error:.2f}"

    @property
    def is_positive(self) -> bool:
        return self.value > MARGIN * self.error

    @property
    def is_negative(self) -> bool:
        return self.value < -MARGIN * self.error


UNKNOWN = Estimate(math.nan, math.nan)


def alignments(gradients: Gradients, num_datasets: int, groups: Sequence[int]) -> dict[tuple[int, int], Estimate]:
    """{(dataset, group): the cosine of the dataset's training gradient and the group's held-out one}, for the `groups`
    that have two held-out episodes or more, as the error needs."""
    trains = [_clusters(gradients, ~gradients.held_out & (gradients.dataset == d)) for d in range(num_datasets)]
    result = {}
    for group in groups:
        held_out = _clusters(gradients, gradients.held_out & (gradients.group == group))
        for d, training in enumerate(trains):
            if len(held_out) > 1 and len(training) > 1:
                result[d, group] = _cosine(training, held_out, gradients.vector.shape[1])
    return result


def _clusters(gradients: Gradients, rows: NDArray[np.bool_]) -> Floats:
    """[E, m] the sums of the gradients of the chosen windows, by episode."""
    _, place = np.unique(
        np.stack([gradients.dataset[rows], gradients.episode[rows]], axis=1), axis=0, return_inverse=True
    )
    sums = np.zeros((int(place.max(initial=-1)) + 1, gradients.vector.shape[1]))
    np.add.at(sums, place.reshape(-1), gradients.vector[rows])
    return sums


def _cosine(left: Floats, right: Floats, num_buckets: int) -> Estimate:
    """The cosine of the sums of two sets of episodes [E, m]; its error by leaving out each episode in turn."""
    sums = left.sum(0), right.sum(0)
    whole = float(cosines(sums[0], sums[1]))
    variance = float(cosine_error(np.array(whole), num_buckets)) ** 2
    for own, total, other in ((left, sums[0], sums[1]), (right, sums[1], sums[0])):
        without = cosines(total - own, other)
        variance += (len(own) - 1) / len(own) * float(np.square(without - without.mean()).sum())
    return Estimate(whole, math.sqrt(variance))


def cosines(left: Floats, right: Floats) -> Floats:
    """The cosines of the last axes; 0 of a vector of zeros."""
    lengths = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    return np.divide((left * right).sum(-1), lengths, out=np.zeros_like(lengths), where=lengths > 0)


def source_scores(
    found: dict[tuple[int, int], Estimate], group_dataset: Sequence[int], shares: Sequence[float], targets: set[int]
) -> list[Estimate]:
    """Each dataset's alignment with the groups that judge it, weighted by their `shares`: the `targets`, or, where none
    are named, the groups of all other datasets (a source agrees with itself in any case), or its own, being alone."""
    scores = []
    for d in range(max((d for d, _ in found), default=-1) + 1):
        own = {g: e for (of, g), e in found.items() if of == d}
        judges = {g: e for g, e in own.items() if (g in targets if targets else group_dataset[g] != d)} or own
        weights = np.array([shares[g] for g in judges]) if judges else np.zeros(0)
        weights = np.ones(len(weights)) if not weights.sum() else weights
        if not judges:
            scores.append(UNKNOWN)
            continue
        part = weights / weights.sum()
        value = float(part @ [e.value for e in judges.values()])
        # The groups share the source's own part of the error: added up as if it were the same in all of them.
        scores.append(Estimate(value, float(part @ [e.error for e in judges.values()])))
    return scores


def label_noise(gradients: Gradients, targets: set[int]) -> dict[tuple[int, int], Estimate]:
    """{(dataset, episode): 1 - a / A}: a, the mean cosine of the episode's parts with the gradient of all that judges
    them; A, the median of those that judge. 0: it teaches what the others do, 1: nothing of it, 2: the opposite.

    The judges are all episodes of the groups `targets`, or of its own dataset; never the episode itself. The error is
    that of the mean of its parts, whose spread all episodes of a dataset share; nothing is told where A isn't positive
    by `MARGIN` of its errors, or a dataset has fewer than three episodes.
    """
    among = np.isin(gradients.group, list(targets))
    noise: dict[tuple[int, int], Estimate] = {}
    means: dict[int, tuple[NDArray[np.int64], Floats, Floats]] = {}
    for d in np.unique(gradients.dataset).tolist():
        own = gradients.dataset == d
        numbers, place = np.unique(gradients.episode[own], return_inverse=True)
        cosine, num = _agreement(gradients, own, among if targets else own, place), np.bincount(place)
        if len(numbers) >= 3 and len(cosine) > len(numbers):
            mean = np.bincount(place, cosine) / num
            freedom = len(cosine) - len(numbers)
            spread = math.sqrt(float(np.square(cosine - mean[place]).sum()) / freedom)
            means[d] = numbers, mean, spread / np.sqrt(num)
    judges = set(np.unique(gradients.dataset[among]).tolist())
    for d, (numbers, mean, error) in means.items():
        known = [means[of] for of in (judges if targets else {d}) if of in means]
        every, errors = (np.concatenate([one[i] for one in known]) if known else np.zeros(0) for i in (1, 2))
        if len(every) and np.median(every) > MARGIN * np.median(errors) * 1.2533 / math.sqrt(len(every)):  # a median's
            values = 1.0 - mean / np.median(every), error / np.median(every)
            noise |= {(d, n): Estimate(*map(float, pair)) for n, *pair in zip(numbers.tolist(), *values, strict=True)}
    return noise


def _agreement(
    gradients: Gradients, own: NDArray[np.bool_], judge: NDArray[np.bool_], place: NDArray[np.int64]
) -> Floats:
    """The cosine of each of a dataset's `own` parts with the gradient of those that `judge`, but for the parts of its
    own episode; `place` numbers the parts' episodes."""
    total = gradients.vector[judge].sum(0, dtype=np.float64)
    vector = gradients.vector[own].astype(np.float64)
    itself = np.zeros((int(place.max()) + 1, vector.shape[1]))
    np.add.at(itself, place, np.where(judge[own][:, None], vector, 0.0))
    return cosines(vector, total - itself[place])


def outliers(excess: Floats) -> Floats:
    """The modified z-scores 0.6745 (x - median) / MAD of the excess losses [E] of a dataset's episodes; NaN where half
    of them are equal."""
    away = excess - np.median(excess)
    spread = float(np.median(np.abs(away)))
    return 0.6745 * away / spread if spread > 0 else np.full(len(excess), np.nan)


def noisy(noise: Sequence[Estimate]) -> list[bool]:
    """Which label noises lie above `NOISY`, by the step-up procedure of Benjamini and Hochberg over all of them."""
    p = np.array([0.5 * math.erfc((e.value - NOISY) / e.error / math.sqrt(2)) if e.error > 0 else 1.0 for e in noise])
    order = np.argsort(p, kind="stable")
    passed = np.flatnonzero(p[order] <= FALSE_DISCOVERIES * (np.arange(len(p)) + 1) / max(1, len(p)))
    chosen = np.zeros(len(p), bool)
    chosen[order[: int(passed.max(initial=-1)) + 1]] = True
    return chosen.tolist()


def suggested_weights(shares: Sequence[float], scores: Sequence[Estimate]) -> list[float] | None:
    """Weights that sum to 1: the present shares times exp(alignment), one step of mirror descent as DoGE's, of those
    alignments that differ from 0; 0 for a source that points against the held-out data. None: no change is called for,
    or all sources that train would go."""
    new = [
        0.0 if e.is_negative else share * (math.exp(e.value) if e.is_positive else 1.0)
        for share, e in zip(shares, scores, strict=True)
    ]
    total = sum(new)
    if not total:
        return None
    weights = [w / total for w in new]
    before = [share / sum(shares) for share in shares]
    changed = any(abs(w - b) > 0.01 for w, b in zip(weights, before, strict=True))
    return weights if changed else None
