"""A policy spread over the ranks: replicated (DDP), sharded (FSDP), or sharded in groups that are replicated (HSDP).

    parallelism=ddp     replicate = ranks, shard = 1
    parallelism=fsdp    replicate = 1, shard = ranks
    parallelism=hsdp    replicate = nodes, shard = ranks of a node

Gradients are averaged over all ranks in float32 where FSDP shards, in the parameters' type under DDP. With
trainer.precision=bf16 only the computation is in bfloat16, and what FSDP gathers for it; with bf16_params the
parameters are, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from opentau_train.distributed.world import World
from opentau_train.errors import UserError, did_you_mean
from opentau_train.models.policy import Policy

_REPLICATE, _SHARD = "parallelism.data_parallel_replicate_degree", "parallelism.data_parallel_shard_degree"


def data_parallel_degrees(replicate: int, shard: int, size: int) -> tuple[int, int]:
    """(replicate, shard) with -1 filled in, both -1 meaning all sharded. Raises `UserError`, with the arithmetic, where
    the product isn't the world size."""
    if replicate == -1 and shard == -1:
        replicate = 1
    for given, name, other in ((shard, _SHARD, replicate), (replicate, _REPLICATE, shard)):
        if other == -1 and size % given:
            fits = ", ".join(str(d) for d in range(1, size + 1) if size % d == 0)
            raise UserError(
                f"{size} processes can't be divided by {name}={given}: "
                f"{size} = {size // given} x {given} + {size % given}",
                where=name,
                remedy=f"set it to one of {fits}, or run {max(1, size // given) * given} processes",
            )
    replicate = size // shard if replicate == -1 else replicate
    shard = size // replicate if shard == -1 else shard
    if replicate * shard != size:
        raise UserError(
            f"replicate degree {replicate} x shard degree {shard} = {replicate * shard}, but {size} processes run",
            where=f"{_REPLICATE} and {_SHARD}",
            remedy=f"choose two degrees whose product is {size}, or leave one at -1",
        )
    return replicate, shard


def data_mesh(world: World, replicate: int, shard: int) -> DeviceMesh | None:
    """The data ranks as a mesh of (replicate, shard), None where every rank holds the whole policy; -1 as in
    `data_parallel_degrees`. Collective, and the only place that makes a mesh. Raises `UserError` on all ranks alike."""
    replicate, shard = data_parallel_degrees(replicate, shard, world.data_size)
    if shard == 1:
        return None
    mesh = init_device_mesh(world.device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))
    return mesh["shard"] if replicate == 1 else mesh  # else FSDP would all-reduce in groups of one


PRECISIONS = {
    "no": "float32 parameters, computed in float32",
    "bf16": "float32 parameters, computed in bfloat16",
    "bf16_params": "bfloat16 parameters and moments, computed in bfloat16",
}
"""{trainer.precision: what it says}. An average of the weights is float32 in all."""


@dataclass(frozen=True)
class Execution:
    """How a policy is computed, block by block. `precision`: `PRECISIONS`; `gather_once` as `Replicas` says."""

    precision: str = "no"
    activation_checkpointing: bool = False
    gather_once: bool = False
    compile_backend: str | None = None


@dataclass(frozen=True)
class Replicas:
    """A policy spread over the ranks: `model` is what the loop calls, `sharded` says that every forward is a
    collective; `gather_once`: it keeps its parameters gathered from a step's first micro-batch to its last."""

    model: nn.Module
    sharded: bool
    gather_once: bool = False

    @contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """Around the forward and backward of a micro-batch: gradients are reduced in the last one only. A sharded
        policy gathers its parameters in every micro-batch, because it holds them nowhere, unless `gather_once`."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
            self.model.set_reshard_after_backward(last or not self.gather_once)
        with self.model.no_sync() if isinstance(self.model, DistributedDataParallel) and not last else nullcontext():
            yield

    def reshard(self) -> None:
        """Give back what forwards without a backward left gathered (the root's parameters stay so by default)."""
        if self.sharded:
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


def spread(
    policy: Policy,
    blocks: Sequence[nn.Module],
    world: World,
    mesh: DeviceMesh | None,
    execution: Execution = Execution(),
    allocate: Callable[[torch.device], None] | None = None,
) -> Replicas:
    """The policy under DDP, or fully sharded over `mesh`, block by block. A block is moved to the device when it is
    sharded, so that no device ever holds the whole.

    With `allocate` the policy was built on the meta device: it is sharded while it has no memory, and each rank then
    allocates and initialises its shards (`materialise`), in numbers that no layout changes.

    Activation checkpointing and compilation wrap the blocks' `forward`, in this order, inside of FSDP's hooks, which
    belong to the module's call: a block's parameters are gathered before its compiled code runs, and are there when the
    backward pass runs it again. Parameter names don't change. Accelerate's FSDP2 plugin refuses CPUs, torch's own does
    not.
    """
    for block in blocks:
        block.forward = _block_forward(block.forward, execution)
    if mesh is None:
        if allocate is not None:
            allocate(torch.device("cpu"))
        return Replicas(world.accelerator.prepare_model(policy), sharded=False)
    # Inputs stay float32, as under autocast: a target rounded to bfloat16 falls into another of the 256 bins.
    bf16 = None if execution.precision == "no" else torch.bfloat16
    mixed = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=mixed, reshard_after_forward=not execution.gather_once)
    fully_shard(policy, mesh=mesh, mp_policy=mixed)
    if allocate is not None:
        allocate(world.device)
    for name in policy.samplers:
        register_fsdp_forward_method(policy, name)
    return Replicas(policy, sharded=True, gather_once=execution.gather_once)


def _block_forward(forward: Callable, execution: Execution) -> Callable:
    if execution.activation_checkpointing:
        forward = partial(checkpoint, forward, use_reentrant=False)
    return compiled(forward, execution.compile_backend) if execution.compile_backend else forward


def check_batch(global_batch_size: int, size: int) -> None:
    """Raises `UserError` naming the nearest rank counts and batches that fit where R doesn't divide B."""
    if global_batch_size % size == 0:
        return
    ranks = [r for r in range(1, global_batch_size + 1) if global_batch_size % r == 0]
    below = max((r for r in ranks if r < size), default=1)
    above = min((r for r in ranks if r > size), default=None)
    near = f"{below} or {above}" if above else str(below)
    fits = sorted({max(global_batch_size // size, 1) * size, (global_batch_size // size + 1) * size})
    raise UserError(
        f"a global batch of {global_batch_size} can't be shared by {size} ranks",
        where="trainer.global_batch_size",
        remedy=f"run {near} ranks, or set trainer.global_batch_size={' or '.join(map(str, fits))}",
    )


_COMPILED_SHAPES = 64
"""Of the blocks of a class, at most: what comes after them runs uncompiled."""


def compiled(forward: Callable, backend: str) -> Callable:
    """`forward`, compiled by `backend` when it is first called.

    Raises `UserError` for a backend that torch doesn't know and, in the call, where the backend fails: on CPU
    `inductor` needs a C++ compiler, and torch looks for it only then.
    """
    backends = torch.compiler.list_backends(exclude_tags=())
    if backend not in backends:
        raise UserError(
            f"torch has no compiler backend '{backend}'{did_you_mean(backend, backends)}",
            where="trainer.compile_backend",
            remedy=f"set it to one of {', '.join(torch.compiler.list_backends())}",
        )
    # Blocks of a class share what was compiled, once for each shape: a U-Net's have ten, in training and in validation.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILED_SHAPES)
    inner = torch.compile(forward, backend=backend)

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        except BackendCompilerFailed as error:
            raise UserError(
                f"the policy can't be compiled by '{backend}': {next(iter(str(error).splitlines()), '')}",
                where="trainer.compile",
                remedy="install a C++ compiler (apt-get install g++) or name it in CXX, or set trainer.compile=false; "
                "HYDRA_FULL_ERROR=1 shows all that the backend said",
            ) from error

    return call
