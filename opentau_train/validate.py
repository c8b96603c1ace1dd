"""Validate a checkpoint by itself, on any number of processes and any mixture:

    python -m opentau_train.validate checkpoint=RUN [out=FILE] [base=PATH] [trust=[MODULE]] [data=NAME] [KEY=VALUE ...]
    torchrun --nproc-per-node 4 -m opentau_train.validate checkpoint=RUN/checkpoints/00001000

The checkpoint's own configuration says what is validated; `data=NAME` takes other sources, `KEY=VALUE` changes a
setting, for instance `validation.evaluators=[loss,action]`. The same passes as in training run; they write
`validation.json` in the checkpoint's directory, or to `out`, and pictures beside it. `base`: where frozen weights that
the checkpoint leaves out lie now, if they have been moved; `trust`: modules that the checkpoint's configuration may
name classes of, besides this package and installed plugins.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

from opentau_train import cli, composing, strangers
from opentau_train.checkpoints import assets, commit, contents, manifest
from opentau_train.checkpoints.card import FOLDER, Pretrained, read_card, read_stats
from opentau_train.checkpoints.pretrained import first_of, with_base
from opentau_train.checkpoints.start import Start, spread_policy
from opentau_train.checkpoints.weights import FirstWeights
from opentau_train.config.settings import Settings, current, load_settings
from opentau_train.config.trust import check_targets, targets
from opentau_train.config.typed import convert
from opentau_train.data.conventions.sources import recorded_difference
from opentau_train.data.mixture.mixture import Dataset, Mixture
from opentau_train.data.mixture.split import trained_on
from opentau_train.distributed.numerics import set_numerics
from opentau_train.distributed.opening import normalise_together, open_together
from opentau_train.distributed.parallel import Execution, Replicas
from opentau_train.distributed.preflight import identity
from opentau_train.distributed.watchdog import Progress
from opentau_train.distributed.world import World, launch
from opentau_train.errors import EXIT_OK, UserError, did_you_mean
from opentau_train.job import mesh_of
from opentau_train.log import log_to
from opentau_train.models.average import Ema
from opentau_train.models.policy import Policy, bind_model, check_modes
from opentau_train.sinks.table import headline, table
from opentau_train.types import BatchSpec
from opentau_train.validation.evaluator import Picture
from opentau_train.validation.passes import Validation, open_evaluators
from opentau_train.validation.plots import save_png

log = logging.getLogger("opentau_train.validate")  # __name__ is `__main__` where this is the command

OWN = ("checkpoint=", "out=", "base=", "trust=")
"""What the command line says besides the run's keys."""

FIXED = ("model", "finetune", "optimizer", "scheduler", "resume", "logger")
"""Keys that the command line can't change: the checkpoint alone decides them, or no validation uses them."""


def main() -> None:
    """Parse the command line, validate, and end the process with the exit codes of `errors`."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit(EXIT_OK)
    cli.end(cli.answer(lambda: run(sys.argv[1:])))


def run(arguments: Sequence[str]) -> int:
    """Validate as the command line's `arguments` say. Raises `UserError` for mistakes, on all ranks alike."""
    given = dict(a.split("=", 1) for a in arguments if a.startswith(OWN))
    others = [a for a in arguments if not a.startswith(OWN)]
    if "checkpoint" not in given:
        raise UserError("no checkpoint is given", remedy="add checkpoint=RUN or checkpoint=RUN/checkpoints/STEP")
    try:
        checkpoint = commit.resolve(given["checkpoint"], None)
        assert checkpoint is not None
    except UserError as error:
        remedy = "give a run directory or one of its checkpoints: checkpoint=RUN/checkpoints/STEP"
        raise UserError(error.what, where=f"checkpoint={given['checkpoint']}", remedy=remedy) from error
    trust = convert(tuple[str, ...], yaml.safe_load(given.get("trust", "[]")), "trust")
    card = with_base(read_card(checkpoint / FOLDER), given.get("base"))
    tree = recompose(card, others, trust)
    out = Path(given["out"]).expanduser() if "out" in given else checkpoint / "validation.json"
    validate_checkpoint(load_settings(tree), tree, checkpoint, card, out)
    return EXIT_OK


def recompose(card: Pretrained, arguments: Sequence[str], trust: Sequence[str]) -> dict[str, Any]:
    """The checkpoint's configuration with the command line's `arguments` over it. Raises `UserError`, also where what a
    validation builds of it names code that nobody has vouched for."""
    where = f"{FOLDER}/config.json"
    with strangers.understood("the checkpoint's configuration", where):
        if "${" in json.dumps(card.config):  # the command line's are resolved; a file's could tell what the machine has
            raise ValueError("it holds an interpolation, ${...}")
        config = assets.unpack(card.config, card.policy.get(assets.KEY, {}))
        tree = composing.recompose(current(config), arguments, FIXED)
        validation = tree.get("validation", {})
        evaluators = {n: validation.get("evaluator", {}).get(n) for n in validation.get("evaluators", ())}
        built = {"data": tree["data"], "model": tree["model"], "validation": evaluators}
    check_targets(built, where, trust, {target for _, target in targets(card.config)}, configured=True)
    return tree


def validate_checkpoint(
    settings: Settings, tree: dict[str, Any], checkpoint: Path, card: Pretrained, out: Path
) -> None:
    """Validate `checkpoint` as `settings` say and write the result to `out`. Runs on every rank of a launch.

    `tree` is the same configuration as plain data; `card`, what the checkpoint's `pretrained_model/` says. Raises
    `UserError` on all ranks alike.
    """
    trainer, evaluators = settings.trainer, open_evaluators(settings.validation)
    check_modes(bind_model(settings.model)[0], settings.data)
    set_numerics(deterministic=trainer.deterministic, matmul_precision=trainer.matmul_precision)
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
        world.agree(lambda: manifest.check(checkpoint, part=world.rank, parts=world.size))
        stats = read_stats(checkpoint / FOLDER)
        first = world.once_a_node(lambda: first_of(card))
        opened = normalise_together(open_together(settings, world), settings, world, Progress(), stats)
        with strangers.understood("the checkpoint's convention", checkpoint / FOLDER):
            mixture = fit(opened, card.policy)
            overlap = trained_on(card.policy["held_out"], mixture)
        policy, replicas, ema, step = restore_policy(settings, mixture.spec, checkpoint, world, first)
        mixture = world.agree(lambda: mixture.for_policy(policy.wants()))
        share = max(1, trainer.global_batch_size // world.data_size)
        size = min(settings.data.max_samples_per_batch or share, share)
        validation = Validation(mixture, settings.validation, evaluators, world, size)
        if not validation.has_work:
            raise UserError(
                "the mixture holds nothing out",
                where="data.sources",
                remedy="set val_split_ratio of a source, 1.0: all",
            )
        if world.is_main:
            for name, episodes in overlap.items():
                log.warning("dataset %s: the checkpoint was trained on validation episodes %s", name, episodes)
        with closing(validation):
            measured = validation.run(policy, replicas, ema)
        if world.is_main:
            result = {
                "checkpoint": str(checkpoint),
                "step": step,
                "ranks": world.size,
                "batch_size": validation.batch_size,
                "windows": validation.num_windows,
                "trained_on": overlap,
                "left_out": [vars(bad) for bad in measured.left_out],
                "metrics": measured.row,
            }
            write(out, result, measured.pictures)
            for file in measured.files:
                out.with_name(f"{out.stem}_{file.file}{file.suffix}").write_bytes(file.content)
            log.info("%s\n%s\nwritten to %s", headline(measured.row), table(measured.row), out)


def fit(mixture: Mixture, policy: dict[str, Any]) -> Mixture:
    """The mixture with batches of the checkpoint's shape: narrower vectors padded, absent cameras masked.

    Raises `UserError` naming the difference where `policy` (`policy.json`) is of another convention.
    """
    saved = BatchSpec.from_json(policy["spec"])
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
    keys = {"image_size": "image_size", "history": "history", "future": "future.num_frames"}
    for name, key in (keys | {"future_stride": "future.stride"}).items():
        if getattr(saved, name) != getattr(spec, name):
            raise _refuse(f"has {key} {getattr(saved, name)}, the data {getattr(spec, name)}", f"data.{key}")
    for name in ("state_dim", "action_dim", "chunk_length"):
        if getattr(saved, name) < getattr(spec, name):
            raise _refuse(f"has {name} {getattr(saved, name)}, the data {getattr(spec, name)}", f"data.{name}")
    for dataset in mixture.datasets:
        for head in sorted({mixture.groups[g].norm_head for g in set(dataset.group_of.tolist())}):
            _check_actions(dataset, head, policy)
            trained = next((name for name, heads in policy["datasets"].items() if head in heads), None)
            differs = recorded_difference(dataset.conversions, policy.get("conventions", {}).get(trained))
            if differs is not None:
                raise _refuse(differs, f"data.sources.{dataset.name}.convention")
    return mixture.in_shape(saved)


def _check_actions(dataset: Dataset, head: str, policy: dict[str, Any]) -> None:
    """The dataset's action dimensions are those that the head was trained with, name by name."""
    own_names = list(dataset.action_names)
    accepted = [policy["norm_heads"][head], policy["action_names"].get(dataset.name)]
    if own_names in accepted:
        return
    trained_names = accepted[0]
    if len(own_names) != len(trained_names):
        raise _refuse(f"has {len(trained_names)} action dimensions for {head}, the data {len(own_names)}", dataset.name)
    axis = next(i for i, (a, b) in enumerate(zip(own_names, trained_names, strict=True)) if a != b)
    raise _refuse(
        f"has '{trained_names[axis]}' as action dimension {axis} of {head}, the data '{own_names[axis]}'",
        f"data.sources.{dataset.name}.actions",
    )


def _refuse(difference: str, where: str) -> UserError:
    return UserError(
        f"the checkpoint is of another convention: it {difference}",
        where=where,
        remedy="validate on data of the checkpoint's convention, or set robot_type and control_mode to tell them apart",
    )


def restore_policy(
    settings: Settings, spec: BatchSpec, checkpoint: Path, world: World, first: FirstWeights | None = None
) -> tuple[Policy, Replicas, Ema | None, int]:
    """(policy, replicas, average or None, step) of `checkpoint`, spread over the ranks; `first`: the weights that it
    leaves out. Collective; raises `UserError` on all ranks alike."""
    trainer = settings.trainer
    mesh = mesh_of(settings, world)
    start = Start(first, settings.finetune)
    policy, replicas = spread_policy(settings.model, spec, world, mesh, Execution(trainer.precision), start)
    ema = Ema.of(policy, trainer)
    tensors: dict[str, Any] = {"model": contents.model_tensors(policy)}
    if ema is not None:
        tensors["ema"] = ema.state_dict()
    contents.read_tensors(checkpoint, tensors, world)
    contents.set_model_tensors(policy, tensors["model"])
    if ema is not None:
        ema.load_state_dict(tensors["ema"])
    return policy, replicas, ema, contents.read_run(checkpoint)["step"]


def write(out: Path, result: dict[str, Any], pictures: Sequence[Picture]) -> None:
    """`result` as JSON to `out`, pictures beside it as PNG, `{out}_{file}.png`. NaN and infinities are written as
    null."""
    result["metrics"] = {k: v if abs(v) < float("inf") else None for k, v in result["metrics"].items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    for picture in pictures:
        save_png(out.with_name(f"{out.stem}_{picture.file}.png"), picture.pixels)


if __name__ == "__main__":
    main()
