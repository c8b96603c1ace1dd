"""One checkpoint, validated by itself: the passes of training on any number of ranks and any fitting mixture."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from opentau_train import checkpoint
from opentau_train.config import Settings
from opentau_train.data.assemble import open_mixture
from opentau_train.data.mixture import Dataset, Mixture
from opentau_train.data.normalize import HeadStats
from opentau_train.data.split import trained_on
from opentau_train.distributed import World, launch
from opentau_train.errors import UserError, did_you_mean
from opentau_train.models.policy import Policy
from opentau_train.optim import Ema
from opentau_train.parallel import Replicas, data_parallel_degrees, spread
from opentau_train.passes import plan_passes, run_passes
from opentau_train.plots import save_png
from opentau_train.preflight import identity
from opentau_train.pretrained import Pretrained
from opentau_train.report import log_to
from opentau_train.sinks.console import read_scores, table
from opentau_train.typed import instantiate
from opentau_train.types import BatchSpec

log = logging.getLogger(__name__)


def validate_checkpoint(settings: Settings, tree: dict[str, Any], found: Path, card: Pretrained, out: Path) -> None:
    """Validate the checkpoint `found` as `settings` say and write the result to `out`. Runs on every rank of a launch.

    `tree` is the same configuration as plain data; `card`, what the checkpoint's `pretrained_model/` says. Raises
    `UserError` on all ranks alike.
    """
    trainer = settings.trainer
    torch.use_deterministic_algorithms(trainer.deterministic)
    with (
        launch(
            device=trainer.device,
            precision=trainer.precision,
            timeout=trainer.step_timeout,
            identity=identity(tree),
        ) as world,
        log_to(sys.stderr, world.is_main),
        world.roll_call(),
    ):
        stats = {head: HeadStats.from_json(tree) for head, tree in card.stats.items()}
        mixture = fit(open_mixture(settings, world, stats), card.policy)
        policy, replicas, ema, step = spread_policy(settings, mixture.spec, found, world)
        share = max(1, trainer.global_batch_size // world.size)
        size = min(settings.data.max_samples_per_batch or share, share)
        plans = plan_passes(mixture, settings.validation, batch_size=size, num_ranks=world.size)
        if not len(plans.loss.windows):
            raise UserError(
                "the mixture holds nothing out",
                where="data.sources",
                remedy="set val_split_ratio of a source, 1.0: all",
            )
        seen = trained_on(card.policy["held_out"], mixture)
        if world.is_main:
            for name, episodes in seen.items():
                log.warning("dataset %s: the checkpoint was trained on validation episodes %s", name, episodes)
        outcome = run_passes(policy, replicas, ema, plans, world, settings.validation)
        if world.is_main:
            result = {
                "checkpoint": str(found),
                "step": step,
                "ranks": world.size,
                "batch_size": plans.loss.batch_size,
                "windows": len(plans.loss.windows),
                "trained_on": seen,
                "left_out": [vars(bad) for bad in outcome.scores.left_out],
                "metrics": outcome.row,
            }
            write(out, result, outcome.picture)
            log.info("%s\nwritten to %s", table(read_scores(outcome.row), {}), out)


def fit(mixture: Mixture, policy: dict[str, Any]) -> Mixture:
    """The mixture with batches of the checkpoint's shape: narrower vectors padded, absent cameras masked.

    Raises `UserError` naming the difference where `policy` (`policy.json`) is of another convention.
    """
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in policy["spec"].items()}
    saved = BatchSpec(**fields)
    spec = mixture.spec
    if policy["normalization"] != mixture.settings.normalization:
        raise _refuse(
            f"normalises by {policy['normalization']}, this validation by {mixture.settings.normalization}",
            "data.normalization",
        )
    for camera in spec.cameras:
        if camera not in saved.cameras:
            near = did_you_mean(camera, saved.cameras)
            raise _refuse(
                f"knows the cameras {', '.join(saved.cameras) or 'none'}, not '{camera}'{near}", "data.sources"
            )
    for name in ("image_size", "history"):
        if getattr(saved, name) != getattr(spec, name):
            raise _refuse(f"has {name} {getattr(saved, name)}, the data {getattr(spec, name)}", f"data.{name}")
    for name in ("state_dim", "action_dim", "chunk_length"):
        if getattr(saved, name) < getattr(spec, name):
            raise _refuse(f"has {name} {getattr(saved, name)}, the data {getattr(spec, name)}", f"data.{name}")
    for dataset in mixture.datasets:
        for head in sorted({mixture.groups[g].norm_head for g in set(dataset.group_of.tolist())}):
            _check_actions(dataset, head, policy)
    return dataclasses.replace(mixture, spec=saved)


def _check_actions(dataset: Dataset, head: str, policy: dict[str, Any]) -> None:
    """The dataset's action dimensions are those that the head was trained with, name by name."""
    mine = list(dataset.source.action_names)
    known = [policy["norm_heads"][head], policy["action_names"].get(dataset.name)]
    if mine in known:
        return
    theirs = known[0]
    if len(mine) != len(theirs):
        raise _refuse(f"has {len(theirs)} action dimensions for {head}, the data {len(mine)}", dataset.name)
    place = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
    raise _refuse(
        f"has '{theirs[place]}' as action dimension {place} of {head}, the data '{mine[place]}'",
        f"data.sources.{dataset.name}.actions",
    )


def _refuse(difference: str, where: str) -> UserError:
    return UserError(
        f"the checkpoint is of another convention: it {difference}",
        where=where,
        remedy="validate on data of the checkpoint's convention, or set robot_type and control_mode to tell them apart",
    )


def spread_policy(
    settings: Settings, spec: BatchSpec, found: Path, world: World
) -> tuple[Policy, Replicas, Ema | None, int]:
    """(policy, replicas, average or None, step) of the checkpoint `found`, spread over the ranks. Collective; raises
    `UserError` on all ranks alike."""
    trainer, parallelism = settings.trainer, settings.parallelism
    degrees = data_parallel_degrees(
        parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree, world.size
    )
    policy: Policy = world.agree(lambda: instantiate(settings.model, "model", spec=spec))
    replicas = spread(policy, policy.blocks(), world, *degrees, trainer.precision)
    ema = Ema(policy, trainer.ema_decay) if trainer.ema_decay is not None else None
    tensors: dict[str, Any] = {"model": get_model_state_dict(policy)}
    if ema is not None:
        tensors["ema"] = ema.state_dict()
    checkpoint.read_tensors(found, tensors, world)
    set_model_state_dict(policy, tensors["model"])
    if ema is not None:
        ema.load_state_dict(tensors["ema"])
    return policy, replicas, ema, json.loads((found / "run.json").read_text())["step"]


def write(out: Path, result: dict[str, Any], picture: NDArray[np.uint8] | None) -> None:
    """`result` as JSON to `out`, the picture beside it as PNG. NaN and infinities are written as null."""

    result["metrics"] = {k: v if abs(v) < float("inf") else None for k, v in result["metrics"].items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    if picture is not None:
        save_png(out.with_suffix(".png"), picture)
