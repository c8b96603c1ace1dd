"""Say what a LeRobot dataset is and whether it has a schema's columns, from its `meta/info.json` alone.

    python -m opentau_train.tools.check ROOT [--schema droid|droid_cosmos|any]

Exits 0, or 2 with what is wrong, where and the remedy on stderr. Reads no data and imports no torch: launchers run
it on every node before anything starts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opentau_train.data.lerobot.columns import CAMERA, NUMBER, Features, frame_size
from opentau_train.data.lerobot.info import Info, read_info
from opentau_train.errors import EXIT_OK, EXIT_USER, UserError, did_you_mean
from opentau_train.tools.words import NAME, in_own_words

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


def read(root: Path) -> Info:
    """The dataset's info.json, as the training reads it. Raises `UserError` where it couldn't."""
    try:
        return read_info(root, f"data.sources.{NAME}")
    except UserError as error:
        raise in_own_words(error, root) from error


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


def _count(columns: Sequence[str]) -> str:
    return f"column{'s' if len(columns) > 1 else ''} {', '.join(columns)}"


def describe(info: Info) -> str:
    """The dataset in a few lines: format, size, cameras, columns, robot, tasks, and whether its files are there."""
    features, tree = info.features, info.tree
    cameras = [f"{name} {_pixels(f)}" for name, f in features.items() if f.get("dtype") in CAMERA]
    folders = ["data"] + ["videos"] * any(f.get("dtype") == "video" for f in features.values())
    episodes, frames, tasks = (tree.get(f"total_{things}", "unknown") for things in ("episodes", "frames", "tasks"))
    lines = {
        "dataset": str(info.root),
        "format": tree["codebase_version"],
        "size": f"{episodes} episodes, {frames} frames, {tree['fps']} fps",
        "cameras": ", ".join(cameras) or "none",
        "state": _vectors(features, "observation.state"),
        "actions": _vectors(features, "action"),
        "robot": str(tree.get("robot_type") or "unknown"),
        "tasks": str(tasks),
        "files": ", ".join(f"{name}/{'' if (info.root / name).is_dir() else ' MISSING'}" for name in folders),
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m opentau_train.tools.check", description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="the dataset's directory")
    parser.add_argument("--schema", choices=list(SCHEMAS), default="any", help="the columns it must have")
    options = parser.parse_args(arguments)
    try:
        info = read(options.root)
        check_schema(info, options.schema)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USER
    print(describe(info))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
