"""Processes and devices. The only place that reads the launch environment and that starts collectives' backends.

`World` is what the rest of the program knows of the launch; its methods are the collectives, each of which every rank
must call. Accelerate owns process state, device placement, mixed precision and DDP.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from opentau_train.distributed.network import watch_connections
from opentau_train.distributed.preflight import check_in
from opentau_train.distributed.rollcall import RollCall
from opentau_train.distributed.stopping import end_with_agent
from opentau_train.errors import Explained, UserError

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
    roll: RollCall | None = field(default=None, repr=False)
    timeout: timedelta | None = field(default=None, repr=False)
    """How long a collective of any group, or another wait for what may hang, may take; None where nothing says so."""

    @property
    def data_rank(self) -> int:
        """Which of the `data_size` shares of a global batch, and of a validation, this rank reads. Each rank has its
        own; ranks that split one copy of the policy between them (tensor or context parallel) would have the same."""
        return self.rank

    @property
    def data_size(self) -> int:
        """Into how many shares the data are cut."""
        return self.size

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

    def sum_all(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The elementwise sums over ranks of several tensors of one dtype and device, by ONE all-reduce."""
        kinds = {(tensor.dtype, tensor.device) for tensor in tensors.values()}
        assert len(kinds) == 1, f"one all-reduce adds tensors of one dtype and device, not of {kinds}"
        packed = self.sum(torch.cat([tensor.flatten() for tensor in tensors.values()]))
        parts = packed.split([tensor.numel() for tensor in tensors.values()])
        return {name: part.view(tensors[name].shape) for name, part in zip(tensors, parts, strict=True)}

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank (pickled)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """Every rank's value, in rank order, on every rank (pickled)."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value, group=group)
        return out

    def background_group(self) -> dist.ProcessGroup | None:
        """All ranks over gloo, for the collectives of a thread: in the main thread's group the two would mix. They wait
        no longer than the main thread's; torch's own limit would be half an hour."""
        return dist.new_group(backend="gloo", timeout=self.timeout) if self.size > 1 else None

    @contextmanager
    def roll_call(self) -> Iterator[None]:
        """Inside, a collective that breaks because a rank is gone becomes a `Fault` that names it.

        Belongs inside `stopping.stop_signals`: torchrun sends the ranks of a node SIGTERM when one of them has ended,
        and they must live to tell.
        """
        try:
            yield
        except Exception as error:
            # Broad, and not to be split: any error of one rank leaves the others in a collective; they must be told.
            # Nothing is swallowed: it goes on as it came, or as the cause of the fault that names the lost rank.
            fault = None if self.roll is None else self.roll.explain(error)
            if fault is None:
                raise
            raise fault from error

    def all_meet(self, place: str) -> bool:
        """Whether all ranks are soon at the same `place`, told without a collective (`RollCall.all_meet`)."""
        return self.roll is None or self.roll.all_meet(place)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def agree(self, make: Callable[[], T]) -> T:
        """`make()` on every rank; where it raises an `Explained` error on any, the lowest such rank's is raised on all.

        A file missing on one node must end every rank, with one message, instead of leaving the rest in a collective.
        """
        result, error = None, None
        try:
            result = make()
        except Explained as refusal:
            error = refusal
        errors = self.gather(error)
        for rank, mistake in enumerate(errors):
            if mistake is not None:
                if any(e is None for e in errors):
                    where = f"{mistake.where} (on rank {rank})"
                    mistake = type(mistake)(mistake.what, where=where, remedy=mistake.remedy, details=mistake.details)
                raise mistake
        return result  # type: ignore[return-value]

    def once_a_node(self, make: Callable[[], T]) -> T:
        """`make()` first on each node's local rank 0, then on its others: for files that one process prepares."""
        first = self.agree(lambda: make() if self.local_rank == 0 else None)
        return self.agree(lambda: first if self.local_rank == 0 else make())  # type: ignore[return-value]


def _join_store(timeout: float) -> tuple[dist.Store, int, int]:
    """The launch's key-value store, this process's rank and the world's size, from torchrun's variables.

    As torch's own `env://`, but rank 0 doesn't wait for the others inside it: who is missing is for `check_in` to say.
    """
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE is set, but not {', '.join(missing)}",
            where="the environment",
            remedy="start with torchrun, or unset WORLD_SIZE",
        )
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun, and shared by its restarts
    store: dist.Store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=rank == 0 and not hosted,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
    )
    if hosted:
        store = dist.PrefixStore(f"/worker/attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store, rank, size


@contextmanager
def launch(*, device: str, precision: str, timeout: float, identity: Mapping[str, str]) -> Iterator[World]:
    """Join the launch that the environment describes (torchrun's variables, or a single process).

    `timeout` is the time in seconds that a step may take. CPU tensors travel by gloo, CUDA tensors by NCCL. Raises
    `UserError` on all ranks when one of them is missing, there twice, or not what `identity` says (see `preflight`).
    """
    cpu = device == "cpu" or not torch.cuda.is_available()
    if cpu and device == "cuda":
        raise UserError("this process sees no CUDA device", where="trainer.device", remedy="set it to auto or cpu")
    end_with_agent()
    roll = None
    # Longer than a step may take: the watchdog, which says where every rank was, comes first.
    limit = timedelta(seconds=timeout + COLLECTIVE_MARGIN)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Before Accelerate does it: its own choice on CUDA is NCCL alone, which can't reduce the CPU's float64 sums.
        if not cpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            # A broken NCCL collective is given up and the process lives on: the next vote over gloo finds the same peer
            # gone and raises, which the roll call explains. By default NCCL's watchdog would end the process.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
            # Its flight recorder: where a collective stood, written when one takes longer than `limit`.
            os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
            os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        backend = "gloo" if cpu else "cpu:gloo,cuda:nccl"
        store, rank, size = _join_store(min(timeout, RENDEZVOUS_SECONDS))
        check_in(store, rank, size, identity, min(timeout, RENDEZVOUS_SECONDS))
        roll = RollCall(store, rank, size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        watch_connections()
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="no" if precision == "no" else "bf16",
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
        roll=roll,
        timeout=limit,
    )
    yield world
    # A rank that ended early would break the others' last collectives. The group itself is left to the process's end.
    world.barrier()
