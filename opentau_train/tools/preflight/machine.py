"""Whether the disk takes the run's checkpoints, and a device what a rank holds."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from opentau_train.checkpoints import commit, room
from opentau_train.config.settings import Settings
from opentau_train.distributed import memory as forecast
from opentau_train.distributed.parallel import check_batch
from opentau_train.distributed.rehearsal import Rehearsal
from opentau_train.errors import UserError
from opentau_train.tools.preflight.lines import Line
from opentau_train.tools.preflight.rendezvous import Topology

GIB = 2**30


def disk(settings: Settings, rehearsal: Rehearsal) -> list[Line]:
    """Whether the run's directory can be written, and has room for the checkpoints."""
    given = Path(settings.paths.run_dir or settings.paths.root).expanduser().absolute()
    there = next(path for path in (given, *given.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        remedy = "set paths.run_dir, or paths.root, to a directory that you can write"
        return [Line("disk", "error", f"{there} can't be written", "paths", remedy)]
    num_bytes = forecast.saved_bytes(rehearsal, settings, rehearsal.policy.borrowed)
    if num_bytes is None:
        return [
            Line("disk", "ok", f"{given} can be written; what a checkpoint takes isn't known before the first step")
        ]
    whole = commit.complete(given / "checkpoints")
    needs = room.needed(given / "checkpoints", settings, int(whole[-1].name) if whole else 0, num_bytes)
    text = f"{needs.num} checkpoints of {num_bytes / 1e9:.3g} GB at a time; {there} has {needs.free / 1e9:.3g} GB free"
    if needs.lacks:
        return [Line("disk", "warning", text, "paths", room.REMEDY)]
    return [Line("disk", "ok", text)]


def memory(settings: Settings, rehearsal: Rehearsal, launch: Topology, device_bytes: int | None) -> list[Line]:
    """What each rank of the `launch` holds, beside the `device_bytes` of its device; None: those of this machine's, if
    any. Raises `UserError` where they can't share the batch, or the layout isn't possible."""
    ranks = launch.ranks
    check_batch(settings.trainer.global_batch_size, ranks)
    try:
        held = forecast.footprint(rehearsal, settings, ranks)
    except UserError:
        if launch.known:
            raise
        return [Line("memory", "ok", "not known: one process can't have this layout, and --ranks N isn't given")]
    if device_bytes is None and torch.cuda.is_available() and settings.trainer.device != "cpu":
        device_bytes = torch.cuda.get_device_properties(0).total_memory
    holds = f"a rank of {ranks} holds {held}"
    notes = [Line("memory", "ok", note) for note in rehearsal.notes.values()]
    if device_bytes is None:
        unknown = "on the CPU" if settings.trainer.device == "cpu" else "no device here: --device-memory GIB compares"
        return [Line("memory", "ok", f"{holds}; {unknown}"), *notes]
    lacking = forecast.shortage(rehearsal, settings, ranks, device_bytes)
    if lacking is not None:
        what, _, remedy = lacking.partition(". ")
        return [Line("memory", "warning", what, "", remedy), *notes]
    return [Line("memory", "ok", f"{holds}, of a device's {forecast.text(device_bytes)}"), *notes]
