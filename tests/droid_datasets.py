"""Small datasets in the schemas of the DROID releases, and a keep-ranges file in the form that is published."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.lerobot_writer import Camera, Dataset, vector, write

RAW = "gs://xembodiment_data/r2d2/r2d2-data-full"
LENGTHS = (40, 30, 36, 24)
LANGUAGE = ("language_instruction", "language_instruction_2", "language_instruction_3")


def text(value: Any) -> tuple[dict[str, Any], Any]:
    """A column of texts: `value(episode)` in each row."""
    return {"dtype": "string", "shape": [1], "names": None}, lambda e, f: value(e)


def write_droid(root: Path, language: Sequence[str] = LANGUAGE, lengths: Sequence[int] = LENGTHS) -> Path:
    """Columns of lerobot/droid_1.0.1: those that the recipe reads, and those that a filter could be keyed by."""
    columns = {
        "observation.state.joint_position": vector(7),
        "observation.state.gripper_position": vector(1),
        "action.joint_position": vector(7, 0.5),
        "action.gripper_position": vector(1, 0.5),
        "action.joint_velocity": vector(7, 0.25),
        "action": vector(8),
        "is_episode_successful": ({"dtype": "bool", "shape": [1], "names": None}, lambda e, f: e != 1),
        "building": text(lambda e: "AUTOLab"),
        "collector_id": text(lambda e: f"collector {e % 2}"),
        "date": text(lambda e: f"2023-07-{e + 1:02}"),
    }
    columns |= {name: text(lambda e, name=name: f"{name} of {e}") for name in language}
    names = ("wrist_left", "exterior_1_left", "exterior_2_left")
    return write(root, Dataset(lengths, 15, cameras=_cameras("observation.images", names), columns=columns))


def episode_id(outcome: str, episode: int) -> str:
    return f"AUTOLab/{outcome}/2023-07-07/Fri_Jul__7_0{episode}:42:23_2023"


def write_cosmos(root: Path, outcome: str = "success", lengths: Sequence[int] = LENGTHS) -> Path:
    """The schema of nvidia/Cosmos3-DROID: `episode_id` in meta/episodes, no language columns."""
    columns = {
        "observation.state.joint_positions": vector(7),
        "observation.state.gripper_position": vector(1),
        "observation.state.cartesian_position": vector(6),
        "action.joint_position": vector(7, 0.5),
        "action.gripper_position": vector(1, 0.5),
        "action": vector(8),
    }
    names = ("wrist_image_left", "exterior_image_1_left", "exterior_image_2_left")
    ids = {"episode_id": [episode_id(outcome, e) for e in range(len(lengths))]}
    cameras = _cameras("observation.image", names)
    return write(root, Dataset(lengths, 15, cameras=cameras, columns=columns, episode_columns=ids))


def _cameras(prefix: str, names: Sequence[str]) -> dict[str, Camera]:
    return {f"{prefix}.{name}": Camera(size=(32, 48)) for name in names}


def published_filter(path: Path, ranges: Sequence[Sequence[Sequence[int]]], outcome: str = "success") -> Path:
    """A file in the form of keep_ranges_1_0_1.json: episode e has `ranges[e]`; one key is no episode's."""
    bases = [f"{RAW}/{episode_id(outcome, e)}" for e in range(len(ranges))]
    keys = [f"{base}/recordings/MP4--{base}/trajectory.h5" for base in bases]
    tree = {**dict(zip(keys, ranges, strict=True)), f"{RAW}/elsewhere--{RAW}/elsewhere": [[0, 9]]}
    path.write_text(json.dumps(tree))
    return path
