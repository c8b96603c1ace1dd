"""Each episode's losses: in training, as the flight recorder wrote them, and held out, as the best validation did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opentau_train import strangers
from opentau_train.checkpoints.best import BEST, LOWEST, read_record
from opentau_train.tools.curating.gradients import Gradients
from opentau_train.tools.flight import Losses

NUM_BINS = 20
"""Parts of a training within which losses are compared: they fall from part to part."""


@dataclass(frozen=True)
class EpisodeLoss:
    """One episode's `loss`, the mean over `num` samples or elements; `excess`, by how much its logarithm lies above
    its dataset's at the same time of the training."""

    loss: float
    excess: float
    num: int


def of_training(recorded: Losses) -> dict[tuple[str, int], EpisodeLoss]:
    """{(dataset, episode): its loss over the last part of the training in which it came, and its excess over all}.

    Labels that are wrong are learned later, if at all (Arpit et al. 2017), so that the excess is of the whole training.
    """
    if not len(recorded.step):
        return {}
    edges = np.linspace(0, recorded.step.max(), NUM_BINS + 1)
    part = np.clip(np.searchsorted(edges, recorded.step, side="left") - 1, 0, NUM_BINS - 1)
    cell = recorded.dataset * NUM_BINS + part
    logs = np.log(np.maximum(recorded.loss, np.finfo(np.float32).tiny))
    num = np.maximum(np.bincount(cell), 1)
    excess = logs - (np.bincount(cell, logs) / num)[cell]
    rows = np.stack([recorded.dataset, recorded.episode], axis=1)
    episodes, of = np.unique(rows, axis=0, return_inverse=True)
    of = of.reshape(-1)
    last = np.full(len(episodes), -1)
    np.maximum.at(last, of, part)
    late = part >= np.minimum(last[of], NUM_BINS // 2)
    mean = np.bincount(of[late], recorded.loss[late], len(episodes)) / np.bincount(of[late], minlength=len(episodes))
    count = np.bincount(of, minlength=len(episodes))
    above = np.bincount(of, excess, len(episodes)) / count
    return {
        (recorded.names[d], e): EpisodeLoss(float(mean[i]), float(above[i]), int(count[i]))
        for i, (d, e) in enumerate(episodes.tolist())
    }


def of_validation(run_dir: Path, weights: Sequence[float]) -> tuple[int, dict[tuple[str, int], EpisodeLoss]]:
    """(step, {(dataset, episode): its held-out loss}) of the run's best pass, of the lowest one where none is the best,
    by the sums by episode that it keeps; (0, {}) where it keeps none. `weights` are the loss terms'. Raises `UserError`
    for a file that isn't such a record."""
    records = sorted((run_dir / "passes").glob("[0-9]*.npz"))
    if not records:
        return 0, {}
    names, last, kept = read_record(records[-1])
    chosen = kept.get(BEST) or kept.get(LOWEST) or last
    with strangers.understood("the record of a validation pass", records[-1]):
        sums = chosen.sums
        if sums.shape != (len(names), len(weights), 2):
            raise ValueError(f"sums of shape {list(sums.shape)} for {len(names)} episodes and {len(weights)} terms")
        keys = [(dataset, int(number)) for dataset, _, number in (name.rpartition("/") for name in names)]
    together: dict[tuple[str, int], NDArray] = {}
    for key, values in zip(keys, sums, strict=True):  # an episode of several modes has several rows
        together[key] = together.get(key, 0.0) + values
    losses = {}
    for key, values in together.items():
        seen = values[:, 1] > 0
        if seen.any():
            loss = float((np.asarray(weights)[seen] * values[seen, 0] / values[seen, 1]).sum())
            losses[key] = EpisodeLoss(loss, 0.0, int(values[:, 1].sum()))
    return chosen.step, _centred(losses)


def _centred(losses: Mapping[tuple[str, int], EpisodeLoss]) -> dict[tuple[str, int], EpisodeLoss]:
    """The losses with their excess over their dataset's, where no time of the training sets them apart."""
    logs = {key: math.log(max(one.loss, 1e-30)) for key, one in losses.items()}
    of = {name: float(np.mean([v for key, v in logs.items() if key[0] == name])) for name in {key[0] for key in logs}}
    return {key: replace(one, excess=logs[key] - of[key[0]]) for key, one in losses.items()}


def of_windows(names: Sequence[str], gradients: Gradients, *, held_out: bool) -> dict[tuple[str, int], EpisodeLoss]:
    """The same of the windows whose gradients were taken at the checkpoint, where a run recorded nothing."""
    losses: dict[tuple[str, int], EpisodeLoss] = {}
    for d, name in enumerate(names):
        chosen = (gradients.dataset == d) & (gradients.held_out == held_out) & (gradients.loss > 0)
        loss, logs = gradients.loss[chosen], np.log(gradients.loss[chosen])
        numbers, place = np.unique(gradients.episode[chosen], return_inverse=True)
        num = np.bincount(place)
        columns = zip(
            numbers.tolist(), np.bincount(place, loss) / num, np.bincount(place, logs) / num, num, strict=True
        )
        losses |= {(name, e): EpisodeLoss(float(a), float(b - logs.mean()), int(n)) for e, a, b, n in columns}
    return losses
