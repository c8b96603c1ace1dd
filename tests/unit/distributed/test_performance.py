"""What a step costs is measured right, and measuring leaves the process as it was."""

from __future__ import annotations

import gc
import json
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from opentau_train.data.load.workers import begin_worker
from opentau_train.distributed import performance
from opentau_train.distributed.performance import (
    ForwardFlops,
    Stamp,
    memory_row,
    scheduled_collection,
    traced,
    utilization,
)
from tests.program import TOY, train_here

CPU = torch.device("cpu")


def test_stamps_on_a_cpu_are_moments_of_the_host():
    first = Stamp(CPU)
    time.sleep(0.01)
    assert Stamp(CPU).seconds_since(first) >= 0.01


def test_the_hosts_memory_is_that_of_this_process():
    before = memory_row(CPU)
    kept = torch.ones(64 * performance.MIB // 4)
    assert 56 < memory_row(CPU)["Memory/HostRSS"] - before["Memory/HostRSS"] < 96 and len(kept)
    assert before.keys() == {"Memory/HostRSS"}


def test_the_first_forward_is_counted_by_its_products_and_changes_nothing():
    layer, flops, x = nn.Linear(8, 16, bias=False), ForwardFlops(), torch.randn(3, 8)
    for size in (3, 1):
        with flops.counting(size):
            y = layer(x[:size])
        assert torch.equal(y, layer(x[:size]))
    assert flops.per_sample == 2 * 8 * 16


@pytest.mark.parametrize("op", performance.ATTENTION, ids=str)
def test_attention_of_shared_keys_is_counted_by_its_products(op):
    flops = ForwardFlops()
    q = torch.empty(2, 8, 16, 64, device="meta", dtype=torch.bfloat16)
    k, v = (torch.empty(2, 1, 24, 64, device="meta", dtype=torch.bfloat16) for _ in range(2))
    more = () if op is torch.ops.aten._scaled_dot_product_flash_attention else (None, False)
    with flops.counting(2):
        op(q, k, v, *more)
    assert flops.per_sample == 2 * 8 * 16 * 24 * (64 + 64)


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12)]
)
def test_utilization_is_three_forwards_over_the_cards_peak(name, peak):
    assert utilization(peak / 100, 16, 2.0, name) == pytest.approx(3 * 16 / 2 / 100)


def test_a_card_of_no_known_peak_has_no_utilization():
    assert utilization(1e12, 16, 2.0, "Some Other Card") is None


class Cycle:
    """Only the collector frees it."""

    alive = 0

    def __init__(self):
        self.itself = self
        Cycle.alive += 1

    def __del__(self):
        Cycle.alive -= 1


def test_garbage_is_collected_at_its_steps_only():
    gc.unfreeze()
    with scheduled_collection() as collect:
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        Cycle()
        collect(performance.COLLECT_EVERY - 1)
        assert Cycle.alive == 1
        collect(performance.COLLECT_EVERY)
        assert Cycle.alive == 0
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.freeze()  # as the tests' own objects are
    frozen = gc.get_freeze_count()
    with scheduled_collection():
        pass
    assert gc.get_freeze_count() > frozen / 2  # some of them have ended since


def test_loader_workers_collect_their_own_garbage():
    """A fork inherits that the collector is off, and nothing there would call it."""
    with scheduled_collection():
        loader = DataLoader([0], num_workers=1, collate_fn=lambda _: gc.isenabled(), worker_init_fn=begin_worker)
        assert list(loader) == [True]


@pytest.mark.slow
def test_a_profiled_run_leaves_a_trace_that_perfetto_reads(tmp_path):
    run = train_here(
        [*TOY, "+debug=profile", "trainer.steps=7", "trainer.profile_steps=2", "logger=none"], tmp_path / "run"
    )
    trace = json.loads((run / "profile" / "trace.json").read_text())
    events = trace["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4"}
    assert all({"ph", "ts", "pid", "tid"} <= event.keys() for event in events if event["ph"] == "X")
    assert any("addmm" in event["name"] or "mm" in event["name"] for event in events)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = rows[-1]
    parts = [last[f"Timing/{part}"] for part in ("DataWait", "ForwardBackward", "Optimizer")]
    assert all(seconds > 0 for seconds in parts) and sum(parts) <= last["Timing/Step"] and last["Memory/HostRSS"] > 0


def test_a_run_that_is_too_short_to_trace_says_so(tmp_path, caplog):
    with traced(tmp_path / "trace.json", 2) as step:
        step()
    assert not (tmp_path / "trace.json").exists() and "no step was traced" in caplog.text
