"""Batches of data without video, built at once: the bits of samples built one by one, whatever is done to them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from opentau_train.data.batch import Batch, stack
from opentau_train.data.fields import Field
from opentau_train.data.load import stream
from opentau_train.data.load.samples import SampleBuilder
from opentau_train.data.load.stream import ShardDataset, TrainPlan
from opentau_train.data.load.together import built_together
from opentau_train.data.transforms.base import Transform, Wants
from opentau_train.models.inputs import SUPERVISES, Supervise, TokenizeBytes
from opentau_train.models.prompts import TokenizePrompt
from opentau_train.types import Address
from tests.lerobot_writer import Dataset, vector, write
from tests.unit.data.load.test_real_stream import mixture

TEXT, NUMBER = ({"dtype": d, "shape": [1], "names": None} for d in ("string", "float32"))
SOURCES = "data.sources"


@dataclass(frozen=True)
class Clock(Transform):
    """One that knows nothing of several windows, draws, and writes a field into some samples only."""

    writes: ClassVar = ("clock", "state")

    def __call__(self, record, draws):
        record["state"] = record["state"] + np.float32(draws.uniform("noise"))
        if record["frame_index"] % 2:
            record["clock"] = np.array([record["frame_index"], draws.uniform("start")], np.float32)
        return record

    def fields(self, spec):
        return (Field("clock", (2,), np.float32, -1.0),)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    wide = {
        "observation.state": vector(4),
        "action": vector(3, 0.5),
        "told": (TEXT, lambda e, f: ["push|shove", "", "pull", "pull"][(e + f) % 4]),
        "advantage": (NUMBER, lambda e, f: [float(f % 3)]),
    }
    narrow = {"observation.state": vector(2), "action": vector(2, 0.25)}
    modes = {"control_mode": ["joint", "ee", "joint", "joint", "ee"]}
    write(folder / "wide", Dataset(cameras={}, columns=wide, episode_columns=modes))
    write(folder / "narrow", Dataset(cameras={}, columns=narrow, lengths=(3, 12, 1)))
    return folder


def opened(roots, tmp_path, *words):
    given = [
        f"{SOURCES}.main.root={roots / 'wide'}",
        f"{SOURCES}.old.root={roots / 'narrow'}",
        f"{SOURCES}.main.prompt_columns=[told]",
        f"{SOURCES}.main.prompt_separator='|'",
        f"{SOURCES}.main.weight_column=advantage",
        f"{SOURCES}.old.chunk_length=3",
        "data.chunk_length=6",
        f"{SOURCES}.main.val_split_ratio=0.0",
        f"{SOURCES}.old.val_split_ratio=0.0",
    ]
    return mixture(tmp_path, *given, *words)


def one_by_one(builder, windows):
    mode = np.full(len(windows), -1) if windows.mode is None else windows.mode
    columns = windows.dataset, windows.episode, windows.frame, windows.pass_index, mode
    rows = zip(windows.slot.tolist(), *(c.tolist() for c in columns), strict=True)
    return stack([builder.build(lane, Address(*where)) for lane, *where in rows], builder.mixture.spec)


def equal(a: Batch, b: Batch) -> None:
    assert a.fields == b.fields
    for field in a.fields:
        one, other = a.values[field.name], b.values[field.name]
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype and one.shape == other.shape, field
            assert one.numpy().tobytes() == other.numpy().tobytes(), field
        else:
            assert one == other, field


CASES = {
    "defaults": ((), {}),
    "a policy's": ((), {"s": Supervise(("mse", "ce"), SUPERVISES), "t": TokenizeBytes(9)}),
    "tokens of the state": ((), {"t": TokenizePrompt("pi05", 24)}),
    "one that knows no batches": ((), {"clock": Clock()}),
    "dropout": (("data.dropout.prompt=0.4", "data.dropout.state=0.4"), {}),
    "units": (
        (
            "++data.sources.main.transforms.cm._target_=opentau_train.data.transforms.units.Scale",
            "++data.sources.main.transforms.cm.actions={action*:0.3}",
            "++data.sources.main.transforms.cm.state_offsets={*:0.1}",
        ),
        {"clock": Clock()},
    ),
    "each step's statistics": (("data.normalization_per_timestep=true",), {}),
    "a wider shape": (("data.state_dim=7", "data.action_dim=8"), {}),
    "in order": ((f"{SOURCES}.main.iterable_shuffle=false", f"{SOURCES}.old.iterable_shuffle=false"), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_batch_built_at_once_has_the_bits_of_samples_built_one_by_one(case, roots, tmp_path):
    words, transforms = CASES[case]
    found = opened(roots, tmp_path, *words).for_policy(Wants(transforms))
    tape, groups = found.tape(8), set[int]()
    for training in (True, False):
        together, apart = (SampleBuilder(found, training=training) for _ in range(2))
        for step in range(12):  # two epochs and more: all ends of episodes, and other choices in the second pass
            batch = built_together(together, tape.batch(step))
            assert batch is not None
            equal(batch, one_by_one(apart, tape.batch(step)))
            groups |= set(batch.group.tolist())
    assert len(groups) == 3


def test_a_worker_builds_at_once_what_can_be_and_one_by_one_what_cannot(roots, tmp_path, monkeypatch):
    calls = []

    def counted(builder, windows):
        calls.append(built_together(builder, windows))
        return calls[-1]

    monkeypatch.setattr(stream, "built_together", counted)
    resampled = f"{SOURCES}.main.fps=20"
    for words, at_once in (((), True), ((resampled,), False)):
        calls.clear()
        found = opened(roots, tmp_path, *words)
        shards = list(ShardDataset(found, TrainPlan(found.tape(8), 0, 1, 0, 4), train=True))
        assert [len(shard.batch) for shard in shards] == [8] * 4
        assert all((batch is not None) == at_once for batch in calls) or not at_once
        assert at_once or None in calls
    with_video = mixture(tmp_path)
    calls.clear()
    list(ShardDataset(with_video, TrainPlan(with_video.tape(8), 0, 1, 0, 1), train=True))
    assert calls == [None]


def test_a_value_that_is_no_number_is_replaced_as_it_is_one_by_one(tmp_path, monkeypatch):
    def action(broken):
        return vector(3)[0], lambda e, f: [float("nan") if broken and (e, f) == (2, 5) else e + f, 1.0, 2.0]

    for name, broken in (("set", False), ("spoilt", True)):
        columns = {"observation.state": vector(4), "action": action(broken)}
        write(tmp_path / name, Dataset(cameras={}, columns=columns))
    found = mixture(tmp_path, f"{SOURCES}.main.root={tmp_path / 'set'}", "~data.sources.old", "data.chunk_length=3")
    shutil.copytree(tmp_path / "spoilt" / "data", tmp_path / "set" / "data", dirs_exist_ok=True)
    shards = []
    for path in ("at_once", "apart"):
        if path == "apart":
            monkeypatch.setattr(stream, "built_together", lambda builder, windows: None)
        plan = TrainPlan(found.tape(8), 0, 1, 0, 6)
        shards.append(list(ShardDataset(found, plan, train=True, quarantine=tmp_path / path)))
    for one, other in zip(*shards, strict=True):
        equal(one.batch, other.batch)
        assert one.num_substituted == other.num_substituted
    assert sum(shard.num_substituted for shard in shards[0]) > 0
