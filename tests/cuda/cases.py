"""What needs a process of its own on a card: `python -m tests.cuda.cases CASE DEVICE [STEPS]` prints a line of JSON.

Each case also runs on the CPU, where it shows that the case itself works.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.profiler import ProfilerActivity, profile

from opentau_train import cli
from opentau_train.checkpoints.place import held
from opentau_train.config.settings import load_settings
from opentau_train.data.mixture.open import open_plan
from opentau_train.data.mixture.resolve import resolve_sources
from opentau_train.distributed.memory import footprint
from opentau_train.distributed.rehearsal import rehearse
from opentau_train.distributed.watchdog import Progress
from opentau_train.distributed.world import launch
from opentau_train.job import prepare
from opentau_train.models.policy import build_policy
from tests.program import TOY, train_here

WIDTH, LAYERS, BATCH, LENGTH = 512, 8, 4, 16


def overrides(device: str) -> list[str]:
    """The small mixture without validations and saves on the way, so that steps are all that more steps add."""
    only = ["trainer.device=cpu"] if device == "cpu" else []
    return [*TOY, *only, "logger=none", "trainer.log_every=3", "validation.every=0", "checkpoint.every=0"]


@contextmanager
def group_of_one(device: str) -> Iterator[None]:
    """The process group of one rank on `device`: NCCL on a card."""
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def collectives(device: str, folder: Path) -> dict[str, Any]:
    """A process group of one rank (NCCL on a card): sums, gathers and scatters give back what they were given; sums in
    float64 go by gloo beside it."""
    with group_of_one(device):
        values = torch.arange(8.0, device=device)
        gathered, scattered = torch.empty_like(values), torch.empty_like(values)
        dist.all_reduce(values)
        dist.all_gather_into_tensor(gathered, values)
        dist.reduce_scatter_tensor(scattered, values)
        exact = torch.tensor([1.0 + 2.0**-40], dtype=torch.float64)
        dist.all_reduce(exact, group=dist.new_group(backend="gloo"))
        sums = [values.tolist(), gathered.tolist(), scattered.tolist()]
        return {"backend": dist.get_backend(), "sums": sums, "exact": exact.item() == 1.0 + 2.0**-40}


def sharded(device: str, folder: Path) -> dict[str, Any]:
    """Blocks under `fully_shard` on one rank, in bfloat16, against the same blocks without it: the gradients' largest
    difference over the largest gradient; bytes held after building, and the most (0 on the CPU, which counts none)."""
    torch.manual_seed(0)
    blocks = [nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True) for _ in range(LAYERS)]
    plain, inputs = nn.Sequential(*blocks), torch.randn(BATCH, LENGTH, WIDTH)
    model = copy.deepcopy(plain)
    plain(inputs).square().mean().backward()
    with group_of_one(device):
        mesh = init_device_mesh(device, (1,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model.to(device)
        for block in model:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        built = torch.cuda.memory_allocated() if device == "cuda" else 0
        model(inputs.to(device)).float().square().mean().backward()
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        gradients = [p.grad.full_tensor().cpu() for p in model.parameters()]
    expected = [p.grad for p in plain.parameters()]
    largest = max(float(g.abs().max()) for g in expected)
    error = max(float((a - b).abs().max()) for a, b in zip(gradients, expected, strict=True)) / largest
    return {"parameters": 4 * sum(p.numel() for p in plain.parameters()), "built": built, "peak": peak, "error": error}


def optimizer(device: str, folder: Path) -> dict[str, Any]:
    """The optimizer that the program builds: whether each group is fused, and where its parameters are."""
    arguments = [*overrides(device), f"paths.run_dir={folder / 'run'}", f"paths.cache_dir={folder / 'cache'}"]
    tree = cli.compose(arguments)
    settings = load_settings(tree)
    launched = launch(device=settings.trainer.device, precision="no", timeout=60.0, identity={})
    with launched as world, held(settings, world) as place:
        groups = prepare(settings, tree, world, place, Progress()).state.optimizer.param_groups
    devices = {p.device.type for group in groups for p in group["params"]}
    return {"fused": [bool(group["fused"]) for group in groups], "devices": sorted(devices)}


def counted(device: str, folder: Path, steps: int) -> dict[str, Any]:
    """A run of `steps`: how often the host waited for the card, and copies to it from pinned and from pageable memory
    (all 0 on the CPU)."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with warnings.catch_warnings(record=True) as waits, profile(activities=activities) as profiler:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        train_here([*overrides(device), f"trainer.steps={steps}"], folder / "run")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    profiler.export_chrome_trace(str(folder / "trace.json"))
    names = [str(event.get("name", "")) for event in json.loads((folder / "trace.json").read_text())["traceEvents"]]
    return {
        "waits": sum("called a synchronizing CUDA operation" in str(w.message) for w in waits),
        "pinned": sum(name.startswith("Memcpy HtoD (Pinned") for name in names),
        "pageable": sum(name.startswith("Memcpy HtoD (Pageable") for name in names),
    }


def foreseen(device: str, folder: Path) -> dict[str, Any]:
    """Bytes that a rank was foreseen to hold, what couldn't be known, and the most that it held (0 on the CPU)."""
    size = ["model=flow_base", "data.image_size=[96,96]", "trainer.global_batch_size=64"] if device == "cuda" else []
    given = [o for o in overrides(device) if not (size and o.startswith(("model.", "data.image_size", "trainer.glob")))]
    arguments = [*given, *size, "trainer.steps=3"]
    run = train_here(arguments, folder / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    settings = load_settings(cli.compose([*arguments, f"paths.cache_dir={folder / 'cache'}"]))
    mixture = open_plan(settings, resolve_sources(settings))
    rehearsal = rehearse(partial(build_policy, settings.model, mixture.spec), mixture, device)
    total = footprint(rehearsal, settings, 1).total
    held = max(2**20 * row.get("Memory/DeviceAllocatedPeak", 0.0) for row in rows)
    return {"foreseen": total, "unknown": list(rehearsal.notes.values()), "held": held}


if __name__ == "__main__":
    name, where, *rest = sys.argv[1:]
    case = {f.__name__: f for f in (collectives, sharded, optimizer, counted, foreseen)}[name]
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(case(where, Path(temporary), *map(int, rest))), flush=True)
    os._exit(0)  # as the program ends: gloo's destructors may hang
