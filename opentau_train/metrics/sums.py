"""Sums and counts by group, and the tags they get. Division happens here, once, at the end.

A *group* is (dataset, control_mode); an *item* is what the rows of the sums stand for (a group while training, an
episode in a validation pass, whose groups are then sums of episodes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from opentau_train.types import Group, LossTerms

QUANTUM = 2.0**-24
MIN_EPISODES = 2
"""Of a difference whose error can be told."""


def exact(terms: LossTerms) -> LossTerms:
    """The terms with float64 sums rounded to multiples of 2^-24.

    Float64 adds such numbers without error up to 2^29, so totals don't depend on the order of the additions: on ranks,
    workers, or which other datasets share the batches. NaN and infinities stay.
    """
    return {name: (torch.round(sums.double() / QUANTUM) * QUANTUM, count) for name, (sums, count) in terms.items()}


class Sums:
    """`[items, K, 2]` float64 on `device`: for each item and loss term the sum and the count of loss elements.

    Adding samples whose losses are on that device reads none of them back.
    """

    def __init__(self, num_items: int, terms: Sequence[str], device: torch.device | str = "cpu"):
        self.terms = tuple(terms)
        self.values = torch.zeros(num_items, len(self.terms), 2, dtype=torch.float64, device=device)

    def add(self, item: torch.Tensor, terms: LossTerms) -> None:
        """Add samples: `item` [B] i64 and each term's per-sample (sum [B], count [B])."""
        pairs = torch.zeros(len(item), len(self.terms), 2, dtype=torch.float64, device=self.values.device)
        for k, name in enumerate(self.terms):
            if name in terms:
                for column, values in enumerate(terms[name]):
                    pairs[:, k, column] = values.detach()
        self.values.index_add_(0, item.to(self.values.device), pairs)


@dataclass(frozen=True)
class Means:
    """Ratio means of clusters (episodes) by group and term, all [G, K] float64.

    `count` of loss elements, `mean` of the loss (NaN without elements), `windows`, and `error` the standard error of
    the mean, NaN with fewer than two episodes: one cluster says nothing about the spread between clusters.
    """

    count: NDArray[np.float64]
    mean: NDArray[np.float64]
    windows: NDArray[np.float64]
    error: NDArray[np.float64]


def group_means(episodes: NDArray, group_of: NDArray[np.int64], windows: NDArray[np.float64], num_groups: int) -> Means:
    """`episodes` [E, K, 2] sums and counts, `group_of` [E], `windows` [E] windows seen -> means by group.

    The standard error is the linearised ratio estimator's (Cochran, Sampling Techniques, 3rd ed., 6.13): residuals
    `s_e - r n_e`, variance `E / (E - 1) * sum(residual^2) / N^2` over the group's E episodes with any element.
    """

    def by_group(values: NDArray) -> NDArray:  # [E, K] -> [G, K]
        return np.stack([np.bincount(group_of, column, num_groups) for column in values.T.astype(float)], axis=1)

    sums, counts = episodes[..., 0], episodes[..., 1]
    seen = counts > 0
    total, count, num = by_group(sums), by_group(counts), by_group(seen)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / count
        residual = np.where(seen, sums - mean[group_of] * counts, 0.0)
        error = np.sqrt(num / (num - 1) * by_group(np.square(residual))) / count
    return Means(count, mean, by_group(seen * windows[:, None]), np.where(num >= 2, error, np.nan))


def training_row(sums: NDArray, groups: Sequence[Group], terms: Sequence[str], weights: dict[str, float]) -> dict:
    """Tags of reduced training sums [G, K, 2]: `Training/{TERM}`, `Training/Loss`, `Training/{group}/{TERM}`. Where
    samples have several modes, the sums [G, K + 1, 2] end in the counts of samples, and there are `Training/{mode}/`
    with the mode's terms, `Samples` and `Share`.

    The loss is what was optimised: each term's mean over the samples seen, weighted; absent terms are left out.
    """
    modes = list(dict.fromkeys(group.mode for group in groups if group.mode))
    of_modes = [sums[[group.mode == mode for group in groups]].sum(0) for mode in modes]
    row: dict[str, float] = {"Training/Loss": 0.0}
    for name, of in zip(["", *modes, *(group.tag for group in groups)], [sums.sum(0), *of_modes, *sums], strict=True):
        for term, (total, count) in zip(terms, of, strict=False):
            if count > 0:
                row[f"Training/{name}{name and '/'}{term.upper()}"] = float(total / count)
    for term in terms:
        row["Training/Loss"] += weights[term] * row.get(f"Training/{term.upper()}", 0.0)
    for mode, of in zip(modes, of_modes, strict=True):
        row[f"Training/{mode}/Samples"] = float(of[-1, 1])
        row[f"Training/{mode}/Share"] = float(of[-1, 1] / sums[:, -1, 1].sum())
    return row


def validation_row(
    episodes: NDArray,
    group_of: NDArray[np.int64],
    windows: NDArray,
    groups: Sequence[Group],
    terms: Sequence[str],
    weights: dict[str, float],
    prefix: str = "Validation",
) -> dict[str, float]:
    """Tags of a reduced validation pass.

    `episodes` [E, K, 2] sums and counts, `group_of` [E] the episodes' groups, `windows` [E] windows seen. For each
    group, each norm head (its groups' episodes of one mode pooled) and each term that has any supervision there: the
    mean, `/N` (windows) and `/StdErr` (clustered by episode, absent with fewer than two). `{prefix}/{TERM}` weights the
    groups that have the term by their share of the mixture; `{prefix}/Loss` weights the terms as training does.
    """
    heads = sorted({group.head_tag for group in groups})
    head_of = np.array([heads.index(group.head_tag) for group in groups], np.int64)
    means = group_means(episodes, group_of, windows, len(groups))
    row = _rows([group.tag for group in groups], terms, means, prefix)
    row |= _rows(heads, terms, group_means(episodes, head_of[group_of], windows, len(heads)), prefix)
    shares = aggregate_shares(means, groups)
    loss = 0.0
    for k, name in enumerate(terms):
        has = means.count[:, k] > 0
        if has.any():
            overall = float(np.average(means.mean[has, k], weights=shares[has, k]))
            row[f"{prefix}/{name.upper()}"] = overall
            loss += weights[name] * overall
    if row:
        row[f"{prefix}/Loss"] = loss
    return row


def aggregate_shares(means: Means, groups: Sequence[Group]) -> NDArray[np.float64]:
    """[G, K] the groups' weights in each term's aggregate: their shares where they have the term; where no such group
    is trained on, their windows."""
    shares = np.array([group.share for group in groups])[:, None] * (means.count > 0)
    return np.where(shares.sum(0) > 0, shares, means.windows)


def paired_difference(
    new: NDArray[np.float64],
    old: NDArray[np.float64],
    group_of: NDArray[np.int64],
    groups: Sequence[Group],
    weights: Sequence[float],
    episode_of: NDArray[np.int64],
) -> tuple[float, float]:
    """(`Validation/Loss` of `new` minus that of `old`, its standard error) from sums [E, K, 2] of the same windows.

    The loss is linear in the episodes' sums, so its difference is a weighted sum of the groups' ratio means of
    differences; their errors are those of `group_means`, the terms of an episode taken together, as are
    its rows of several modes: `episode_of` [E] numbers the rows' episodes. Groups of a single episode form one stratum
    together (collapsed strata, Cochran 5A.12), which can only overstate the error; one such group alone counts its
    whole change as error. Needs `MIN_EPISODES` episodes.
    """
    assert len(new) >= MIN_EPISODES
    counts = new[..., 1]
    change = np.stack([new[..., 0] - old[..., 0], counts], axis=-1)
    means = group_means(change, group_of, np.ones(len(new)), len(groups))
    shares = aggregate_shares(means, groups)
    with np.errstate(invalid="ignore", divide="ignore"):
        factor = np.where(means.count > 0, np.asarray(weights) * shares / shares.sum(0), 0.0)
        per_element = np.where(means.count > 0, factor / means.count, 0.0)[group_of]
    mean = np.where(means.count > 0, means.mean, 0.0)
    delta = float((factor * mean).sum())
    parts = per_element * (change[..., 0] - mean[group_of] * counts), per_element * change[..., 0]
    _, first, row_of = np.unique(episode_of, return_index=True, return_inverse=True)
    residual, alone = (np.bincount(row_of, part.sum(1)) for part in parts)
    group_of = group_of[first]
    num = np.bincount(group_of, minlength=len(groups))
    single = num[group_of] == 1
    correction = np.where(single, 0.0, num[group_of] / np.maximum(num[group_of] - 1, 1))
    variance = float((correction * np.square(residual)).sum())
    alone = alone[single]
    if len(alone) > 1:
        variance += float(len(alone) / (len(alone) - 1) * np.square(alone - alone.mean()).sum())
    elif len(alone) == 1:
        variance += float(np.square(alone[0]))
    return delta, float(np.sqrt(variance))


def in_common(new: NDArray[np.float64], old: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[E], the episodes that two passes with sums and counts [E, K, 2] both saw whole: windows that can't be read may
    be left out of either."""
    return (new[..., 1] == old[..., 1]).all(1)


def _rows(names: Sequence[str], terms: Sequence[str], means: Means, prefix: str) -> dict[str, float]:
    row: dict[str, float] = {}
    for k, term in enumerate(terms):
        for g in np.flatnonzero(means.count[:, k] > 0).tolist():
            tag = f"{prefix}/{names[g]}/{term.upper()}"
            row[tag] = float(means.mean[g, k])
            row[f"{tag}/N"] = float(means.windows[g, k])
            if not np.isnan(means.error[g, k]):
                row[f"{tag}/StdErr"] = float(means.error[g, k])
    return row
