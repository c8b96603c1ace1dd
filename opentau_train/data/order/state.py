"""What a checkpoint keeps of the tape, and what a resume says when the plan is no longer the same.

The tape is a pure function of the sample number t, so its state is t and the identity of the plan: below 4 KiB for any
data, and nothing has to be replayed.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from opentau_train.data.order.blocks import DatasetBlocks
from opentau_train.data.order.tape import VERSION, Tape
from opentau_train.errors import UserError

MAX_BYTES = 3500
"""Of the sources' part, as JSON: beyond it only hashes are kept, and an error can no longer name the cause."""

_PLAN = {
    "seed": "seed",
    "batch_size": "trainer.global_batch_size",
    "lanes": "data.lanes_per_sample * trainer.global_batch_size",
    "phase_rows": "data.phase_rows",
}
_CAUSES = {
    "settings": "the settings that choose its windows (episodes, exclude_episodes, success_only, val_split_ratio, "
    "chunk_length, sample_stride, drop_tail, fps, filter_rule, ...)",
    "filter": "the filter file",
    "files": "the dataset's files",
    "blocks": "its windows",
}
"""Most specific first: other settings may also change what is read of the files."""


def save_state(tape: Tape, step: int) -> dict[str, Any]:
    """The state after `step` optimizer steps: JSON, below 4 KiB."""
    return {
        "version": VERSION,
        "t": tape.first_sample(step),
        "seed": tape.seed,
        "batch_size": tape.batch_size,
        "lanes": tape.num_lanes,
        "phase_rows": tape.phase_rows,
        "epoch_size": tape.epoch_size,
        "sources": _sources(tape),
    }


def resume_offset(tape: Tape, state: dict[str, Any], step: int, *, restart: bool = False) -> int:
    """The `offset` with which the tape goes on at `step` where the run that saved `state` stopped.

    Where the plan has changed: `UserError` naming what, or with `restart` the offset at which the changed plan's next
    epoch begins, one that the old plan had not begun.
    """
    t = int(state["t"])
    changes = changed(state, save_state(tape, step))
    if not changes:
        return t - step * tape.batch_size
    if restart:
        epoch = -(-t // int(state["epoch_size"]))
        return epoch * tape.epoch_size - step * tape.batch_size
    raise UserError(
        f"the data plan is not the checkpoint's: {'; '.join(changes[:4])}{'; ...' if len(changes) > 4 else ''}",
        where="the checkpoint's stream state",
        remedy="restore it for an exact resume, or add resume.data=restart to begin an epoch of the changed plan",
    )


def changed(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two states' plans, in words."""
    if saved["version"] != now["version"]:
        return [f"the order's version, {saved['version']} there and {now['version']} here"]
    found = [f"{name}: {saved[key]} -> {now[key]}" for key, name in _PLAN.items() if saved[key] != now[key]]
    theirs, mine = saved["sources"], now["sources"]
    if theirs == mine:
        return found
    if isinstance(theirs, str) or isinstance(mine, str):
        return [*found, "the sources (too many to say which)"]
    found += [f"source '{name}' was added" for name in mine if name not in theirs]
    found += [f"source '{name}' was removed" for name in theirs if name not in mine]
    found += filter(None, (_source_change(name, theirs[name], mine[name]) for name in mine if name in theirs))
    if not found:  # the sources' windows are the same: only how often they are drawn can differ
        found = [
            f"source '{name}': weight, {theirs[name]['draws']} -> {mine[name]['draws']} windows an epoch"
            for name in mine
            if theirs[name]["draws"] != mine[name]["draws"]
        ]
    return found


def _source_change(name: str, theirs: Any, mine: Any) -> str:
    if isinstance(theirs, str) or isinstance(mine, str):
        return f"source '{name}'" if theirs != mine else ""
    for key, words in _CAUSES.items():
        if theirs.get(key) != mine.get(key):
            return f"source '{name}': {words} changed"
    return ""


def _sources(tape: Tape) -> Any:
    """{name: what it is made of}, where that is too long {name: a hash}, where that is too long one hash."""
    pairs = list(zip(tape.datasets, tape.draws.tolist(), strict=True))
    full = {b.name: _identity(b, draws) for b, draws in pairs}
    hashes = {name: _hash(json.dumps(identity)) for name, identity in full.items()}
    for form in (full, hashes):
        if len(json.dumps(form)) <= MAX_BYTES:
            return form
    return _hash(json.dumps(hashes))


def _identity(blocks: DatasetBlocks, draws: int) -> dict[str, Any]:
    return {**blocks.made_of, "blocks": blocks.digest(), "draws": draws}


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
