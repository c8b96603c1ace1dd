"""Where a run writes, and what it goes on from: the run directory, held for this launch, and its checkpoint."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from opentau_train.checkpoints import commit, manifest
from opentau_train.checkpoints.lock import Lock
from opentau_train.config.settings import Settings
from opentau_train.distributed.world import World
from opentau_train.errors import UserError, check_machine

log = logging.getLogger(__name__)

LONGEST_LABEL = 40
"""Characters of the datasets' names in a run's."""


@dataclass(frozen=True)
class Place:
    """The run directory, the `checkpoint` to start from or None, and on rank 0 the directory's `lock`."""

    run_dir: Path
    checkpoint: Path | None
    lock: Lock | None = None

    @property
    def step(self) -> int:
        """The step that is gone on from, as far as the checkpoint's name tells it; else 0."""
        name = self.checkpoint.name if self.checkpoint is not None else ""
        return int(name) if name.isdigit() else 0

    def check(self) -> None:
        """Raises `RunDirLost` where the directory is this run's no more. Only rank 0 knows."""
        if self.lock is not None:
            self.lock.check()


@contextmanager
def held(settings: Settings, world: World) -> Iterator[Place]:
    """The place of the run that `settings` describe, no other's while inside. Collective; raises `UserError` on all
    ranks alike: where another run holds it, or `resume` names what can't be gone on from."""
    run_dir = world.broadcast(world.agree(lambda: run_dir_of(settings) if world.is_main else Path()))
    lock = world.agree(lambda: _lock(run_dir) if world.is_main else None)
    try:
        resume = settings.resume.checkpoint
        found = world.agree(lambda: _found(resume, run_dir) if world.is_main else None)
        yield Place(run_dir, _undamaged(world.broadcast(found), settings, world), lock)
    finally:
        if lock is not None:
            lock.release()


def _found(resume: str, run_dir: Path) -> Path | None:
    if resume == "auto":
        commit.take_up(run_dir / "checkpoints")
    return commit.resolve(resume, run_dir)


def _lock(run_dir: Path) -> Lock:
    try:
        return Lock(run_dir)
    except OSError as error:
        raise not_writable(error, run_dir) from error


def not_writable(error: OSError, run_dir: Path) -> UserError:
    """The error of a run directory in which `error` came up. Raises `Fault` where the machine is to blame."""
    check_machine(error, run_dir)
    return UserError(
        f"the run directory can't be written: {error}",
        where=str(run_dir),
        remedy="set paths.run_dir, or paths.root, to a directory that you can write",
    )


def begin_run(run_dir: Path, tree: dict[str, Any]) -> None:
    """Write down what runs. Raises `UserError` where the run directory can't be written."""
    try:
        (run_dir / "config.yaml").write_text(as_yaml(tree))
    except OSError as error:
        raise not_writable(error, run_dir) from error


def as_yaml(tree: dict[str, Any]) -> str:
    """A plain configuration tree as YAML, keys in the order they were composed."""
    return yaml.safe_dump(tree, sort_keys=False)


def run_dir_of(settings: Settings) -> Path:
    """The run directory that the settings name, or that `resume` goes on in; else a new one, named after the time."""
    root, resume = Path(settings.paths.root).expanduser(), settings.resume.checkpoint
    if settings.paths.run_dir:
        return Path(settings.paths.run_dir).expanduser().absolute()
    if resume not in ("auto", "never"):
        return commit.at(resume).parent.parent.absolute()
    data = {name: _dataset(name, source.root, source.repo_id) for name, source in settings.data.sources.items()}
    newest = newest_run(root, settings.name, data, settings.resume.data == "restart") if resume == "auto" else None
    label = re.sub(r"[^\w.+-]", "_", "+".join(dict.fromkeys(data.values())))[:LONGEST_LABEL]
    return (newest or root / f"{settings.name}-{label}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()


def newest_run(root: Path, name: str, data: Mapping[str, str], restart: bool = False) -> Path | None:
    """The run directory `root/name-*` with the most recently written checkpoint, of those that train on `data`,
    {source: its dataset's name}; logs which newer ones are of other data. `restart`: of any data, which a resume then
    changes.
    """
    runs = [(c[-1].stat().st_mtime, r) for r in root.glob(f"{name}-*") if (c := commit.complete(r / "checkpoints"))]
    newest_first = [run for _, run in sorted(runs, reverse=True)]
    passed = list(takewhile(lambda run: not restart and _data_of(run) != data, newest_first))
    if passed:
        named = ", ".join(f"{n}: {d}" for n, d in _data_of(passed[0]).items()) or "its config.yaml names none"
        more = f" and {len(passed) - 1} older" * (len(passed) > 1)
        log.warning("resume=auto passes over runs of other data: %s (%s)%s", passed[0], named, more)
    return next(iter(newest_first[len(passed) :]), None)


def _data_of(run: Path) -> dict[str, str]:
    """{source: its dataset's name} of a run, as it was started; {} where that can't be read."""
    try:
        sources = yaml.safe_load((run / "config.yaml").read_text())["data"]["sources"]
        return {name: _dataset(name, source.get("root"), source.get("repo_id")) for name, source in sources.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError):
        return {}


def _dataset(name: str, root: str | None, repo_id: str | None) -> str:
    """The last part of a dataset's place, which it keeps when it is moved; the source's `name` where it has none."""
    return Path(repo_id or root or name).name


def _undamaged(checkpoint: Path | None, settings: Settings, world: World) -> Path | None:
    """`checkpoint` or, with resume=auto, the newest one before it whose files are as they were written; what is damaged
    is set aside. The ranks share the files. Collective; raises `UserError` for a damaged checkpoint that was named."""
    while checkpoint is not None and settings.checkpoint.verify:
        share = partial(manifest.damage, checkpoint, part=world.rank, parts=world.size)
        why = next((damage for damage in world.gather(world.agree(share)) if damage is not None), None)
        if why is None:
            break
        if settings.resume.checkpoint != "auto":
            raise manifest.damaged(checkpoint, why)
        damaged, checkpoint = checkpoint, None
        if world.is_main:
            log.warning("skipped %s: %s; it is kept as %s", damaged, why, commit.set_aside(damaged))
            checkpoint = commit.newest(damaged.parent)
        checkpoint = world.broadcast(checkpoint)
    return checkpoint
