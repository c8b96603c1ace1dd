"""Packed tokens under a cap that gives ranks unequal numbers of micro-batches train as padded ones do in one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.test_policies import POLICIES, SIZES
from tests.nightly import AT_NIGHT
from tests.program import TINY_POLICY, assert_close, metrics, train_all

pytestmark = pytest.mark.distributed

JOINT = [*TINY_POLICY, *POLICIES["wam"], "validation.evaluators=[loss]"]
CAPS = {"flow": (TINY_POLICY, 80), "pi05": (POLICIES["pi05"], 400), "wam": (JOINT, 100)}
"""{policy: (its words, a cap on a micro-batch's tokens)}: two samples fit where one is near its episode's end."""
SHARDED = ["parallelism=fsdp", "parallelism.activation_checkpointing=true", "parallelism.gather_once=true"]
LAYOUTS = {"alone": (1, []), "ddp_2": (2, []), "fsdp_2": (2, SHARDED)}


@pytest.mark.parametrize("policies", [("flow", "wam"), pytest.param(("pi05",), marks=AT_NIGHT)])
def test_unequal_numbers_of_micro_batches_train_alike_in_every_layout(policies, tmp_path):
    words = [*SIZES, "trainer.steps=3", "validation.every=0", "logger=none"]
    words += ["flight_recorder=true", "checkpoint.every=0"]
    caps = {policy: CAPS[policy] for policy in policies}
    runs = {tmp_path / policy / "padded": (1, [*words, *own]) for policy, (own, _) in caps.items()}
    for policy, (own, cap) in caps.items():
        packed = [*words, *own, "model.packing=true", f"data.max_num_tokens_after_packing={cap}"]
        runs |= {tmp_path / policy / name: (ranks, [*packed, *how]) for name, (ranks, how) in LAYOUTS.items()}
    train_all(runs)
    efficiencies: dict[str, list[float]] = {}
    for policy in policies:
        padded = metrics(tmp_path / policy / "padded")
        for name in LAYOUTS:
            rows = metrics(tmp_path / policy / name)
            told = [row.pop("Training/PackingEfficiency") for row in rows.values()]
            assert_close(rows, padded, training=1e-5, validation=0.0, what=f"{policy} {name}")
            assert told == efficiencies.setdefault(policy, told), "of the global batch, in every layout"
        assert unequal(tmp_path / policy / "fsdp_2")
        assert recorded(tmp_path / policy / "alone") == recorded(tmp_path / policy / "padded"), "in the tape's order"


def unequal(run: Path) -> bool:
    """Whether in some step one rank's samples had more tokens than the flow policy's cap, and the other's had not."""

    def above(line: dict) -> bool:
        dims, others = (7, 6), (12, 8)  # of the actions, and tokens that aren't steps, of each dataset
        steps = [count / dims[d] for count, d in zip(line["count"]["mse"], line["dataset"], strict=True)]
        return sum(2 * num + others[d] for num, d in zip(steps, line["dataset"], strict=True)) > CAPS["flow"][1]

    ranks = [[above(line) for line in lines(run, rank)] for rank in range(2)]
    return any(a != b for a, b in zip(*ranks, strict=True))


def recorded(run: Path) -> list[tuple]:
    """Each sample in the order of the recorder, with its loss to three digits."""
    rows = [zip(r["t"], r["dataset"], r["episode"], r["frame"], r["sum"]["mse"], strict=True) for r in lines(run, 0)]
    return [(*row[:4], pytest.approx(row[4], rel=1e-3)) for step in rows for row in step]


def lines(run: Path, rank: int) -> list[dict]:
    (file,) = (run / "flight").glob(f"rank{rank:05d}-*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]
