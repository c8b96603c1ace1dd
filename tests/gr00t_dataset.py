"""A dataset in the shape that GR00T's demonstrations have: LeRobot v2.0, a camera in info.json of which no file exists,
the instruction as an integer that points into meta/tasks, and meta/modality.json, which names slices of state and
action."""

from __future__ import annotations

import json
from pathlib import Path

from tests.lerobot_writer import Camera, Dataset, vector, write

EGO, ABSENT = "observation.images.ego_view", "observation.images.egoview"
DESCRIPTION = "annotation.human.action.task_description"
MODALITY = {
    "state": {
        "left_arm": {"start": 0, "end": 3},
        "left_hand": {"start": 3, "end": 5},
        "last_command": {"original_key": "action", "start": 1, "end": 3},
    },
    "action": {"left_arm": {"start": 0, "end": 3}, "left_hand": {"start": 3, "end": 5}},
    "video": {"ego_view": {"original_key": EGO}},
    "annotation": {"human.action.task_description": {}},
}
LENGTHS = (9, 7, 12, 8, 10)


def number(value) -> tuple[dict, object]:
    """A column of integers without `names`, as GR00T writes them."""
    return {"dtype": "int64", "shape": [1]}, lambda e, f: value(e)


def write_gr00t(root: Path) -> Path:
    motors = [f"motor_{i}" for i in range(5)]
    columns = {
        "observation.state": vector(5, dtype="float64", names=motors),
        "action": vector(5, 0.5, dtype="float64", names=motors),
        DESCRIPTION: number(lambda e: 1 - e % 2),  # not the row's own task
        "annotation.human.validity": number(lambda e: 1),
    }
    cameras = {EGO: Camera(size=(32, 48))}
    write(root, Dataset(LENGTHS, 20, "v2.1", cameras, columns=columns))
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    info["codebase_version"] = "v2.0"
    info["features"] = {ABSENT: {**info["features"][EGO], "shape": [800, 1280, 3]}, **info["features"]}
    del info["features"]["frame_index"]
    path.write_text(json.dumps(info))
    (root / "meta/modality.json").write_text(json.dumps(MODALITY))
    return root
