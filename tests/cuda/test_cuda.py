"""What one card can show: `make test-cuda`. Skipped where there is none.

NCCL refuses two ranks on one card, so a world of several ranks, its reductions and the memory that sharding saves are
the CPU's to show (tests/distributed, by gloo). Here: NCCL with one rank, numbers that agree with the CPU's in every
precision and compiled, the fused optimizer, copies from pinned memory, how often the host waits, memory, speed.

Every test also has a case on the CPU, at night, which shows that the test itself works.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch

from tests import warm
from tests.nightly import AT_NIGHT
from tests.program import REPO, TOY, environment, metrics, run

ON_CARD = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="left out: there is no CUDA card here"),
]
BOTH = pytest.mark.parametrize("device", [pytest.param("cpu", marks=AT_NIGHT), pytest.param("cuda", marks=ON_CARD)])
RUN = [*TOY, "trainer.steps=3", "validation.every=3", "validation.max_samples_per_group=4", "logger=none"]


def started(device: str) -> Callable[..., subprocess.CompletedProcess]:
    """What runs a command: a card wants a new interpreter."""
    return warm.run if device == "cpu" else partial(subprocess.run, capture_output=True, text=True)


def case(name: str, device: str, *arguments: int) -> dict:
    """What `tests.cuda.cases` prints of a case."""
    words = [sys.executable, "-m", "tests.cuda.cases", name, device, *map(str, arguments)]
    done = started(device)(words, cwd=REPO, env=environment(), timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def numbers(tmp_path, name: str, device: str, *overrides: str) -> dict[int, dict[str, float]]:
    """{step: its numbers} of a run on `device`."""
    only = ["trainer.device=cpu"] if device == "cpu" else []
    paths = [f"paths.run_dir={tmp_path / name}", f"paths.cache_dir={tmp_path / 'cache'}"]
    done = run([*RUN, *only, *overrides, *paths])
    assert done.returncode == 0, done.stderr
    return metrics(tmp_path / name)


@BOTH
@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        pytest.param([], 1e-4, id="float32"),
        pytest.param(["trainer.precision=bf16"], 0.03, id="bf16"),
        pytest.param(["trainer.compile=true"], 1e-3, id="compiled"),
        pytest.param(["model.packing=true"], 1e-4, id="packed"),
        pytest.param(["model.packing=true", "trainer.precision=bf16"], 0.03, id="packed_bf16"),  # by torch's kernel
    ],
)
def test_losses_are_those_of_the_cpu_in_float32(tmp_path, device, overrides, tolerance):
    if device == "cpu" and "trainer.compile=true" in overrides:
        overrides = [*overrides, "trainer.compile_backend=aot_eager"]  # inductor needs a C++ compiler there
    reference = numbers(tmp_path, "reference", "cpu")
    given = numbers(tmp_path, "given", device, *overrides)
    assert given.keys() == reference.keys() == {1, 2, 3}
    for step, row in reference.items():
        for tag in (t for t in row if t.endswith(("/MSE", "/CE", "/Loss", "Training/GradNorm"))):
            assert given[step][tag] == pytest.approx(row[tag], rel=10 * tolerance, abs=tolerance), (step, tag)


@BOTH
def test_deterministic_runs_are_equal_to_the_last_bit(tmp_path, device):
    first, second = (numbers(tmp_path, name, device, "trainer.deterministic=true") for name in ("one", "two"))
    assert first == second


@BOTH
def test_a_process_group_of_one_rank_keeps_what_it_is_given(device):
    told = case("collectives", device)
    assert told["backend"] == {"cuda": "nccl", "cpu": "gloo"}[device]
    assert told["sums"] == [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]] * 3 and told["exact"]


@BOTH
def test_sharded_blocks_on_one_rank_agree_and_hold_their_parameters_once(device):
    """One rank's shard is everything; at most, gradients, one gathered block in bfloat16 and the activations come on
    top."""
    told = case("sharded", device)
    assert told["error"] < 0.05
    assert told["built"] <= 1.1 * told["parameters"] and told["peak"] <= 4 * told["parameters"]


@BOTH
def test_the_optimizer_is_fused_and_lies_on_the_device(device):
    told = case("optimizer", device)
    assert told["fused"] and all(told["fused"])
    assert told["devices"] == [device]


@BOTH
def test_a_run_holds_about_what_was_foreseen(device):
    """Kernels' work space comes on top, and not all is held at once."""
    told = case("foreseen", device)
    assert told["foreseen"] > 0 and not told["unknown"]
    assert device == "cpu" or 0.7 < told["held"] / told["foreseen"] < 1.4, told


@BOTH
def test_more_steps_add_no_wait_but_at_the_log_interval_and_copies_from_pinned_memory(device):
    few, many = case("counted", device, 4), case("counted", device, 10)
    added = {name: many[name] - few[name] for name in few}
    assert added["waits"] <= 2, added  # log_every=3: two more lines
    assert added["pageable"] == 0, added
    assert added["pinned"] >= 6 or device == "cpu", added


@BOTH
def test_the_table_of_a_cards_throughput_and_memory_is_printed(capsys, device):
    """The published pi0 among the rows of a card: 53 GB of parameters, gradients and moments."""
    rows = "flow_tiny,flow_small,pi0" if device == "cuda" else "pi0_tiny"
    options = ["--device", device, "--rows", rows, "--steps", "12" if device == "cuda" else "2", "--workers", "2"]
    command = [sys.executable, "benchmarks/one_card.py", *options]
    done = started(device)(command, cwd=REPO, env=environment(), timeout=280)
    with capsys.disabled():
        print(f"\n{done.stdout}")
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr
