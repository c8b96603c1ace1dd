"""Measure what the conversion of a sample's convention takes, one process on one core.

    python benchmarks/conversions.py [--chunk 16] [--repeats 2000]

Each case is the least of `repeats` calls on a window's actions [chunk, A] and state [S]: all that a conversion adds to
a sample in a loader's worker, and what its inverse takes on a robot.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from opentau_train.config import typed
from opentau_train.data.convention import Convention
from opentau_train.data.conventions.steps import conversions
from opentau_train.data.mixture.table import align
from opentau_train.data.transforms.base import SampleDraws
from opentau_train.data.transforms.pipeline import Pipeline

JOINTS = {"kind": "joint", "dims": 7, "unit": "rad", "reference": "absolute"}
GRIPPER = {"kind": "gripper", "polarity": "closed", "range": [0, 1], "reference": "absolute"}
HAND = {"kind": "position", "unit": "m", "reference": "absolute"}
TURN = {"kind": "rotation", "rotation": "euler_xyz", "unit": "rad", "reference": "absolute"}
START = {"reference": "delta_start"}

CASES: dict[str, tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]] = {
    "nothing wanted": ([JOINTS, GRIPPER], {}),
    "joints to deltas": ([JOINTS, GRIPPER], {"actions": [{"kind": "joint", **START}, {"kind": "gripper"}]}),
    "joints to deltas, gripper turned round": (
        [JOINTS, GRIPPER],
        {"actions": [{"kind": "joint", **START}, {"kind": "gripper", "polarity": "open"}]},
    ),
    "euler to rot6d": (
        [HAND, TURN, GRIPPER],
        {"actions": [{"kind": "position"}, {"kind": "rotation", "rotation": "rot6d"}, {"kind": "gripper"}]},
    ),
    "euler to quaternions": (
        [HAND, TURN, GRIPPER],
        {"actions": [{"kind": "position"}, {"kind": "rotation", "rotation": "quat_xyzw"}, {"kind": "gripper"}]},
    ),
    "poses to deltas in rot6d, base": (
        [HAND, TURN, GRIPPER],
        {
            "actions": [
                {"kind": "position", **START},
                {"kind": "rotation", "rotation": "rot6d", **START},
                {"kind": "gripper"},
            ]
        },
    ),
    "poses to deltas in rot6d, tool, state too": (
        [HAND, TURN, GRIPPER],
        {
            "actions": [
                {"kind": "position", "frame": "tool", **START},
                {"kind": "rotation", "rotation": "rot6d", "frame": "tool", **START},
                {"kind": "gripper"},
            ],
            "state": [{"kind": "position"}, {"kind": "rotation", "rotation": "rot6d"}, {"kind": "gripper"}],
        },
    ),
}


def least(call: Any, repeats: int) -> float:
    """Microseconds of the fastest of `repeats` calls."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2000)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    rows: list[tuple[str, ...]] = [("conversion", "us a sample", "us back")]
    for name, (parts, wanted) in CASES.items():
        state_parts = [{key: value for key, value in part.items() if key != "reference"} for part in parts]
        declared = typed.build(Convention, {"actions": parts, "state": state_parts}, "")
        num = 8 if parts[0] is JOINTS else 7
        names = tuple(f"s{i}" for i in range(num)), tuple(f"a{i}" for i in range(num))
        made = conversions(declared, typed.build(Convention, wanted, ""), *names, "main").transforms
        state = rng.uniform(-1, 1, num).astype(np.float32)
        actions = rng.uniform(-1, 1, (options.chunk, num)).astype(np.float32)
        draws, pipeline = SampleDraws(0, "x"), Pipeline(made)

        def forth(made=made, state=state, actions=actions, draws=draws) -> dict[str, Any]:
            record = {"state": state, "actions": actions}
            for transform in made.values():
                record = transform(record, draws)
            return record

        sample = forth()

        def back(pipeline=pipeline, sample=sample) -> None:
            pipeline.units(sample["actions"], "head", state=sample["state"])

        rows.append((name, *(f"{least(call, options.repeats):.1f}" for call in (forth, back))))
    print("\n".join(align(rows)))


if __name__ == "__main__":
    main()
