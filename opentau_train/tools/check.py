"""Say what a LeRobot dataset is, and whether a training would start and fit, without starting it.

    python -m opentau_train.tools.check ROOT [--schema droid|droid_cosmos|any] [--episodes 20] [KEY=VALUE ...]
    python -m opentau_train.tools.check +recipe=droid_policy data.sources.droid.root=ROOT [--ranks 16] [--json]

The first form is about one dataset, as `+recipe=lerobot data.sources.main.root=ROOT` reads it. The second takes the
arguments of `python -m opentau_train` and looks at all that a job needs, on a login node: settings, data, rows against
conventions, room for checkpoints, a rank's memory, time, and the variables by which processes meet; one line each with
ok, warning or error. The first mistake is told on stderr too, with where and the remedy, as that training would.
Of the rows and videos it reads the times of three episodes, to propose a `tolerance_s` where they differ; and the rows
of `--episodes` (0: of none) and a few pictures, to hold them against what the source's `convention` declares.

Exit codes: 0, with warnings too; 2 where a training would end with 2; 1 for what the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opentau_train import cli
from opentau_train.config.bounds import at_least
from opentau_train.config.data import SourceSettings
from opentau_train.config.pointers import POINTERS, pointer
from opentau_train.config.weights import VLM, weight_settings
from opentau_train.data.lerobot.columns import CAMERA, NUMBER, Features, frame_size
from opentau_train.data.lerobot.info import Info, read_info
from opentau_train.errors import EXIT_OK, UserError, did_you_mean
from opentau_train.log import log_to
from opentau_train.tools.options import Parser

if TYPE_CHECKING:  # imports torch, which a mistake in the arguments needn't wait for
    from opentau_train.config.settings import Settings
    from opentau_train.data.mixture.mixture import Mixture

_DROID_ACTIONS = ("action.joint_position", "action.gripper_position")

SCHEMAS: dict[str, tuple[str, ...]] = {
    "droid": (
        "observation.images.wrist_left",
        "observation.images.exterior_1_left",
        "observation.images.exterior_2_left",
        "observation.state.joint_position",
        "observation.state.gripper_position",
        *_DROID_ACTIONS,
    ),
    "droid_cosmos": (
        "observation.image.wrist_image_left",
        "observation.image.exterior_image_1_left",
        "observation.image.exterior_image_2_left",
        "observation.state.joint_positions",
        "observation.state.gripper_position",
        *_DROID_ACTIONS,
    ),
    "any": (),
}
"""The columns that a schema needs; a dataset may have more."""


def check_schema(info: Info, schema: str) -> None:
    """Raise `UserError` naming every column of `schema` that the dataset lacks or has as another kind of column."""
    features, root = info.features, str(info.root)
    missing = [column for column in SCHEMAS[schema] if column not in features]
    if missing:
        others = [s for s, columns in SCHEMAS.items() if columns and set(columns) <= set(features)]
        if others:
            remedy = f"the dataset has the {others[0]} schema: train it with data={others[0]}"
        else:
            near = did_you_mean(missing[0], features)
            remedy = "name the dataset's own columns with +recipe=lerobot" + (f" ({missing[0]}{near})" if near else "")
        raise UserError(f"dataset lacks {_count(missing)} of the {schema} schema", where=root, remedy=remedy)
    for column in SCHEMAS[schema]:
        should, is_camera = ".image" in column, features[column].get("dtype") in CAMERA
        if should != is_camera:
            raise UserError(
                f"column {column} is {features[column].get('dtype')}, not {'a camera' if should else 'a vector'}",
                where=root,
                remedy=f"the {schema} schema doesn't fit this dataset: name its columns with +recipe=lerobot",
            )


def _check_named(info: Info, options: Mapping[str, Any]) -> None:
    """Raise `UserError` where the source names the columns of one schema and the dataset has those of another."""
    named: list[str] = []
    for key in ("cameras", "state", "actions"):
        chosen = options.get(key) or ()
        named += chosen.values() if isinstance(chosen, Mapping) else chosen
    missing = [column for column in named if column not in info.features]
    of_a_schema = any(set(missing) <= set(columns) for columns in SCHEMAS.values())
    fits = next((s for s, columns in SCHEMAS.items() if columns and set(columns) <= set(info.features)), None)
    if missing and of_a_schema and fits:
        raise UserError(
            f"the dataset lacks {_count(missing)}, which {info.where} names",
            where=str(info.root),
            remedy=f"it has the {fits} schema: train it with data={fits}",
        )


def _note_environment() -> None:
    """Say which variables are set that a neighbouring program's launcher reads, and this program doesn't."""
    for name in POINTERS:
        if name.isupper() and os.environ.get(name) and name != VLM:
            sys.stderr.write(f"note: the environment variable {name} is not read: {pointer(name)}\n")


def _count(columns: Sequence[str]) -> str:
    return f"column{'s' if len(columns) > 1 else ''} {', '.join(columns)}"


def size_of(info: Info) -> str:
    """Episodes, frames and rate of the dataset, as it says itself."""
    episodes, frames = (info.tree.get(f"total_{things}", "unknown") for things in ("episodes", "frames"))
    return f"{episodes} episodes, {frames} frames, {info.tree['fps']} fps"


def describe(info: Info) -> str:
    """The dataset in a few lines: format, size, cameras, columns, robot and tasks."""
    features, tree = info.features, info.tree
    cameras = [f"{name} {_pixels(f)}" for name, f in features.items() if f.get("dtype") in CAMERA]
    lines = {
        "dataset": str(info.root),
        "format": info.version,
        "size": size_of(info),
        "cameras": ", ".join(cameras) or "none",
        "state": _vectors(features, "observation.state"),
        "actions": _vectors(features, "action"),
        "robot": str(tree.get("robot_type") or "unknown"),
        "tasks": str(tree.get("total_tasks", "unknown")),
    }
    return "\n".join(f"{name + ':':9}{text}" for name, text in lines.items())


def _pixels(feature: Mapping[str, Any]) -> str:
    """`WIDTHxHEIGHT`, or the shape where it isn't a picture's."""
    height, width = frame_size(feature)
    return f"{width}x{height}" if height else str(feature.get("shape"))


def _vectors(features: Features, prefix: str) -> str:
    """Columns `prefix` and `prefix.*` that hold numbers, each with its shape."""
    columns = [
        f"{name} {f.get('shape')}"
        for name, f in features.items()
        if (name == prefix or name.startswith(f"{prefix}.")) and f.get("dtype") in NUMBER
    ]
    return ", ".join(columns) or "none"


def check_weights(settings: Settings) -> list[str]:
    """The files of first weights that the settings name, and that are here. Raises the errors that a training would."""
    from opentau_train.checkpoints.weight_files import local_path, open_weights  # these import torch

    there = []
    for key, given in weight_settings(settings.model).paths.items() if settings.resume.checkpoint == "never" else ():
        if path := local_path(given, f"model.{key}"):  # else it will be downloaded
            open_weights(path, f"model.{key}")
            there.append(str(path))
    return there


def open_data(settings: Settings, schema: str) -> tuple[Mixture, list[Info]]:
    """(The mixture, what each LeRobot dataset says of itself) as far as metadata go. Raises the errors that a training
    would."""
    from opentau_train.data.mixture.heads import check_heads  # these import torch
    from opentau_train.data.mixture.open import open_plan
    from opentau_train.data.mixture.resolve import resolve_sources

    sources = resolve_sources(settings)
    own = [(f"data.sources.{name}", s) for name, s in sources.items() if s.target == SourceSettings.target]
    infos = []
    for where, source in own:
        if source.root:
            infos.append(read_info(Path(source.root), where))
            check_schema(infos[-1], schema)
            _check_named(infos[-1], source.options)
    plan = open_plan(settings, sources)
    check_heads(plan.datasets, plan.groups)
    return plan, infos


def describe_mixture(plan: Mixture) -> dict[str, list[str]]:
    """{dataset: what of it is trained on, in a line; what to set where its times need it}."""
    from opentau_train.data.lerobot.source import LeRobotDataset
    from opentau_train.data.lerobot.tolerance import proposed_tolerance  # these import torch

    described = {}
    for dataset in plan.datasets:
        cameras = ", ".join(dataset.source.cameras) or "none"
        num_trained = len(np.unique(dataset.train.episode))
        lines = described[dataset.name] = [
            f"{dataset.name}: {dataset.train.num_windows} windows of {num_trained} episodes to train on, "
            f"{dataset.held_out.sum()} episodes held out; {len(dataset.state_names)} dimensions of state, "
            f"{len(dataset.action_names)} of actions; cameras {cameras}"
        ]
        tolerance = proposed_tolerance(dataset.source.reading) if isinstance(dataset.source, LeRobotDataset) else None
        if tolerance is not None:
            lines.append(
                f"{dataset.name}: the rows' times miss the video's frames by more than tolerance_s; where the nearest "
                f"frames are the right ones, set data.sources.{dataset.name}.tolerance_s={tolerance}"
            )
    return described


def check(tree: dict[str, Any], schema: str, num_episodes: int) -> tuple[str, UserError | None]:
    """Open what the composed configuration `tree` trains on, as far as metadata go: (its description, what the rows of
    `num_episodes` contradict of it, if anything). Raises the errors that a training would."""
    from opentau_train.data.lint.report import contradiction, lint, report

    settings = cli.checked(tree)
    check_weights(settings)
    plan, infos = open_data(settings, schema)
    lines = [f"{describe(info)}\n" for info in infos]
    lines += [line for of_dataset in describe_mixture(plan).values() for line in of_dataset]
    judged = lint(plan.datasets, plan.groups, num_episodes) if num_episodes else {}
    for name, of_source in judged.items():
        lines += report(name, of_source)
    return "\n".join(lines), contradiction(judged)


def preflight(composed: Sequence[str], options: argparse.Namespace) -> int:
    """Print a line for each thing that a training with the arguments `composed` needs; the exit code. Raises the first
    mistake once all lines are printed."""
    from opentau_train.tools.preflight.all import look_at  # these import torch
    from opentau_train.tools.preflight.lines import table

    lines, details = look_at(composed, options)
    if options.json:
        wrong = [line for line in lines if line.status == "error"]
        print(json.dumps({"ok": not wrong, "checks": [vars(line) for line in lines]}, indent=1))
    else:
        print("\n".join([table(lines), *details]))
    for line in lines:
        if line.status == "error":
            raise UserError(line.text, where=line.where, remedy=line.remedy)
    return EXIT_OK


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    parser = Parser("check", __doc__)
    parser.add_argument("--schema", choices=list(SCHEMAS), default="any", help="the columns it must have")
    parser.add_argument("--episodes", type=int, default=20, metavar="N", help="how many to look at; 0: none")
    parser.add_argument("--ranks", type=int, help="processes that will train; else as NNODES and NPROC_PER_NODE say")
    parser.add_argument("--device-memory", type=float, metavar="GIB", help="of a device that a rank trains on")
    parser.add_argument("--rate", type=float, help="steps a second; else those of an earlier run")
    parser.add_argument("--walltime", help="what the job has, D-HH:MM:SS; else what is left of this job of SLURM's")
    parser.add_argument("--json", action="store_true", help="print all lines as one JSON object")
    parser.add_argument("root", nargs="?", metavar="ROOT", help="the dataset's directory, or the first override")
    options, composed = parser.parse_known_args(arguments)
    root = options.root or ""
    is_override = "=" in root and "://" not in root.partition("=")[0]
    if is_override and not Path(root).exists():
        root, composed = "", [root, *composed]

    def work() -> int:
        if not root and not composed:
            raise UserError("nothing to check", remedy="give ROOT, or the arguments of a training")
        at_least("--episodes", options.episodes, 0)
        if not root:
            return preflight(composed, options)
        tree = cli.compose(["+recipe=lerobot", *composed])
        tree["data"]["sources"]["main"]["root"] = root
        text, wrong = check(tree, options.schema, options.episodes)
        print(text)
        if wrong is not None:
            raise wrong
        return EXIT_OK

    with log_to(sys.stderr, is_main=True):
        _note_environment()
        return cli.answer(work)


if __name__ == "__main__":
    sys.exit(main())
