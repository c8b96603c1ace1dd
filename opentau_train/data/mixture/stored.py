"""Statistics that an earlier run computed of the same rows, kept in the cache.

They save time and change nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from opentau_train.data.mixture.heads import Head
from opentau_train.data.mixture.normalize import HeadStats
from opentau_train.data.transforms.pipeline import Pipeline
from opentau_train.errors import UserError, check_machine

log = logging.getLogger(__name__)

VERSION = 2


def identity(head: Head) -> list[str]:
    """What the statistics of a norm head follow from."""
    parts = []
    for d, *chosen in head.members:
        names, positions = d.state_names + d.action_names, [repr(np.flatnonzero(of).tolist()) for of in chosen]
        parts += [d.name, d.source.fingerprint, d.source.rows_stamp, repr(names), *positions]
        if d.transforms:
            parts.append(json.dumps(Pipeline(d.transforms).to_json()))
        if head.by_chunks:
            parts.append(json.dumps([d.chunk_offsets.tolist(), head.per_timestep]))
            if d.between is not None and (d.chunk_offsets % 1).any():
                parts.append(repr(d.between))
    return parts


def read(cache: Path, heads: Sequence[Head]) -> dict[str, HeadStats]:
    """{norm head: statistics} of those heads that `write` has stored in `cache`."""
    found = ((head.name, read_one(cache, identity(head))) for head in heads)
    return {name: stats for name, stats in found if stats is not None}


def write(cache: Path, stats: dict[Head, HeadStats]) -> None:
    """Keep the statistics for `read`. Raises `UserError` where they can't be stored."""
    for head, own in stats.items():
        write_one(cache, identity(head), own)


def read_one(cache: Path, identity: Sequence[str]) -> HeadStats | None:
    """What was stored in `cache` under `identity`; None where nothing is that can be read."""
    path = _path(cache, identity)
    if not path.is_file():
        return None
    try:
        return HeadStats.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError) as error:
        log.warning("%s can't be read and is computed again: %s", path, error)
        return None


def write_one(cache: Path, identity: Sequence[str], stats: HeadStats) -> None:
    """Store `stats` in `cache` under `identity`. Raises `UserError` where they can't be stored."""
    path = _path(cache, identity)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            fresh = Path(folder) / path.name
            with open(fresh, "w") as file:
                json.dump(stats.to_json(), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
    except OSError as error:
        check_machine(error, path.parent)
        remedy = "set paths.cache_dir to a directory that you can write"
        raise UserError(f"the statistics can't be stored: {error}", where=str(path.parent), remedy=remedy) from error


def _path(cache: Path, identity: Sequence[str]) -> Path:
    digest = hashlib.blake2b(json.dumps([VERSION, *identity]).encode(), digest_size=16).hexdigest()
    return cache / "stats" / f"{digest}.json"
