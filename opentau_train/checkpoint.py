"""Checkpoints that are whole or absent.

    checkpoints/{step:08d}.tmp/   every rank writes, every rank acknowledges
    checkpoints/{step:08d}/       renamed: now it is a checkpoint
    checkpoints/last -> {step}    moved after that; older ones are pruned last

Inside: `state/` (torch.distributed.checkpoint: parameters, moments, average), `rng/`, `run.json` (step, counters, the
stream's state) and `pretrained_model/` (safetensors, config, statistics, the action convention). A killed save leaves a
`.tmp` directory, which nothing ever reads.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from opentau_train.distributed import World
from opentau_train.errors import UserError
from opentau_train.step import TrainState

VERSION = 1


@dataclass(frozen=True)
class Pretrained:
    """What `pretrained_model/` holds beside the weights: the settings tree, statistics a norm head, conventions."""

    config: dict[str, Any]
    stats: dict[str, dict]
    policy: dict[str, Any]


def save(
    run_dir: Path,
    state: TrainState,
    world: World,
    *,
    stream: dict[str, Any],
    counters: dict[str, int],
    pretrained: Pretrained,
    keep_last: int | None,
) -> Path:
    """Write the checkpoint of `state.step` and make it the last one. Collective.

    Raises RuntimeError on all ranks when any of them couldn't write; the checkpoints before stay as they were.
    """
    folder = run_dir / "checkpoints"
    final, partial = folder / f"{state.step:08d}", folder / f"{state.step:08d}.tmp"
    weights = get_model_state_dict(state.policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        for name in ("rng", "pretrained_model"):
            (partial / name).mkdir(parents=True)

    def write() -> None:
        with _alone(world) as no_dist:
            dcp.save(_tensors(state), checkpoint_id=partial / "state", no_dist=no_dist)

    def write_own() -> None:
        torch.save(_rng_state(), partial / "rng" / f"{world.rank}.pt")
        if world.is_main:
            _write_json(
                partial / "run.json", {"version": VERSION, "step": state.step, "counters": counters, "stream": stream}
            )
            _write_pretrained(partial / "pretrained_model", weights, pretrained)

    def commit() -> None:
        _sync(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _point(folder / "last", final.name)
        _prune(folder, keep_last, keep=final.name)

    _together(world, partial, prepare, main_only=True)
    _together(world, partial, write)
    _together(world, partial, write_own)
    _together(world, partial, commit, main_only=True)
    return final


@contextmanager
def _alone(world: World) -> Iterator[bool]:
    """True on a world of one, without the warning that this is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield world.size == 1


def _together(world: World, partial: Path, work: Callable[[], None], main_only: bool = False) -> None:
    """`work()` on the ranks; where it failed on any, the unfinished directory goes and all ranks raise."""
    problem = None
    try:
        if world.is_main or not main_only:
            work()
    except (OSError, RuntimeError, CheckpointException) as error:
        problem = f"rank {world.rank}: {_root_cause(error)}"
    problems = [p for p in world.gather(problem) if p]
    if problems:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        last = partial.parent / "last"
        good = f"the last good checkpoint is {last.resolve()}" if last.exists() else "there is no earlier checkpoint"
        raise RuntimeError(f"can't save {partial.with_suffix('')}: {problems[0]}; {good}")


def _root_cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        inner = next(iter(error.failures.values()))
        return str(inner[0] if isinstance(inner, tuple) else inner)
    return str(error) or type(error).__name__


def _tensors(state: TrainState) -> dict[str, Any]:
    tensors = {
        "model": get_model_state_dict(state.policy),
        "optimizer": get_optimizer_state_dict(state.policy, state.optimizer),
    }
    if state.ema is not None:
        tensors["ema"] = state.ema.state_dict()
    return tensors


def load(path: Path, state: TrainState, world: World) -> dict[str, Any]:
    """Fill `state` from the checkpoint at `path`, on any number of ranks; returns `run.json`. Collective.

    Raises `UserError` naming the keys that differ when the checkpoint is of another model or format.
    """
    run = world.agree(lambda: _read_run(path))
    tensors = _tensors(state)
    world.agree(lambda: _check_schema(path, tensors))
    with _alone(world) as no_dist:
        dcp.load(tensors, checkpoint_id=path / "state", no_dist=no_dist)
    set_model_state_dict(state.policy, tensors["model"])
    set_optimizer_state_dict(state.policy, state.optimizer, optim_state_dict=tensors["optimizer"])
    if state.ema is not None:
        state.ema.load_state_dict(tensors["ema"])
    own = path / "rng" / f"{world.rank}.pt"
    if own.is_file():
        _set_rng_state(torch.load(own, weights_only=False))
    state.step = run["step"]
    return run


def _read_run(path: Path) -> dict[str, Any]:
    try:
        run = json.loads((path / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"not a checkpoint: {error}",
            where=str(path),
            remedy="give a directory of the form RUN/checkpoints/00001000",
        ) from error
    if run.get("version") != VERSION:
        raise UserError(
            f"the checkpoint has format {run.get('version')}, this program reads {VERSION}",
            where=str(path),
            remedy="resume it with the version of opentau_train that wrote it",
        )
    return run


def _check_schema(path: Path, tensors: dict[str, Any]) -> None:
    saved = dcp.FileSystemReader(path / "state").read_metadata().state_dict_metadata
    theirs = {k: tuple(v.size) for k, v in saved.items() if hasattr(v, "size")}
    mine = {
        f"{part}.{name}": tuple(value.shape)
        for part, values in tensors.items()
        if part != "optimizer"
        for name, value in values.items()
    }
    theirs = {k: v for k, v in theirs.items() if not k.startswith("optimizer.")}
    missing = sorted(set(mine) - set(theirs))
    extra = sorted(set(theirs) - set(mine))
    shapes = sorted(k for k in mine.keys() & theirs.keys() if mine[k] != theirs[k])
    if missing or extra or shapes:
        parts = [
            *(f"shape of {k}: {theirs[k]} there, {mine[k]} here" for k in shapes[:2]),
            *([f"{len(missing)} keys missing there: {', '.join(missing[:3])}"] if missing else []),
            *([f"{len(extra)} keys unknown here: {', '.join(extra[:3])}"] if extra else []),
        ]
        raise UserError(
            "the checkpoint is of another model: " + "; ".join(parts),
            where=str(path),
            remedy="use the model and camera settings of its pretrained_model/config.json, or start a new run",
        )


# -- which one -------------------------------------------------------------------------------------------------------


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a `checkpoints/` directory, oldest first."""
    found = [p for p in folder.glob("[0-9]*") if p.name.isdigit() and (p / "run.json").is_file()]
    return sorted(found, key=lambda p: int(p.name))


def resolve(resume: str, run_dir: Path | None) -> Path | None:
    """The checkpoint that `resume` names: never -> None, auto -> the newest complete one of `run_dir` (or None), else
    a checkpoint's or a run's path. Raises `UserError` where there is none at a given path, or where resume=never would
    write over a run."""
    existing = complete(run_dir / "checkpoints") if run_dir is not None else []
    if resume == "never":
        if existing:
            raise UserError(
                f"the run directory already has a checkpoint of step {int(existing[-1].name)}",
                where=f"paths.run_dir={run_dir}",
                remedy="add resume=auto to continue it, or choose another paths.run_dir",
            )
        return None
    if resume == "auto":
        return existing[-1] if existing else None
    given = Path(resume).expanduser()
    if (given / "run.json").is_file():
        return given.resolve()
    found = complete(given / "checkpoints")
    if not found:
        raise UserError(
            "no complete checkpoint there",
            where=f"resume={resume}",
            remedy="give a run directory, a checkpoint directory RUN/checkpoints/STEP, auto or never",
        )
    return found[-1]


def newest_run(root: Path, name: str) -> Path | None:
    """The run directory `root/name-*` with the most recently written checkpoint."""
    runs = [(c[-1].stat().st_mtime, r) for r in root.glob(f"{name}-*") if (c := complete(r / "checkpoints"))]
    return max(runs)[1] if runs else None


# -- files -----------------------------------------------------------------------------------------------------------


def _write_pretrained(folder: Path, weights: Mapping[str, Any], pretrained: Pretrained) -> None:
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")
    _write_json(folder / "config.json", pretrained.config)
    _write_json(folder / "stats.json", pretrained.stats)
    _write_json(folder / "policy.json", pretrained.policy)


def _write_json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, indent=1) + "\n")


def _sync(folder: Path) -> None:
    """Flush files and directories to the disk: a rename must not survive a power cut that its content did not."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _point(link: Path, target: str) -> None:
    fresh = link.with_name(link.name + ".tmp")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    os.replace(fresh, link)


def _prune(folder: Path, keep_last: int | None, keep: str) -> None:
    if keep_last is None:
        return
    named = {os.readlink(link) for link in folder.iterdir() if link.is_symlink()}  # last, and best
    for path in complete(folder)[:-keep_last]:
        if path.name != keep and path.name not in named:
            # Renamed first: a kill in the middle of the deletion must not leave half a checkpoint with a good name.
            doomed = path.with_name(f"{path.name}.tmp")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _rng_state() -> dict[str, Any]:
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
