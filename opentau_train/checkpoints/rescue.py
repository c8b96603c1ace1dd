"""A run whose directory is gone, or another's, saves what it has beside it: `RUN.rescued-TIME`."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from opentau_train.checkpoints.lock import NAME as LOCK
from opentau_train.checkpoints.lock import RunDirLost
from opentau_train.checkpoints.place import Place
from opentau_train.checkpoints.saver import Saver
from opentau_train.step import TrainState

OPEN_FILES = Path("/proc/self/fd")
REMOVED = " (deleted)"
"""What the system appends to an open file's name there."""


def rescue(
    lost: RunDirLost, place: Place, saver: Saver, state: TrainState, *, stream: dict[str, Any], counters: dict[str, int]
) -> RunDirLost:
    """Save the state as a run of its own, with what rank 0's open files of the old directory hold (metrics, logs), and
    return the error that says where. Collective; raises `Fault` on all ranks where it can't be saved."""
    run_dir = place.run_dir
    folder = saver.world.broadcast(run_dir.with_name(f"{run_dir.name}.rescued-{time.strftime('%Y%m%d-%H%M%S')}"))
    settings = dataclasses.replace(saver.settings, asynchronous=False)
    with Saver(folder, saver.world, settings, saver.card, saver.num_bytes) as fresh:
        fresh.save(state, stream=stream, counters=counters)
    if place.lock is not None:
        _copy_open_files(place.lock.handle, folder)
    remedy = f"step {state.step} is saved in {folder}: go on from it with resume={folder}"
    return RunDirLost(lost.what, where=lost.where, remedy=remedy)


def _copy_open_files(lock: int, folder: Path) -> None:
    """Copy what this process still has open of the removed files that lay beside and below the file `lock`: so long the
    system keeps their content. Files that were only moved live on where they are now."""
    if not OPEN_FILES.exists():
        return
    below = os.readlink(OPEN_FILES / str(lock)).removesuffix(f"{LOCK}{REMOVED}")
    for handle in OPEN_FILES.iterdir():
        with suppress(OSError):  # the listing's own handle
            name = os.readlink(handle)
            if name.startswith(below) and name.endswith(REMOVED) and handle.name != str(lock):
                copy = folder / name.removeprefix(below).removesuffix(REMOVED)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(handle, copy)
