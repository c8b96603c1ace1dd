"""How long a checkpoint stops the training: saved at once, and with checkpoint.async=true.

    python benchmarks/async_checkpoint.py [--width 768 --depth 8 --pairs 5 --folder DIR]
    torchrun --nproc-per-node 2 benchmarks/async_checkpoint.py        # the policy sharded over the ranks

A policy of some 60 million parameters with AdamW's moments and an average: 1.21 GB a checkpoint, 0.3 GB of them the
weights' own file. Saves alternate, at once and in the background; the stall of the latter is the call of `save` and the
commit at the end, while the write itself goes on beside steps that keep one core a rank busy. Prints rank 0's medians
and their ratio, which is to be at most 0.2; exit code 1 if it isn't. The first pair is left out: its background save
also pays for fresh memory. On one process torch.save of the same tensors, with fsync, takes turns with them: it writes
no weights' own file and no hashes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from opentau_train.checkpoints.card import Pretrained
from opentau_train.checkpoints.contents import tensors_of
from opentau_train.checkpoints.saver import Saver
from opentau_train.cli import end
from opentau_train.config.optimizer import OptimizerSettings
from opentau_train.config.settings import CheckpointSettings
from opentau_train.distributed.parallel import data_mesh, spread
from opentau_train.distributed.world import World, launch
from opentau_train.models.average import Ema
from opentau_train.models.flow import FlowPolicy
from opentau_train.optim import build_optimizer
from opentau_train.step import TrainState
from opentau_train.types import BatchSpec

LIMIT = 0.2
SPEC = BatchSpec(cameras=("left",), image_size=(64, 64), history=0, state_dim=8, action_dim=8, chunk_length=16)


def make_state(width: int, depth: int, world: World) -> TrainState:
    policy = FlowPolicy(SPEC, width=width, depth=depth, heads=8)
    replicas = spread(policy, policy.blocks(), world, data_mesh(world, 1, world.size))
    optimizer = build_optimizer(policy, OptimizerSettings(lr=1e-4))
    for parameter in policy.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()  # now there are moments
    return TrainState(policy, replicas, optimizer, Ema(policy, 0.999))


def timed_save(saver: Saver, state: TrainState, world: World) -> tuple[float, float, float]:
    """(stall, the whole save, seconds of one step of work beside it)."""
    state.step += 1
    world.barrier()
    began = time.perf_counter()
    done = saver.save(state, stream={}, counters={})
    stall = time.perf_counter() - began
    steps, busy = 0, time.perf_counter()
    matrix = torch.randn(512, 512)
    while done is None:
        for _ in range(20):
            matrix = torch.tanh(matrix @ matrix)
        steps += 1
        # The step's own all-reduce, in which the flag travels: to wait there for a slower rank isn't the save's doing.
        all_written = world.sum(torch.tensor([float(saver.written)])).item() == world.size
        polled = time.perf_counter()
        done = saver.poll(all_written)
        stall += time.perf_counter() - polled
    return stall, time.perf_counter() - began, (time.perf_counter() - busy) / max(steps, 1)


def plain_save(state: TrainState, path: Path) -> float:
    """Seconds that torch.save and fsync take for the same tensors."""
    began = time.perf_counter()
    with path.open("wb") as file:
        torch.save(tensors_of(state), file)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; else the temporary directory")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the copy isn't faster on two, and far slower where other programs use them
    stalls: dict[bool, list[float]] = {False: [], True: []}
    wholes: dict[bool, list[float]] = {False: [], True: []}
    plain: list[float] = []
    with launch(device="cpu", precision="no", timeout=600, identity={}) as world:
        folder = Path(world.broadcast(tempfile.mkdtemp(prefix="async_checkpoint_", dir=options.folder)))
        try:
            state = make_state(options.width, options.depth, world)
            size = sum(p.numel() for p in state.policy.parameters())
            savers = {
                kind: Saver(folder / str(kind), world, CheckpointSettings(asynchronous=kind, keep_last=1), CARD)
                for kind in (False, True)
            }
            with savers[False], savers[True]:
                for pair in range(options.pairs + 1):
                    if world.size == 1:
                        plain += [plain_save(state, folder / "plain.pt")] * bool(pair)
                    for kind in (False, True):
                        stall, whole, _ = timed_save(savers[kind], state, world)
                        if pair:
                            stalls[kind].append(stall)
                            wholes[kind].append(whole)
        finally:
            world.barrier()
            shutil.rmtree(folder, ignore_errors=True)
    if not world.is_main:
        return 0
    at_once, background = statistics.median(stalls[False]), statistics.median(stalls[True])
    ratio = background / at_once
    gigabytes = size * 20 / 1e9
    print(
        f"{world.size} processes, {size / 1e6:.0f} M parameters, {gigabytes:.2f} GB a checkpoint, {options.pairs} pairs"
    )
    print(f"  at once:        training stops for {at_once:.2f} s")
    if plain:
        ratios = [at_once / by_torch for at_once, by_torch in zip(stalls[False], plain, strict=True)]
        print(f"  torch.save:     {median(plain):.2f} s with fsync; at once takes {median(ratios):.2f} of it")
    print(f"  in background:  training stops for {background:.2f} s; whole on disk after {median(wholes[True]):.2f} s")
    print(f"  ratio {ratio:.3f} (limit {LIMIT}), pairs {', '.join(f'{b / a:.3f}' for a, b in zip(*stalls.values()))}")
    return 0 if ratio <= LIMIT else 1


CARD = Pretrained({}, {}, {})
median = statistics.median

if __name__ == "__main__":
    end(main())
