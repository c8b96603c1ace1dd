"""What a run's trackers have on disk: W&B's own files, and TensorBoard's."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opentau_train.sinks.layout import place_of

BLOCK, HEADER = 32768, 7


def records(path: Path) -> Iterator[Any]:
    """The whole records of a `.wandb` file: LevelDB's log format after seven bytes of W&B's own."""
    from wandb.proto import wandb_internal_pb2

    data, at, part = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + HEADER])
        part += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4) and at <= len(data):  # the only part, or the last one
            yield wandb_internal_pb2.Record.FromString(part)
            part = b""


def parts(run_dir: Path) -> list[tuple[str, dict[int, dict[str, float]]]]:
    """(run id, {step: its numbers}) of each file that the attempts left, oldest first."""
    found = []
    for path in sorted((run_dir / "wandb").glob("*run-*/*.wandb")):
        identity, rows = "", {}
        for record in records(path):
            if record.HasField("run"):
                identity = record.run.run_id
            if record.HasField("history"):
                row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                assert row["_step"] not in rows
                rows[row["_step"]] = row
        found.append((identity, rows))
    return found


def tensorboard_steps(run_dir: Path) -> dict[str, list[int]]:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def check_curves(run_dir: Path, steps: range) -> None:
    """TensorBoard shows what `metrics.jsonl` has, each step once in every tag."""
    expected: dict[str, list[int]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for tag in row.keys() - {"step", "time", "attempt"}:
            expected.setdefault(place_of(tag, row), []).append(row["step"])
    assert expected["Training/Loss"] == list(steps)
    assert tensorboard_steps(run_dir) == expected
