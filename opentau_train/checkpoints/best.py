"""Which checkpoint has the lowest loss, and which is best, decided by more than noise: paired differences of the same
episodes.

    checkpoints/lowest -> {step}   the checkpoint of the pass with the lowest loss, be it by noise
    checkpoints/best -> {step}     that of the pass which last beat the best one by more than noise
    passes/{step:08d}.npz          a pass's sums by episode, and those of the best and the lowest one then

Two passes see the same windows with the same noise, so what differs between them is the weights. The mean of a metric
over few episodes has a large error, the mean of its paired differences a small one.
"""

from __future__ import annotations

import io
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opentau_train import strangers
from opentau_train.checkpoints import commit
from opentau_train.distributed.world import World
from opentau_train.metrics.sums import MIN_EPISODES, in_common, paired_difference
from opentau_train.validation.evaluator import Compared, Scores

log = logging.getLogger(__name__)

FEW_EPISODES = 10
"""With so many, noise alone exceeds two standard errors in 4% of the passes, twice as often as with very many:
Student's t with 9 degrees of freedom. With fewer, oftener."""
BEST, LOWEST = "best", "lowest"


@dataclass(frozen=True)
class Pass:
    """A validation pass: its step, its loss, and its `sums` [E, K, 2] by episode."""

    step: int
    loss: float
    sums: NDArray[np.float64]


def read_record(path: Path) -> tuple[list[str], Pass, dict[str, Pass]]:
    """(episodes, the pass that the file is named by, {best, lowest: those so far}) of a file in `passes/`. Raises
    `UserError`."""
    with (
        strangers.understood("the record of a validation pass", path),
        np.load(io.BytesIO(strangers.read_bytes(path)), allow_pickle=False) as saved,
    ):
        episodes, sums = [str(n) for n in saved["episodes"]], saved["sums"]
        if sums.ndim != 4 or sums.shape[1] != len(episodes):
            raise ValueError(f"sums of shape {list(sums.shape)} for {len(episodes)} episodes")
        rows = zip(saved["steps"].tolist(), saved["losses"].tolist(), sums, strict=True)
        passes = {int(number): Pass(int(number), loss, own) for number, loss, own in rows}
        kept = {name: passes[int(saved[name])] for name in (BEST, LOWEST) if name in saved}
        return episodes, passes[int(path.stem)], kept


class Ranking:
    """The passes of a run directory that count: the last, the lowest and the best one. All ranks decide alike; rank 0
    writes.

    `margin`: standard errors of the paired difference by which a pass must beat the best one; None: none is the best.
    """

    def __init__(self, run_dir: Path, compared: Compared, margin: float | None):
        self.run_dir, self.compared, self.margin = run_dir, compared, margin
        self.last: Pass | None = None
        self.kept: dict[str, Pass] = {}
        """{name of the link: the pass that it is for}"""
        num = len(np.unique(compared.episode_of))
        if num < FEW_EPISODES:
            log.warning(
                "%d validation episodes can't tell checkpoints apart: best may stay behind lowest\n  remedy: hold out "
                "more, by data.sources.NAME.val_split_ratio",
                num,
            )

    @property
    def steps(self) -> set[int]:
        """The steps whose checkpoints are to be kept."""
        return {kept.step for kept in self.kept.values()}

    def restore(self, world: World, step: int) -> None:
        """Take up the record as it was at `step`: what a resumed run does again is forgotten. Collective."""
        record = world.broadcast(world.agree(lambda: self._newest(step) if world.is_main else None))
        if record is None:
            if (self.run_dir / "best").is_dir():
                log.warning("an older version kept which pass was the best: best and lowest start anew")
            return
        episodes, last, kept = record
        if episodes != list(self.compared.episodes) or last.sums.shape[1] != len(self.compared.weights):
            log.warning("the validation windows are others than at step %d: best and lowest start anew", last.step)
            return
        self.last, self.kept = last, kept
        if world.is_main:
            self._move_links()

    def _newest(self, step: int) -> tuple[list[str], Pass, dict[str, Pass]] | None:
        """(episodes, last pass, passes kept) of the newest record up to `step`; later ones are removed. Raises
        `UserError`."""
        records = self._records()
        for later in [s for s in records if s > step]:
            records.pop(later).unlink()
        if not records:
            return None
        return read_record(records[max(records)])

    def update(self, world: World, step: int, scores: Scores) -> set[str]:
        """Take in the pass at `step`; returns what it is so far, of best and lowest. The caller then saves the step's
        checkpoint where it is in `steps`, and calls `point`."""
        if not np.isfinite(scores.loss):
            return set()
        now, told = Pass(step, scores.loss, scores.sums), ""
        best, lowest = self.kept.get(BEST), self.kept.get(LOWEST)
        taken = {LOWEST} if lowest is None or now.loss < lowest.loss else set()
        if self.margin is not None and len(now.sums) >= MIN_EPISODES:
            told, improved = ("", True) if best is None else self._improves(now, best)
            taken |= {BEST} if improved else set()
        self.last, self.kept = now, {**self.kept, **dict.fromkeys(taken, now)}
        named = ", ".join(f"{name}: step {self.kept[name].step}" for name in (BEST, LOWEST) if name in self.kept)
        log.info("validation: %s%s", told, named)
        if world.is_main:
            self._record(now)
        return taken

    def _record(self, now: Pass) -> None:
        path = self._folder / f"{now.step:08d}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        passes = list({p.step: p for p in (*self.kept.values(), now)}.values())
        arrays: dict[str, Any] = {name: kept.step for name, kept in self.kept.items()}
        arrays |= {"episodes": self.compared.episodes, "sums": np.stack([p.sums for p in passes])}
        arrays |= {"steps": [p.step for p in passes], "losses": [p.loss for p in passes]}
        with open(path.with_suffix(".tmp"), "wb") as file:
            np.savez(file, **arrays)
        os.replace(path.with_suffix(".tmp"), path)

    def point(self) -> None:
        """Let the links in `checkpoints/` name the passes' checkpoints once these are whole. Rank 0 only."""
        self._move_links()
        kept = {p.name for p in (self.run_dir / "checkpoints").glob("[0-9]*")}
        records = self._records()
        # A resume from an older checkpoint needs the record of then: the newest one not after that checkpoint.
        oldest = min((int(name) for name in kept if name.isdigit()), default=0)
        needed = max((s for s in records if s <= oldest), default=0)
        for stale in [s for s in records if s < needed]:
            records[stale].unlink()

    def _move_links(self) -> None:
        folder = self.run_dir / "checkpoints"
        for name in (BEST, LOWEST):
            link, kept = folder / name, self.kept.get(name)
            if kept is not None and (folder / f"{kept.step:08d}" / "run.json").is_file():
                commit.point(link, f"{kept.step:08d}")
            elif link.is_symlink() and not link.exists():
                link.unlink()

    def _improves(self, now: Pass, best: Pass) -> tuple[str, bool]:
        """How `now` compares with `best` in words, and whether it is better by more than noise."""
        both = in_common(now.sums, best.sums)
        if both.sum() < MIN_EPISODES:
            log.warning(
                "the pass at step %d has too few windows in common with step %d's to compare", now.step, best.step
            )
            return "", False
        c = self.compared
        columns = now.sums[both], best.sums[both], c.group_of[both], c.groups, c.weights, c.episode_of[both]
        delta, error = paired_difference(*columns)
        return f"{delta:+.5f} ± {error:.5f} against step {best.step}; ", -delta > (self.margin or 0.0) * error

    @property
    def _folder(self) -> Path:
        return self.run_dir / "passes"

    def _records(self) -> dict[int, Path]:
        return {int(p.stem): p for p in self._folder.glob("[0-9]*.npz")}
