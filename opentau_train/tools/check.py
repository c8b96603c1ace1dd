"""Say what a LeRobot dataset is and whether it has a schema's columns, from its `meta/info.json` alone.

    python -m opentau_train.tools.check ROOT [--schema droid|droid_cosmos|any]

Exits 0, or 2 with what is wrong, where and the remedy on stderr. Reads no data and imports no torch: launchers run
it on every node before anything starts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opentau_train.errors import EXIT_OK, EXIT_USER, UserError, did_you_mean

Info = dict[str, Any]

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

_CAMERA_TYPES = ("video", "image")
_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "codebase_version": str,
    "fps": (int, float),
    "total_episodes": int,
    "total_frames": int,
    "features": dict,
}


def read_info(root: Path) -> Info:
    """The dataset's `meta/info.json`, its keys present and of the right type; unknown ones are left alone.

    Raises `UserError` where `root` is not a LeRobot dataset (format v2.0 or later).
    """
    if not root.is_dir():
        kind = "is a file, not a dataset's directory" if root.exists() else "does not exist"
        raise UserError(
            f"dataset {root} {kind}", where=str(root), remedy="give the directory that holds meta/info.json"
        )
    path = root / "meta" / "info.json"
    if not path.is_file():
        raise UserError(
            f"{root} is not a LeRobot dataset: it has no meta/info.json",
            where=str(path),
            remedy="give the directory that holds meta/, data/ and videos/ (LeRobot format v2.0 or later)",
        )
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _broken(path, f"can't be read: {error}") from error
    if not isinstance(info, dict):
        raise _broken(path, "holds no mapping")
    for key, types in _REQUIRED.items():
        if not isinstance(info.get(key), types):
            raise _broken(path, f"key '{key}' is {'wrong' if key in info else 'missing'}")
    for name, feature in info["features"].items():
        if not isinstance(feature, dict) or not isinstance(feature.get("shape"), list) or "dtype" not in feature:
            raise _broken(path, f"features['{name}'] has no dtype or no shape")
    return info


def _broken(path: Path, what: str) -> UserError:
    return UserError(f"meta/info.json {what}", where=str(path), remedy="copy or download the dataset's meta/ again")


def check_schema(info: Info, schema: str, root: Path) -> None:
    """Raise `UserError` naming every column of `schema` that the dataset lacks or has as another kind of column."""
    features = info["features"]
    missing = [column for column in SCHEMAS[schema] if column not in features]
    if missing:
        others = [s for s, columns in SCHEMAS.items() if columns and set(columns) <= set(features)]
        if others:
            remedy = f"the dataset has the {others[0]} schema: train it with data={others[0]}"
        else:
            near = did_you_mean(missing[0], features)
            remedy = "name the dataset's own columns with +recipe=lerobot" + (f" ({missing[0]}{near})" if near else "")
        raise UserError(f"dataset lacks {_count(missing)} of the {schema} schema", where=str(root), remedy=remedy)
    for column in SCHEMAS[schema]:
        should, is_camera = ".image" in column, features[column]["dtype"] in _CAMERA_TYPES
        if should != is_camera:
            raise UserError(
                f"column {column} is {features[column]['dtype']}, not {'a camera' if should else 'a vector'}",
                where=str(root),
                remedy=f"the {schema} schema doesn't fit this dataset: name its columns with +recipe=lerobot",
            )


def _count(columns: Sequence[str]) -> str:
    return f"column{'s' if len(columns) > 1 else ''} {', '.join(columns)}"


def describe(info: Info, root: Path) -> str:
    """The dataset in a few lines: format, size, cameras, columns, robot, tasks, and whether its files are there."""
    features: dict[str, Info] = info["features"]
    cameras = [f"{name} {_pixels(f)}" for name, f in features.items() if f["dtype"] in _CAMERA_TYPES]
    folders = ["data"] + ["videos"] * any(f["dtype"] == "video" for f in features.values())
    lines = {
        "dataset": str(root),
        "format": info["codebase_version"],
        "size": f"{info['total_episodes']} episodes, {info['total_frames']} frames, {info['fps']} fps",
        "cameras": ", ".join(cameras) or "none",
        "state": _vectors(features, "observation.state"),
        "actions": _vectors(features, "action"),
        "robot": str(info.get("robot_type") or "unknown"),
        "tasks": str(info.get("total_tasks", "unknown")),
        "files": ", ".join(f"{name}/{'' if (root / name).is_dir() else ' MISSING'}" for name in folders),
    }
    return "\n".join(f"{name + ':':9}{text}" for name, text in lines.items())


def _pixels(feature: Info) -> str:
    """`WIDTHxHEIGHT`; the axes stand in `names` where the shape isn't [height, width, channels]."""
    shape, names = feature["shape"], feature.get("names")
    if len(shape) != 3:
        return str(shape)
    first_is_channels = isinstance(names, list) and names and str(names[0]).startswith("channel")
    height, width = shape[1:] if first_is_channels else shape[:2]
    return f"{width}x{height}"


def _vectors(features: dict[str, Info], prefix: str) -> str:
    """Columns `prefix` and `prefix.*` that hold numbers, each with its shape."""
    columns = [
        f"{name} {f['shape']}"
        for name, f in features.items()
        if (name == prefix or name.startswith(f"{prefix}.")) and f["dtype"] not in (*_CAMERA_TYPES, "string")
    ]
    return ", ".join(columns) or "none"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m opentau_train.tools.check", description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="the dataset's directory")
    parser.add_argument("--schema", choices=list(SCHEMAS), default="any", help="the columns it must have")
    options = parser.parse_args(arguments)
    try:
        info = read_info(options.root)
        check_schema(info, options.schema, options.root)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USER
    print(describe(info, options.root))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
