"""What a checkpoint keeps of the tape, and the error of a resume whose plan is no longer the same.

The tape is a pure function of the sample number t, so its state is t and the identity of the plan: below 4 KiB for any
data, and nothing has to be replayed.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from opentau_train.data.order.blocks import DatasetBlocks
from opentau_train.data.order.tape import VERSION, VERSIONS, Tape
from opentau_train.errors import UserError

MAX_BYTES = 3500
"""Bytes that the state's "sources" may take as JSON. Where they would take more only hashes are kept, and an error can
no longer name the cause."""

_PLAN = {
    "seed": "seed",
    "batch_size": "trainer.global_batch_size",
    "lanes": "data.lanes_per_sample * trainer.global_batch_size",
    "phase_rows": "data.phase_rows",
}
_CAUSES = {
    "filter": "the filter file",
    "files": "the dataset's files",
    "blocks": "its windows",
    "keyframes": "what is known of its videos' keyframes (nothing of a dataset on a server)",
}
"""Most specific first. Which settings have changed is for the configuration to say (`config/drift`)."""


def save_state(tape: Tape, step: int) -> dict[str, Any]:
    """The state after `step` optimizer steps: JSON, below 4 KiB."""
    return {
        "version": tape.version,
        "t": tape.first_sample(step),
        "seed": tape.seed,
        "batch_size": tape.batch_size,
        "lanes": tape.num_lanes,
        "phase_rows": tape.phase_rows,
        "epoch_size": tape.epoch_size,
        "sources": _sources(tape),
    }


def order_version(state: dict[str, Any]) -> int:
    """The version of the order that the run which saved `state` goes on with: its own, if that can still be read."""
    return state["version"] if state["version"] in VERSIONS else VERSION


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
    changes = [f"{name}: {saved[key]} -> {now[key]}" for key, name in _PLAN.items() if saved[key] != now[key]]
    before, after = saved["sources"], now["sources"]
    if before == after:
        return changes
    if isinstance(before, str) or isinstance(after, str):
        return [*changes, "the sources (too many to say which)"]
    changes += [f"source '{name}' was added" for name in after if name not in before]
    changes += [f"source '{name}' was removed" for name in before if name not in after]
    changes += filter(None, (_source_change(name, before[name], after[name]) for name in after if name in before))
    if not changes:  # the sources' windows are the same: only how often they are drawn can differ
        changes = [
            f"source '{name}': weight, {before[name]['draws']} -> {after[name]['draws']} windows an epoch"
            for name in after
            if not isinstance(after[name], str) and before[name]["draws"] != after[name]["draws"]
        ]
    return changes


def _source_change(name: str, before: Any, after: Any) -> str:
    """Either may be a hash of it all; the state of an older version has keys that count no more."""
    if isinstance(before, str) or isinstance(after, str):
        return f"source '{name}'" if before != after else ""
    for key, words in _CAUSES.items():
        if before.get(key) != after.get(key):
            return f"source '{name}': {words} changed"
    return ""


def _sources(tape: Tape) -> Any:
    """{name: what it is made of}, where that is too long {name: a hash}, where that is too long one hash."""
    pairs = list(zip(tape.datasets, tape.draws.tolist(), strict=True))
    full = {b.name: _identity(b, draws, tape.version) for b, draws in pairs}
    hashes = {name: _hash(json.dumps(identity)) for name, identity in full.items()}
    for form in (full, hashes):
        if len(json.dumps(form)) <= MAX_BYTES:
            return form
    return _hash(json.dumps(hashes))


def _identity(blocks: DatasetBlocks, draws: int, version: int) -> dict[str, Any]:
    known = {"keyframes": blocks.groups_digest} if version > 2 and blocks.groups is not None else {}
    return {**blocks.made_of, "blocks": blocks.digest(), "draws": draws, **known}


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
