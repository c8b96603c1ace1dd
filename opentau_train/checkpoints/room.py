"""Whether a run's checkpoints will fit on the disk, compared before its first step."""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from opentau_train.checkpoints import commit
from opentau_train.config.settings import Settings

log = logging.getLogger(__name__)

REMEDY = "make room, or set checkpoint.keep_last=1 or paths.run_dir to a larger disk"


def num_at_once(settings: Settings, step: int, num_there: int) -> int:
    """The most checkpoints that are there at one time from `step` on, the `num_there` of before included: the kept
    ones, `best` and `lowest`, and the one that is being written."""
    keep, last, every = settings.checkpoint, settings.trainer.steps, settings.checkpoint.every
    num = num_there + ((last - 1) // every - step // every if every else 0) + 1
    if keep.keep_last is None:
        return num
    for_ever = last // math.lcm(every, keep.keep_every) if every and keep.keep_every else 0
    linked = 1 + (settings.validation.best_margin is not None) if settings.validation.every > 0 else 0
    return min(num, for_ever + keep.keep_last + 1 + linked)


@dataclass(frozen=True)
class Room:
    """What checkpoints take: `num` of them at a time, `more` bytes than those that are there, of `free` ones."""

    num: int
    more: int
    free: int

    @property
    def lacks(self) -> bool:
        return self.more > self.free


def needed(folder: Path, settings: Settings, step: int, num_bytes: int) -> Room:
    """What the checkpoints to come in the `checkpoints/` directory `folder`, which needn't be there, take from `step`
    on, of `num_bytes` each."""
    num_there = len(commit.complete(folder))
    num = num_at_once(settings, step, num_there)
    there = next(path for path in folder.absolute().parents if path.exists())
    return Room(num, (num - num_there) * num_bytes, shutil.disk_usage(there).free)


def warn_of_room(folder: Path, settings: Settings, step: int, num_bytes: int) -> None:
    """Warn where the disk of the `checkpoints/` directory `folder` has less free than those to come take, of
    `num_bytes` each."""
    room = needed(folder, settings, step, num_bytes)
    if room.lacks:
        log.warning(
            "the run's checkpoints will take %.3g GB more (%d at a time, %.3g GB each), and the disk has %.3g GB free: "
            "%s\n  remedy: %s",
            room.more / 1e9,
            room.num,
            num_bytes / 1e9,
            room.free / 1e9,
            folder,
            REMEDY,
        )
