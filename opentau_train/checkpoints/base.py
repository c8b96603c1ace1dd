"""The base of a fine-tuned policy: first weights that stay frozen are left out of its checkpoints.

A checkpoint's card names where they are, and a digest of them (`record`). Whoever reads the checkpoint reads them there
again (`base_of`), and is told where they aren't the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from opentau_train import strangers
from opentau_train.checkpoints.weight_files import Entry, open_weights
from opentau_train.checkpoints.weights import FirstWeights, Plan, fill, locate_weights
from opentau_train.errors import UserError
from opentau_train.models.finetune import set_aside, with_adapter
from opentau_train.models.policy import Policy

KEY = "base"
"""The card's entry, in `Pretrained.policy`."""


def plan_base(policy: Policy, first: FirstWeights) -> Plan:
    """What of `policy`, which may have adapters, the `first` weights fill. Raises `UserError` where they don't fit."""
    with set_aside(policy, policy.adapters):
        return first.plan(policy)


def fill_part(policy: Policy, plan: Plan) -> None:
    """Fill `policy`, which may have adapters, by `plan`."""
    with set_aside(policy, policy.adapters):
        fill(policy, plan)


def fill_base(policy: Policy, plan: Plan) -> None:
    """The same, and note the frozen parameters that are the file's (`Policy.borrowed`)."""
    fill_part(policy, plan)
    filled = {with_adapter(name, policy.adapters) for name in plan.sources}
    frozen = {name for name, parameter in policy.named_parameters() if not parameter.requires_grad}
    policy.borrowed = tuple(sorted(filled & frozen))


def record(first: FirstWeights) -> dict[str, str]:
    """The card's entry: the key of `model`, the path (or the name on the Hub) and the digest."""
    given = Path(first.given).expanduser()
    path = str(given.absolute()) if given.exists() else first.given
    return {"key": first.key, "path": path, "digest": digest(first.path)}


def base_of(entry: Mapping[str, str], model: Mapping[str, Any], setting: str) -> FirstWeights:
    """The weights that a card's `entry` speaks of, where the settings `model` name them now, else where it says.
    `setting`: the one that can name another place; `model`: that section's own. Raises `UserError` where they aren't
    there, or are others."""
    with strangers.understood("where its frozen weights are", KEY):
        key, path, expected = (str(entry[name]) for name in ("key", "path", "digest"))
    setting = f"model.{key}" if setting == "model" else setting
    where = model.get(key) or path
    remedy = f"put back there what the run began with, or set {setting} to the place where it is now"
    try:
        first = locate_weights({key: where, "resize_dims": model.get("resize_dims", False)})
    except UserError as error:
        raise UserError(
            f"the checkpoint's frozen weights can't be read: {error.what}", where=where, remedy=remedy
        ) from error
    if first is None:
        raise UserError(f"the checkpoint's frozen weights are of no known kind, '{key}'", where=KEY, remedy=remedy)
    if digest(first.path) != expected:
        what = "the file has other weights than those that the checkpoint leaves out, frozen in training"
        raise UserError(what, where=where, remedy=remedy)
    return first


def digest(path: Path) -> str:
    """Of the weights at `path`: names, types, shapes, and the first, middle and last row of every tensor. Other weights
    of the same model differ in nearly all of them, and to read 14 GB at each start would take half a minute."""
    entries = open_weights(path)
    by_file: dict[Path, list[tuple[str, Entry]]] = {}
    for name, entry in sorted(entries.items()):
        by_file.setdefault(entry.file, []).append((name, entry))
    digests = {}
    for file, listed in by_file.items():
        with safe_open(file, framework="pt") as opened:
            for name, entry in listed:
                rows = sorted({0, entry.shape[0] // 2, entry.shape[0] - 1}) if entry.shape and entry.shape[0] else []
                parts = [opened.get_slice(name)[row : row + 1] for row in rows]
                parts += [] if entry.shape else [opened.get_tensor(name)]
                sample = hashlib.blake2b(f"{entry.dtype}{entry.shape}".encode(), digest_size=16)
                for part in parts:
                    sample.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
                digests[name] = sample.digest()
    whole = hashlib.blake2b(digest_size=16)
    for name in sorted(digests):
        whole.update(name.encode() + digests[name])
    return whole.hexdigest()
