"""Processes and devices. The only place that reads the launch environment and that starts collectives' backends.

`World` is what the rest of the program knows of the launch; its methods are the collectives, each of which every rank
must call. Accelerate owns process state, device placement, mixed precision and DDP.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from opentau_train.errors import UserError
from opentau_train.preflight import check_in

T = TypeVar("T")

RENDEZVOUS_SECONDS = 300.0
"""How long the ranks that are there wait for the others."""

COLLECTIVE_MARGIN = 60.0
"""Seconds that a collective may take beyond a step."""


@dataclass(frozen=True)
class World:
    """The launch as one rank sees it. With size 1 no process group exists and the collectives are the identity."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    accelerator: Accelerator = field(repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        return self.size // self.local_size

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The elementwise sum over ranks, in place, on whatever device the tensor is."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank (pickled)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank (pickled)."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value)
        return out

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def agree(self, make: Callable[[], T]) -> T:
        """`make()` on every rank; where it raises a `UserError` on any, the lowest such rank's is raised on all.

        A file missing on one node must end every rank, with one message, instead of leaving the rest in a collective.
        """
        result, error = None, None
        try:
            result = make()
        except UserError as mistake:
            error = mistake
        errors = self.gather(error)
        for rank, found in enumerate(errors):
            if found is not None:
                if any(e is None for e in errors):
                    found = UserError(found.what, where=f"{found.where} (on rank {rank})", remedy=found.remedy)
                raise found
        return result  # type: ignore[return-value]

    def once_a_node(self, make: Callable[[], T]) -> T:
        """`make()` first on each node's local rank 0, then on its others: for files that one process prepares."""
        if self.local_rank == 0:
            result = self.agree(make)
        else:
            self.agree(lambda: None)
        return result if self.local_rank == 0 else make()


@contextmanager
def launch(*, device: str, precision: str, timeout: float, identity: Mapping[str, str]) -> Iterator[World]:
    """Join the launch that the environment describes (torchrun's variables, or a single process).

    `timeout` is the time in seconds that a step may take. CPU tensors travel by gloo, CUDA tensors by NCCL. Raises
    `UserError` on all ranks when one of them is missing, there twice, or not what `identity` says (see `preflight`).
    """
    cpu = device == "cpu" or not torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Before Accelerate does it: its own choice on CUDA is NCCL alone, which can't reduce the CPU's float64 sums.
        if not cpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "gloo" if cpu else "cpu:gloo,cuda:nccl"
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
        check_in(store, rank, size, identity, min(timeout, RENDEZVOUS_SECONDS))
        # Longer than a step may take: the watchdog, which says where every rank was, comes first.
        limit = timedelta(seconds=timeout + COLLECTIVE_MARGIN)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    size = accelerator.num_processes
    world = World(
        rank=accelerator.process_index,
        size=size,
        local_rank=accelerator.local_process_index,
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", size)),
        device=accelerator.device,
        accelerator=accelerator,
    )
    yield world
    # A rank that ended early would break the others' last collectives. The group itself is left to the process's end.
    world.barrier()


def data_parallel_degrees(replicate: int, shard: int, size: int) -> tuple[int, int]:
    """(replicate, shard) with -1 filled in. Raises `UserError` where the product isn't the world size."""
    where = "parallelism.data_parallel_{replicate,shard}_degree"
    if replicate == -1 and shard == -1:
        replicate, shard = 1, size
    elif replicate == -1:
        replicate = size // shard
    elif shard == -1:
        shard = size // replicate
    if replicate * shard != size:
        raise UserError(
            f"replicate degree {replicate} x shard degree {shard} = {replicate * shard}, but {size} processes run",
            where=where,
            remedy=f"choose two degrees whose product is {size}, or leave one at -1",
        )
    return replicate, shard


@dataclass(frozen=True)
class Replicas:
    """A policy spread over the ranks: `model` is what the loop calls, `sharded` says that every forward is a
    collective."""

    model: nn.Module
    sharded: bool

    @contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """Around the forward and backward of a micro-batch: gradients are reduced in the last one only."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        with self.model.no_sync() if isinstance(self.model, DistributedDataParallel) and not last else nullcontext():
            yield

    def reshard(self) -> None:
        """Give back what forwards without a backward left gathered (the root's parameters stay so by default)."""
        if self.sharded:
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


def spread(
    policy: nn.Module, blocks: Sequence[nn.Module], world: World, replicate: int, shard: int, precision: str
) -> Replicas:
    """The policy under DDP, or with `shard` > 1 fully sharded over a (replicate, shard) mesh, block by block.

    Either way gradients are averaged over all ranks. Accelerate's FSDP2 plugin refuses CPUs, torch's own does not.
    """
    if shard == 1:
        return Replicas(world.accelerator.prepare_model(policy), sharded=False)
    mesh = init_device_mesh(world.device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))
    mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision == "bf16" else MixedPrecisionPolicy()
    policy.to(world.device)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=mixed)
    fully_shard(policy, mesh=mesh, mp_policy=mixed)
    register_fsdp_forward_method(policy, "sample_actions")
    return Replicas(policy, sharded=True)


def check_batch(global_batch_size: int, size: int) -> None:
    """Raises `UserError` naming the nearest rank counts and batches that fit where R doesn't divide B."""
    if global_batch_size % size == 0:
        return
    ranks = [r for r in range(1, global_batch_size + 1) if global_batch_size % r == 0]
    below = max((r for r in ranks if r < size), default=1)
    above = min((r for r in ranks if r > size), default=None)
    near = f"{below} or {above}" if above else str(below)
    low = global_batch_size // size * size
    raise UserError(
        f"a global batch of {global_batch_size} can't be shared by {size} ranks",
        where="trainer.global_batch_size",
        remedy=f"run {near} ranks, or set trainer.global_batch_size={max(low, size)} or {low + size}",
    )
