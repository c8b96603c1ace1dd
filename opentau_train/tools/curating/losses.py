"""Each episode's losses: in training, as the flight recorder wrote them, and held out, as the best validation did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opentau_train import strangers
from opentau_train.checkpoints.best import BEST, LOWEST, read_record
from opentau_train.tools.curating.gradients import Gradients
from opentau_train.tools.flight import Losses

NUM_BINS = 10
"""Parts of that half within which losses are compared: they fall from part to part."""


@dataclass(frozen=True)
class EpisodeLoss:
    """One episode's `loss`, the mean over `num` samples or elements; `excess`, by which part of it its losses lie above
    its dataset's at the same time of the training: 0.1 is a tenth more."""

    loss: float
    excess: float
    num: int


def of_training(recorded: Losses) -> dict[tuple[str, int], EpisodeLoss]:
    """{(dataset, episode): its losses in the later half of the training}, of the episodes that came in it.

    Labels that are wrong are learned later, if at all (Arpit et al. 2017): before the others are learned, all lose
    alike.
    """
    if not len(recorded.step):
        return {}
    last = int(recorded.step.max())
    late = recorded.step > last / 2
    step, dataset, episode, loss = (c[late] for c in (recorded.step, recorded.dataset, recorded.episode, recorded.loss))
    part = np.minimum((step - last / 2) / (last / 2) * NUM_BINS, NUM_BINS - 1).astype(np.int64)
    cell = dataset * NUM_BINS + part
    ratio = loss / (np.bincount(cell, loss) / np.maximum(np.bincount(cell), 1))[cell]
    episodes, of = np.unique(np.stack([dataset, episode], axis=1), axis=0, return_inverse=True)
    of = of.reshape(-1)
    num, total, ratios = (np.bincount(of, weights, len(episodes)) for weights in (None, loss, ratio))
    return {
        (recorded.names[d], e): EpisodeLoss(float(total[i] / num[i]), float(ratios[i] / num[i] - 1), int(num[i]))
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
    of: dict[str, list[float]] = {}
    for (dataset, _), one in losses.items():
        of.setdefault(dataset, []).append(one.loss)
    return {
        key: replace(one, excess=one.loss / float(np.mean(of[key[0]])) - 1) if any(of[key[0]]) else one
        for key, one in losses.items()
    }


def of_windows(names: Sequence[str], gradients: Gradients, *, held_out: bool) -> dict[tuple[str, int], EpisodeLoss]:
    """The same of the windows whose gradients were taken at the checkpoint, where a run recorded nothing."""
    losses: dict[tuple[str, int], EpisodeLoss] = {}
    for d, name in enumerate(names):
        chosen = (gradients.dataset == d) & (gradients.held_out == held_out)
        numbers, place = np.unique(gradients.episode[chosen], return_inverse=True)
        num, total = np.bincount(place), np.bincount(place, gradients.loss[chosen])
        for e, n, loss in zip(numbers.tolist(), num.tolist(), total.tolist(), strict=True):
            losses[name, e] = EpisodeLoss(loss / n, 0.0, n)
    return _centred(losses)
