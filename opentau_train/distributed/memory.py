"""What one rank's memory holds in training, by arithmetic, before any of it is there.

The parameters' shapes say what they, their gradients and their average take, the layout says which part of it a rank
has, and a `Rehearsal` shows what the optimizer and autograd keep.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opentau_train.config.settings import Settings
from opentau_train.distributed.parallel import data_parallel_degrees
from opentau_train.distributed.rehearsal import Rehearsal, State
from opentau_train.models.policy import Policy

log = logging.getLogger(__name__)

FULL = 0.9
"""The part of a device's memory that may be planned with: kernels' work space and the allocator's gaps come on top."""

PARTS = ("parameters", "gradients", "moments", "average", "gathered", "activations")


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank, those of the first, whose shards are the largest.

    `parameters`, with buffers; `gradients`; `moments`, all that the optimizer keeps; `average`, that of the weights;
    `gathered`, what a sharded policy has whole at a time; `activations`, what the backward pass of one micro-batch of
    `samples` needs. None: can't be known before the first step.
    """

    parameters: int
    gradients: int
    moments: int | None
    average: int
    gathered: int
    activations: int | None
    samples: int

    @property
    def parts(self) -> dict[str, int | None]:
        """{what: its bytes}"""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def total(self) -> int:
        """The sum of what is known."""
        return sum(size for size in self.parts.values() if size is not None)

    def __str__(self) -> str:
        cells = [f"{name} {text(size)}" for name, size in self.parts.items() if size != 0]
        at_least = "at least " if None in self.parts.values() else ""
        return f"{at_least}{text(self.total)} a rank: {', '.join(cells)} ({self.samples} samples at a time)"


def footprint(rehearsal: Rehearsal, settings: Settings, ranks: int) -> Footprint:
    """What each of `ranks` holds. Raises `UserError` where the layout that `settings` ask for isn't possible."""
    degrees, trainer = settings.parallelism, settings.trainer
    names = degrees.data_parallel_replicate_degree, degrees.data_parallel_shard_degree
    _, shard = data_parallel_degrees(*names, ranks)
    share = trainer.global_batch_size // ranks
    samples = min(settings.data.max_samples_per_batch or share, share)
    cap = settings.data.max_num_tokens_after_packing
    if cap != -1:  # as many tokens as so many padded samples have
        samples = min(samples, math.ceil(cap / rehearsal.policy.padded_tokens))
    low = trainer.precision != "no"
    kept = rehearsal.activations(samples, low, low and shard > 1)
    parameters = list(rehearsal.policy.parameters())
    trained = [p for p in parameters if p.requires_grad]
    gradients = sum(_shard_bytes(p, shard) for p in trained)
    if shard > 1 and share > samples:  # they add up whole, in float32, until the last micro-batch
        gradients += sum(4 * p.numel() for p in trained)
    states = rehearsal.optimizer_states(settings.optimizer)
    return Footprint(
        parameters=sum(_shard_bytes(p, shard) for p in parameters) + sum(b.nbytes for b in rehearsal.policy.buffers()),
        gradients=gradients,
        moments=None if states is None else sum(_state_bytes(state, shard) for state in states),
        average=sum(4 * _shard_numel(p.shape, shard) for p in trained) if trainer.has_ema else 0,
        gathered=_gathered(rehearsal.policy, low, degrees.gather_once) if shard > 1 else 0,
        activations=None if kept is None else kept[degrees.activation_checkpointing],
        samples=samples,
    )


def saved_bytes(rehearsal: Rehearsal, settings: Settings, borrowed: Collection[str]) -> int | None:
    """What a checkpoint takes, without the parameters that it leaves out: the policy's state, once more by itself, the
    moments and the average. None where the moments aren't known."""
    policy, states = rehearsal.policy, rehearsal.optimizer_states(settings.optimizer)
    model = sum(t.nbytes for name, t in policy.state_dict().items() if name not in set(borrowed))
    average = sum(4 * p.numel() for p in policy.parameters() if p.requires_grad and settings.trainer.has_ema)
    return None if states is None else 2 * model + average + sum(_state_bytes(state, 1) for state in states)


def remedies(rehearsal: Rehearsal, settings: Settings, ranks: int, limit: float) -> dict[str, Footprint]:
    """{arguments that take less memory: what a rank then holds}, each by itself; `limit` bytes are to be kept."""
    now = footprint(rehearsal, settings, ranks)
    degrees = replace(settings.parallelism, data_parallel_replicate_degree=1, data_parallel_shard_degree=-1)
    checkpointing = replace(settings.parallelism, activation_checkpointing=True)
    changed = {
        "parallelism=fsdp": replace(settings, parallelism=degrees),
        "parallelism.activation_checkpointing=true": replace(settings, parallelism=checkpointing),
    }
    if settings.trainer.precision == "no":
        trainer = replace(settings.trainer, precision="bf16")
        changed["trainer.precision=bf16"] = replace(settings, trainer=trainer)
    if now.samples > 1:
        samples = _samples_within(rehearsal, settings, ranks, limit)
        data = replace(settings.data, max_samples_per_batch=samples)
        changed[f"data.max_samples_per_batch={samples}"] = replace(settings, data=data)
    then = {argument: footprint(rehearsal, other, ranks) for argument, other in changed.items()}
    return {argument: less for argument, less in then.items() if less.total < now.total}


def _samples_within(rehearsal: Rehearsal, settings: Settings, ranks: int, limit: float) -> int:
    """The most samples at a time, fewer than now, with which a rank holds at most `limit` bytes; 1 where none do.
    Memory grows by the same with each sample."""

    def total(samples: int) -> int:
        data = replace(settings.data, max_samples_per_batch=samples)
        return footprint(rehearsal, replace(settings, data=data), ranks).total

    most = footprint(rehearsal, settings, ranks).samples - 1
    slope = (total(most) - total(1)) / max(1, most - 1)
    return most if slope <= 0 else max(1, min(most, 1 + math.floor((limit - total(1)) / slope)))


def _gathered(policy: Policy, low: bool, all_at_once: bool) -> int:
    """Bytes that a sharded policy has whole: the parameters outside of blocks, and two blocks, of which one is on
    its way while the other computes, or all; and the gradients of one unit, which are reduced in float32."""
    blocks = [list(block.parameters()) for block in policy.blocks()]
    inside = {id(p) for block in blocks for p in block}
    root = [p for p in policy.parameters() if id(p) not in inside]

    def size(unit: Sequence[Tensor]) -> int:
        return sum(p.numel() * (2 if low else p.element_size()) for p in unit)

    largest = sorted((size(block) for block in blocks), reverse=True)
    held = size(root) + sum(largest if all_at_once else largest[:2])
    trained = ([p for p in unit if p.requires_grad] for unit in (root, *blocks))
    return held + max(size(unit) + sum(4 * p.numel() for p in unit) for unit in trained)


def memory_of(device: torch.device) -> int | None:
    """Bytes that an accelerator has; None of a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def name_of(device: torch.device) -> str:
    """A device in words, with its memory."""
    has = memory_of(device)
    return str(device) if has is None else f"{torch.cuda.get_device_name(device)} with {text(has)}"


def announce(rehearsal: Rehearsal, settings: Settings, ranks: int, device: torch.device) -> None:
    """Log what couldn't be known of a rank's memory, and what to do where the device hasn't as much as it takes."""
    for note in rehearsal.notes.values():
        log.info("%s", note)
    has = memory_of(device)
    warning = None if has is None else shortage(rehearsal, settings, ranks, has)
    if warning is not None:
        log.warning("%s", warning)


def shortage(rehearsal: Rehearsal, settings: Settings, ranks: int, has: int) -> str | None:
    """What a rank needs beyond `FULL` of the `has` bytes of its device, and which arguments change it; None where
    nothing is lacking."""
    needs = footprint(rehearsal, settings, ranks).total
    if needs <= FULL * has:
        return None
    less = sorted(remedies(rehearsal, settings, ranks, FULL * has).items(), key=lambda item: item[1].total)
    known = [f"{argument} ({text(then.total)})" for argument, then in less]
    sizes = [(p.numel(), p.requires_grad) for p in rehearsal.policy.parameters()]
    if 2 * sum(size for size, trains in sizes if trains) > sum(size for size, _ in sizes):
        known.append("finetune=lora")
    return (
        f"a rank needs {text(needs)}, more than {FULL:.0%} of a device's {text(has)}, and may run out of memory. "
        f"Each by itself takes less: {', '.join(known) or 'more ranks with parallelism=fsdp'}"
    )


def text(size: int | None) -> str:
    """Bytes as people write them."""
    if not size:
        return "0" if size == 0 else "unknown"
    value, unit = (size / 2**30, "GiB") if size >= 2**30 else (size / 2**20, "MiB")
    return f"{value:.{1 if value >= 10 else 2}f} {unit}"


def _shard_numel(shape: Sequence[int], shard: int) -> int:
    """Elements of the largest of `shard` parts along the first axis, which all ranks allocate (torch pads the last)."""
    return math.ceil(shape[0] / shard) * math.prod(shape[1:]) if shape else 1


def _state_bytes(state: State, shard: int) -> int:
    return state.num * state.element_size * _shard_numel(state.shape, shard if state.follows else 1)


def _shard_bytes(tensor: Tensor, shard: int) -> int:
    return tensor.element_size() * _shard_numel(tensor.shape, shard)
