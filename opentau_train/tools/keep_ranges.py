"""Compute a keep-ranges filter file from a LeRobot dataset's own action columns: which frames aren't idle.

    python -m opentau_train.tools.keep_ranges ROOT --out FILE [--actions action.joint_velocity] [--threshold 1e-3]

Keys are episode numbers. Train with `data.sources.NAME.use_filter_dict=true data.sources.NAME.filter_dict_path=FILE`.
Reads rows only, never video.

Exit codes: 0; 2 for a mistake in what was given, with where and a remedy; 1 for what the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opentau_train.config.bounds import at_least, positive
from opentau_train.config.data import SourceSettings
from opentau_train.data.keep_ranges import Ranges
from opentau_train.data.lerobot import LeRobotSource
from opentau_train.data.lerobot.source import LeRobotDataset
from opentau_train.errors import EXIT_OK, EXIT_USER, UserError
from opentau_train.tools.options import Parser
from opentau_train.tools.out import make_directory, writing
from opentau_train.tools.words import NAME, in_own_words


def compute(source: LeRobotDataset, **rule: Any) -> dict[str, Ranges]:
    """{episode number: ranges} of every episode; `rule` as in `nonidle_ranges`.

    Raises `UserError` naming a file that can't be read.
    """
    numbers = source.episodes.episode_index
    rows = source.columns(np.arange(len(numbers)))
    ranges = {int(numbers[position]): nonidle_ranges(actions, **rule) for position, _, actions in rows}
    return {str(number): ranges[number] for number in sorted(ranges)}


def write(path: Path, metadata: dict[str, Any], ranges: dict[str, Ranges]) -> None:
    """Write the file in the form `{"metadata": ..., "keep_ranges": ...}`, whole or not at all. Raises `UserError`."""
    partial = path.with_name(path.name + ".tmp")
    with writing(path):
        partial.write_text(json.dumps({"metadata": metadata, "keep_ranges": ranges}) + "\n")
        os.replace(partial, path)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("keep_ranges", __doc__)
    parser.add_argument("root", type=Path, help="the dataset's directory")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--actions", nargs="+", metavar="COLUMN", help="default: action, or the float columns action.*")
    parser.add_argument("--threshold", type=float, default=1e-3, help="a change below it is none (default 1e-3)")
    parser.add_argument("--idle-run", type=int, default=7, help="idle frames in a row that go (default 7)")
    parser.add_argument("--kept-run", type=int, default=16, help="fewest frames in a row to keep (default 16)")
    parser.add_argument("--trim-tail", type=int, default=10, help="frames off each range's end (default 10)")
    return parser.parse_args(arguments)


def _read(options: argparse.Namespace, rule: dict[str, Any]) -> tuple[LeRobotDataset, dict[str, Ranges]]:
    """The dataset's actions alone, and their ranges. Raises `UserError`."""
    actions = options.actions and tuple(options.actions)
    columns = LeRobotSource(actions=actions, state=(), cameras=())
    try:
        source = columns.open(NAME, SourceSettings(root=str(options.root)))
        return source, compute(source, **rule)
    except UserError as error:
        raise in_own_words(error, options.root) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    options = _arguments(arguments)
    rule = {name: getattr(options, name) for name in ("threshold", "idle_run", "kept_run", "trim_tail")}
    try:
        positive("--threshold", options.threshold)
        at_least("--idle-run", options.idle_run, 1)
        at_least("--kept-run", options.kept_run, 1)
        at_least("--trim-tail", options.trim_tail, 0)
        make_directory(options.out)
        source, ranges = _read(options, rule)
        write(options.out, {**rule, "actions": list(source.action_names)}, ranges)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USER
    total, kept = int(source.episodes.length.sum()), sum(b - a for kept in ranges.values() for a, b in kept)
    empty = sum(not kept for kept in ranges.values())
    print(f"{options.out}: {len(ranges)} episodes ({empty} wholly idle), {kept} of {total} frames kept")
    return EXIT_OK


def nonidle_ranges(
    actions: NDArray[np.floating],
    *,
    threshold: float = 1e-3,
    idle_run: int = 7,
    kept_run: int = 16,
    trim_tail: int = 10,
) -> Ranges:
    """Ranges of an episode's `actions` [L, A] without its idle stretches, as the public DROID filter defines them.

    A frame is idle when no dimension changed by `threshold` or more since the frame before. Runs of `idle_run` or more
    idle frames go; of what remains, runs of fewer than `kept_run` frames go; the others lose their last `trim_tail`
    frames, whose chunks would be mostly idle.
    """
    idle = np.zeros(len(actions), bool)
    if len(actions) > 1:
        idle[1:] = (np.abs(np.diff(actions.astype(np.float64), axis=0)) < threshold).all(axis=1)
    keep = np.ones(len(actions), bool)
    for start, end in _runs(idle):
        if end - start >= idle_run:
            keep[start:end] = False
    return [(a, b - trim_tail) for a, b in _runs(keep) if b - a >= kept_run and b - a > trim_tail]


def _runs(mask: NDArray[np.bool_]) -> Ranges:
    """[start, end) of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


if __name__ == "__main__":
    sys.exit(main())
