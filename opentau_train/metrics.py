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

from opentau_train.types import LossTerms


@dataclass(frozen=True)
class Group:
    """A row of the breakdown: the dataset's name, its control mode, the head its statistics belong to, and the
    dataset's `share` of the mixture times the group's share of the dataset."""

    dataset: str
    control_mode: str
    norm_head: str
    share: float

    @property
    def tag(self) -> str:
        return f"{self.dataset}/{self.control_mode}"


class Sums:
    """`[items, K, 2]` float64 on the CPU: for each item and loss term the sum and the count of loss elements.

    Adding samples reads the losses back from the device, so the training loop hands over several steps at a time.
    """

    def __init__(self, num_items: int, terms: Sequence[str]):
        self.terms = tuple(terms)
        self.values = torch.zeros(num_items, len(self.terms), 2, dtype=torch.float64)

    def add(self, item: torch.Tensor, terms: LossTerms) -> None:
        """Add samples: `item` [B] i64 and each term's per-sample (sum [B], count [B])."""
        for k, name in enumerate(self.terms):
            if name in terms:
                pair = torch.stack([t.detach().to("cpu", torch.float64) for t in terms[name]], dim=-1)
                self.values[:, k].index_add_(0, item.cpu(), pair)

    def clear(self) -> None:
        self.values.zero_()


def clustered_error(sums: NDArray, counts: NDArray) -> float | None:
    """Standard error of the ratio mean sum/count whose observations come in clusters (episodes).

    `sums`, `counts` [E] per episode. The linearised ratio estimator (Cochran, Sampling Techniques, 3rd ed., 6.13):
    residuals `s_e - r n_e`, variance `E/(E-1) * sum(residual^2) / N^2`. None with fewer than two episodes: one
    cluster says nothing about the spread between clusters.
    """
    seen = counts > 0
    num = int(seen.sum())
    if num < 2:
        return None
    total = counts[seen].sum()
    residual = sums[seen] - sums[seen].sum() / total * counts[seen]
    return float(np.sqrt(num / (num - 1) * np.square(residual).sum()) / total)


def training_row(sums: NDArray, groups: Sequence[Group], terms: Sequence[str], weights: dict[str, float]) -> dict:
    """Tags of reduced training sums [G, K, 2]: `Training/{TERM}`, `Training/Loss`, `Training/{group}/{TERM}`.

    The loss is what was optimised: each term's mean over the samples seen, weighted; absent terms are left out.
    """
    row: dict[str, float] = {"Training/Loss": 0.0}
    for k, name in enumerate(terms):
        total, count = sums[:, k].sum(0)
        if count > 0:
            row[f"Training/{name.upper()}"] = float(total / count)
            row["Training/Loss"] += weights[name] * float(total / count)
    for g, group in enumerate(groups):
        for k, name in enumerate(terms):
            if sums[g, k, 1] > 0:
                row[f"Training/{group.tag}/{name.upper()}"] = float(sums[g, k, 0] / sums[g, k, 1])
    return row


def validation_row(
    episodes: NDArray,
    group_of: NDArray[np.int64],
    windows: NDArray[np.int64],
    groups: Sequence[Group],
    terms: Sequence[str],
    weights: dict[str, float],
    prefix: str = "Validation",
) -> dict[str, float]:
    """Tags of a reduced validation pass.

    `episodes` [E, K, 2] sums and counts, `group_of` [E] the episodes' groups, `windows` [E] windows seen. For each
    group and term that has any supervision: the mean, `/N` (windows) and `/StdErr` (clustered by episode, absent
    with fewer than two). `{prefix}/{TERM}` weights the groups that have the term by their share of the mixture;
    `{prefix}/Loss` weights the terms as training does.
    """
    row: dict[str, float] = {}
    loss = 0.0
    for k, name in enumerate(terms):
        tag, shares, means = name.upper(), [], []
        for g, group in enumerate(groups):
            mine = group_of == g
            count = episodes[mine, k, 1].sum()
            if not count > 0:
                continue
            mean = episodes[mine, k, 0].sum() / count
            row[f"{prefix}/{group.tag}/{tag}"] = float(mean)
            row[f"{prefix}/{group.tag}/{tag}/N"] = float(windows[mine & (episodes[:, k, 1] > 0)].sum())
            error = clustered_error(episodes[mine, k, 0], episodes[mine, k, 1])
            if error is not None:
                row[f"{prefix}/{group.tag}/{tag}/StdErr"] = error
            shares.append(group.share)
            means.append(mean)
        if shares:
            overall = float(np.average(means, weights=shares))
            row[f"{prefix}/{tag}"] = overall
            loss += weights[name] * overall
    if row:
        row[f"{prefix}/Loss"] = loss
    return row
