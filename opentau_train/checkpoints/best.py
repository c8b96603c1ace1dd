"""Which checkpoint is best, decided by more than noise: paired differences of the same episodes.

    checkpoints/best -> {step}     the checkpoint of the best pass
    best/{step:08d}.npz            that pass's sums by episode: what the next pass is compared with

Two passes see the same windows with the same noise, so what differs between them is the weights. The mean of a metric
over few episodes has a large error, the mean of its paired differences a small one.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opentau_train import strangers
from opentau_train.checkpoints import commit
from opentau_train.distributed.world import World
from opentau_train.metrics.sums import aggregate_shares, group_means
from opentau_train.types import Group
from opentau_train.validation.evaluator import Compared, Scores

log = logging.getLogger(__name__)

MIN_EPISODES = 2


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
    differences; their errors are those of `metrics.sums.group_means`, the terms of an episode taken together, as are
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


class Best:
    """The best pass so far of a run directory. All ranks decide alike; rank 0 writes.

    `margin`: standard errors of the paired difference that an improvement must exceed.
    """

    def __init__(self, run_dir: Path, compared: Compared, margin: float):
        self.run_dir, self.compared, self.margin = run_dir, compared, margin
        self.step: int | None = None
        self.sums: NDArray[np.float64] | None = None

    def restore(self, world: World, step: int) -> None:
        """Take up the record as it was at `step`: what a resumed run does again is forgotten. Collective."""
        record = world.agree(lambda: self._newest(step) if world.is_main else None)
        record = world.broadcast(record)
        if record is None:
            return
        if record[1] != list(self.compared.episodes) or record[2].shape[1] != len(self.compared.weights):
            log.warning("the validation windows are others than at step %d: the best checkpoint starts anew", record[0])
            return
        self.step, _, self.sums = record

    def _newest(self, step: int) -> tuple[int, list[str], NDArray[np.float64]] | None:
        """(step, episodes, sums) of the newest record up to `step`; later ones are removed. Raises `UserError`."""
        records = self._records()
        for later in [s for s in records if s > step]:
            records.pop(later).unlink()
        if not records:
            return None
        self._move_link()
        newest = max(records)
        with (
            strangers.understood("the record of the best pass", records[newest]),
            np.load(io.BytesIO(strangers.read_bytes(records[newest])), allow_pickle=False) as saved,
        ):
            episodes, sums = [str(n) for n in saved["episodes"]], saved["sums"]
            if sums.ndim != 3 or len(sums) != len(episodes):
                raise ValueError(f"sums of shape {list(sums.shape)} for {len(episodes)} episodes")
            return newest, episodes, sums

    def update(self, world: World, step: int, scores: Scores) -> bool:
        """Whether the pass at `step` is the best so far. If so, its sums are kept; the caller then saves the step's
        checkpoint and calls `point`."""
        if len(scores.sums) < MIN_EPISODES:
            log.info("no best checkpoint is kept: the noise of one validation episode can't be told")
            return False
        if not np.isfinite(scores.loss):
            return False
        if self.sums is not None and not self._improves(step, scores.sums, self.sums):
            return False
        self.step, self.sums = step, scores.sums
        if world.is_main:
            path = self._folder / f"{step:08d}.npz"
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.with_suffix(".tmp"), "wb") as file:
                np.savez(file, episodes=np.array(self.compared.episodes), sums=scores.sums)
            os.replace(path.with_suffix(".tmp"), path)
        return True

    def point(self) -> None:
        """Let `checkpoints/best` name the best pass's checkpoint once that is whole. Rank 0 only."""
        self._move_link()
        self._forget_old_records()

    def _forget_old_records(self) -> None:
        kept = {p.name for p in (self.run_dir / "checkpoints").glob("[0-9]*")}
        records = self._records()
        # A resume from an older checkpoint needs the record of then: the newest one not after that checkpoint.
        oldest = min((int(name) for name in kept if name.isdigit()), default=0)
        needed = max((s for s in records if s <= oldest), default=0)
        for stale in [s for s in records if s < needed]:
            records[stale].unlink()

    def _move_link(self) -> None:
        folder = self.run_dir / "checkpoints"
        whole = [s for s in self._records() if (folder / f"{s:08d}" / "run.json").is_file()]
        link = folder / "best"
        if whole:
            commit.point(link, f"{max(whole):08d}")
        elif link.is_symlink():
            link.unlink()

    def _improves(self, step: int, new: NDArray[np.float64], old: NDArray[np.float64]) -> bool:
        """Over the episodes that both passes saw whole: windows that can't be read may be left out of either."""
        both = (new[..., 1] == old[..., 1]).all(1)
        if both.sum() < MIN_EPISODES:
            log.warning("the pass at step %d has too few windows in common with step %s's to compare", step, self.step)
            return False
        c = self.compared
        columns = new[both], old[both], c.group_of[both], c.groups, c.weights, c.episode_of[both]
        delta, error = paired_difference(*columns)
        improved = -delta > self.margin * error
        verdict = "is the best so far" if improved else f"leaves step {self.step} the best"
        log.info("validation: %+.5f ± %.5f against step %s: step %d %s", delta, error, self.step, step, verdict)
        return improved

    @property
    def _folder(self) -> Path:
        return self.run_dir / "best"

    def _records(self) -> dict[int, Path]:
        return {int(p.stem): p for p in self._folder.glob("[0-9]*.npz")}
