"""What it costs a rank to begin from weights on disk: the most memory that it holds meanwhile, and the time.

    python benchmarks/first_weights.py [--ranks 4] [--repeats 3]

A flow policy of 300 M parameters, sharded over CPU ranks (gloo) of one machine. *slices*: built without memory,
sharded, and each rank reads its slices. *drawn*: the same without a file, all numbers drawn. *whole*: each rank builds
it all and reads the file before it is sharded. The memory is what the process's peak (VmHWM, pages of the file among
it) grew by, on the rank that grew most.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support.program import machine

from opentau_train.checkpoints.start import Start, spread_policy
from opentau_train.checkpoints.weights import FirstWeights
from opentau_train.distributed.parallel import Execution, data_mesh, spread
from opentau_train.distributed.world import World, launch
from opentau_train.models.flow import FlowPolicy
from opentau_train.types import BatchSpec

SPEC = BatchSpec(("wrist", "left"), (224, 224), 0, 8, 8, 16)
SIZES = {"width": 1024, "depth": 24, "heads": 16}
WAYS = ("slices", "drawn", "whole")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way is not None:
        one_rank(options.way, options.file)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        policy = FlowPolicy(SPEC, **SIZES)
        size = sum(p.numel() * p.element_size() for p in policy.parameters())
        block = sum(p.numel() * p.element_size() for p in policy.blocks()[0].parameters())
        save_file(policy.state_dict(), file)
        del policy
        shard = size / options.ranks
        sizes = f"{size / 1e6:,.0f} MB of float32, {shard / 1e6:,.0f} MB a shard, {block / 1e6:.0f} MB a block"
        print(f"{machine()}; {options.ranks} ranks, {sizes}; medians of {options.repeats} runs\n")
        print("| way | peak grew by | of a shard | seconds |\n|---|---|---|---|")
        for way in WAYS:
            runs = [in_own_processes(options.ranks, way, file) for _ in range(options.repeats)]
            grown, seconds = (statistics.median(run[key] for run in runs) for key in ("grown", "seconds"))
            print(f"| {way} | {grown / 1e6:,.0f} MB | {grown / shard:.2f} | {seconds:.1f} |", flush=True)


def in_own_processes(ranks: int, way: str, file: Path) -> dict[str, float]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launcher, __file__, "--way", way, "--file", str(file)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def one_rank(way: str, file: Path) -> None:
    with launch(device="cpu", precision="no", timeout=300, identity={}) as world:
        build("drawn", world, None, width=64, depth=1, heads=1)  # what a first call loads isn't counted
        before, started = reset_peak(), time.perf_counter()
        policy = build(way, world, file, **SIZES)
        world.barrier()
        seconds, grown = time.perf_counter() - started, peak() - before
        assert sum(p.to_local().isnan().sum() for p in policy.parameters()) == 0
        most = max(world.gather(grown))
        if world.is_main:
            print(json.dumps({"grown": most, "seconds": seconds}))
    sys.stdout.flush()
    os._exit(0)


def build(way: str, world: World, file: Path | None, **sizes: int) -> FlowPolicy:
    torch.manual_seed(0)
    mesh = data_mesh(world, -1, world.size)
    if way == "whole":
        policy = FlowPolicy(SPEC, **sizes)
        policy.load_state_dict(load_file(file))
        spread(policy, policy.blocks(), world, mesh)
        return policy
    first = (FirstWeights("pretrained_path", file, resize=False),) if way == "slices" else ()
    model = {"_target_": "opentau_train.models.flow.FlowPolicy", **sizes}
    return spread_policy(model, SPEC, world, mesh, Execution(), Start(first))[0]


def peak() -> int:
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def reset_peak() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


if __name__ == "__main__":
    main()
