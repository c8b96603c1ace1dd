"""From a module without memory to this rank's initialised part of it, one whole parameter at a time.

A policy built on torch's meta device and then sharded has shapes and shards, but no memory and no numbers. Here each
rank allocates its shards and runs the ordinary initialisation over them: where that draws for a sharded parameter, the
whole parameter is drawn on the CPU and this rank keeps its shard. So the numbers are those of one process, whatever the
layout, and a rank's memory peaks at its shards and one whole parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import TorchDispatchMode

from opentau_train.errors import UserError
from opentau_train.models.finetune import ADAPTER, set_aside


def materialise(
    module: nn.Module,
    device: torch.device,
    init_weights: Callable[[], None],
    given: Collection[str] = (),
    adapters: Sequence[str] = (),
) -> None:
    """Allocate `module`, built on the meta device, and initialise it: the `reset_parameters` of each module inside that
    has one, in the order of `modules()`, as torch's own layers do when they are built; then `init_weights`. Both
    meet the module as it is without `adapters` (`Policy.adapters`), which come last: it has the same numbers with them.

    Draws from torch's global generator of the CPU, the same numbers on every rank, but for the parameters and buffers
    `given`, which the caller fills from a file: billions of numbers that nobody would see. Raises `UserError` naming a
    parameter or buffer that neither sets.
    """
    module.to_empty(device=device)
    with torch.no_grad():
        for _, tensor in _floating(module):
            tensor.fill_(float("nan"))
    with set_aside(module, adapters) as layers:
        own = dict(chain(module.named_parameters(), module.named_buffers()))
        with _WholeDraws([tensor for name, tensor in own.items() if name in given]):
            for part in module.modules():
                reset = getattr(part, "reset_parameters", None)  # a convention of torch's layers, not of a class
                if reset is not None:
                    reset()
            init_weights()
            for layer in layers:
                layer.reset_lora_parameters(ADAPTER, True)
        for name, tensor in _floating(module):
            if name not in given and bool(_local(tensor).isnan().any()):
                raise UserError(
                    f"the policy's initialisation leaves {name} unset",
                    where="model",
                    remedy="set it in the policy's init_weights(), or leave meta_init at False",
                )


def _floating(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    tensors = chain(module.named_parameters(), module.named_buffers())
    return [(name, tensor.detach()) for name, tensor in tensors if tensor.is_floating_point()]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_of(tensor: torch.Tensor) -> tuple[torch.Tensor, Sequence[int]]:
    """This rank's part of `tensor`, sharing its memory, and the place of its first element in the whole."""
    if not isinstance(tensor, DTensor):
        return tensor, [0] * tensor.ndim
    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = tensor.to_local()
    assert local.shape == torch.Size(shape), (local.shape, shape)
    return local, offsets


class _WholeDraws(TorchDispatchMode):
    """Inside, `parameter.normal_()` and its like on a sharded parameter give it the shard of the whole draw. Torch by
    itself would draw each shard anew: other numbers for every layout. A bfloat16 parameter gets the rounded numbers of
    a float32 one, where torch would draw others. What is `given` gets none."""

    def __init__(self, given: Collection[torch.Tensor]):
        super().__init__()
        self.given = {id(tensor) for tensor in given}  # by what is the same in every layout

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        target = args[0] if args else None
        if torch.Tag.nondeterministic_seeded not in func.tags or not isinstance(target, Tensor):
            return func(*args, **(kwargs or {}))
        if func._schema.is_mutable and id(target) in self.given:
            return target
        rounded = target.dtype == torch.bfloat16
        if not rounded and not isinstance(target, DTensor):
            return func(*args, **(kwargs or {}))
        if not func._schema.is_mutable:
            if not isinstance(target, DTensor):
                return func(*args, **(kwargs or {}))
            raise UserError(
                f"the policy's initialisation draws by {func}, which makes a new tensor of a sharded one",
                where="model",
                remedy="fill parameters in place, with the functions of torch.nn.init or parameter.normal_()",
            )
        whole = torch.empty(target.shape, dtype=torch.float32 if rounded else target.dtype)
        func(whole, *args[1:], **(kwargs or {}))
        whole = whole.to(target.dtype)
        if not isinstance(target, DTensor):
            return target.copy_(whole)
        # Without a source rank nothing is sent: every rank has drawn the whole and cuts its shard out of it.
        target.copy_(distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None))
        return target
