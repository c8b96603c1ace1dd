"""What a checkpoint holds, and how it is read back on any number of ranks, however they share the policy.

    state/              torch.distributed.checkpoint: parameters, moments, average, each rank its shards
    run.json            step, counters, the stream's state
    pretrained_model/   the policy by itself (`pretrained`)
    files.json          every file, its size and hash (`manifest`)

It holds no random state: all draws are keyed, and ambient ones are seeded anew in every step (`step`).

`saver` writes it; how the directory becomes a checkpoint, and which one is the newest, is `commit`'s.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from opentau_train import strangers
from opentau_train.checkpoints import shards
from opentau_train.distributed.world import World
from opentau_train.errors import UserError, check_machine
from opentau_train.models.policy import Policy
from opentau_train.step import TrainState

VERSION = 1
RUN = "run.json"

# A world of one is meant, not forgotten. For good: a filter set around the call isn't safe in a thread.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def tensors_of(state: TrainState) -> dict[str, Any]:
    """`model`, `optimizer` and maybe `ema`: this rank's parts under names that no layout of ranks changes."""
    tensors = {
        "model": model_tensors(state.policy),
        "optimizer": get_optimizer_state_dict(state.policy, state.optimizer),
    }
    if state.ema is not None:
        tensors["ema"] = state.ema.state_dict()
    return tensors


def model_tensors(policy: Policy) -> dict[str, Any]:
    """This rank's parts of the parameters and buffers that a checkpoint holds: all but what is borrowed."""
    return {n: value for n, value in get_model_state_dict(policy).items() if n not in set(policy.borrowed)}


def set_model_tensors(policy: Policy, tensors: dict[str, Any]) -> None:
    """Put back what `model_tensors` gave. Collective."""
    set_model_state_dict(policy, {**get_model_state_dict(policy), **tensors})


def load(path: Path, state: TrainState, world: World) -> dict[str, Any]:
    """Fill `state` from the checkpoint at `path`, on any number of ranks and however sharded; returns `run.json`.

    The optimizer keeps its own groups and their options (weight decay, betas): those in the checkpoint are what the run
    was, not what it shall be. Collective. Raises `UserError` naming the keys that differ when the checkpoint is of
    another model, optimizer or format.
    """
    run = world.agree(lambda: read_run(path))
    tensors = tensors_of(state)
    groups = tensors["optimizer"].pop("param_groups")
    if state.ema is not None and not world.agree(lambda: _has(path, "ema")):
        del tensors["ema"]
    read_tensors(path, tensors, world)
    set_model_tensors(state.policy, tensors["model"])
    moments = {**tensors["optimizer"], "param_groups": groups}
    set_optimizer_state_dict(state.policy, state.optimizer, optim_state_dict=moments)
    if state.ema is not None:  # one that begins now begins at the parameters
        state.ema.load_state_dict(tensors.get("ema") or dict(state.policy.named_parameters()))
    state.step = run["step"]
    return run


def read_tensors(path: Path, tensors: dict[str, Any], world: World) -> None:
    """Read this rank's parts of the checkpoint at `path` into `tensors`, {model, ema, optimizer: as `tensors_of` names
    them}, any of the three. Collective. Raises `UserError` where the checkpoint is of another model, or has no average.
    """
    world.agree(lambda: _check_schema(path, tensors))
    shards.read(path, tensors, alone=world.size == 1)


def load_weights(path: Path, policy: Policy, part: str = "model") -> None:
    """Fill the parameters of `policy`, in one process, from a checkpoint's shards: `model`, or `ema`, the average.

    What isn't averaged (frozen parameters, buffers) is the model's in both. Raises `UserError` where they don't fit or
    there is no average.
    """
    own: dict[str, dict[str, torch.Tensor]] = {"model": model_tensors(policy)}
    if part == "ema":
        own["ema"] = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    tensors = {
        kind: {name: torch.empty_like(value, dtype=torch.float32) for name, value in values.items()}
        for kind, values in own.items()
    }
    _check_schema(path, tensors)
    shards.read(path, tensors, alone=True)
    with torch.no_grad():
        for kind, values in own.items():
            for name, value in values.items():
                value.copy_(tensors[kind][name])


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The whole policy's parameters and buffers, on the CPU, from the shards of all ranks. Not collective."""
    kinds = {k: kind for k, kind in shards.kinds(path).items() if kind is not None and k.startswith("model.")}
    empty = {k: torch.empty(kind.size, dtype=kind.properties.dtype) for k, kind in kinds.items()}
    shards.read(path, empty, alone=True)
    return {name.removeprefix("model."): value for name, value in empty.items()}


def as_json(run: dict[str, Any]) -> str:
    """The text of `run.json`."""
    return json.dumps(run, indent=1) + "\n"


def read_run(path: Path) -> dict[str, Any]:
    """`run.json` of the checkpoint at `path`. Raises `UserError` where it is none."""
    try:
        run = strangers.read_mapping(path / RUN)
    except (OSError, ValueError) as error:
        check_machine(error, path)
        raise UserError(
            f"not a checkpoint: {error}",
            where=str(path),
            remedy="give a directory of the form RUN/checkpoints/00001000",
        ) from error
    if run.get("version") != VERSION:
        raise UserError(
            f"the checkpoint has format {str(run.get('version'))[:40]}, this program reads {VERSION}",
            where=str(path),
            remedy="resume it with the version of opentau_train that wrote it",
        )
    counters, stream = run.get("counters"), run.get("stream")
    whole = isinstance(counters, dict) and all(map(_is_count, [run.get("step"), *counters.values()]))
    if not whole or not isinstance(stream, dict):
        what = f"{RUN} lacks the step, counters or the stream's state, or one is no whole number"
        raise UserError(what, where=str(path), remedy="take another checkpoint; resume=auto does so by itself")
    return run


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _has(path: Path, part: str) -> bool:
    return any(key.split(".")[0] == part for key in shards.kinds(path))


def _check_schema(path: Path, tensors: dict[str, Any]) -> None:
    """A part that only the checkpoint has (an average that is no longer kept, moments of another optimizer, averages of
    frozen parameters) is left there."""
    saved = shards.kinds(path)
    parts = [part for part in tensors if part != "optimizer"]
    if "ema" in parts and not any(key.startswith("ema.") for key in saved):
        raise UserError(
            "the checkpoint holds no average of the weights",
            where=str(path),
            remedy="take the weights themselves: trainer.ema_decay=null, or weights=model for an export",
        )
    here = {f"{part}.{name}": tuple(value.shape) for part in parts for name, value in tensors[part].items()}
    there = {k: tuple(kind.size) for k, kind in saved.items() if kind is not None and k.split(".")[0] in parts}
    missing = sorted(set(here) - set(there))
    extra = sorted(key for key in set(there) - set(here) if not key.startswith("ema."))
    shapes = sorted(k for k in here.keys() & there.keys() if here[k] != there[k])
    if missing or extra or shapes:
        differences = [
            *(f"shape of {k}: {there[k]} there, {here[k]} here" for k in shapes[:2]),
            *([f"{len(missing)} keys missing there: {', '.join(missing[:3])}"] if missing else []),
            *([f"{len(extra)} keys unknown here: {', '.join(extra[:3])}"] if extra else []),
        ]
        raise UserError(
            "the checkpoint is of another model: " + "; ".join(differences),
            where=str(path),
            remedy="use the model and camera settings of its pretrained_model/config.json, or start a new run",
        )
    for name, moments in tensors.get("optimizer", {}).get("state", {}).items():
        for moment in moments:
            if saved.get(f"optimizer.state.{name}.{moment}") is None:
                raise UserError(
                    f"the checkpoint is of another optimizer: it has no {moment} of {name}",
                    where=str(path),
                    remedy="use the optimizer's settings of its pretrained_model/config.json, or start a new run",
                )
