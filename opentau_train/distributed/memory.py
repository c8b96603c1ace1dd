"""What one rank's memory holds in training, by arithmetic, before any of it is there.

The policy is rehearsed without memory: in torch's fake tensors, which have shapes and types but no numbers, it runs a
forward of blank samples, and what autograd keeps for the backward pass is added up; its optimizer takes a step, and
what it keeps by parameter is. The rest follows from the parameters' shapes and how they are spread over the ranks.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opentau_train.config.settings import OptimizerSettings, Settings
from opentau_train.data.batch import Batch, blank_batch
from opentau_train.distributed.parallel import data_parallel_degrees
from opentau_train.models.draws import Draws
from opentau_train.models.policy import Policy
from opentau_train.optim import build_optimizer
from opentau_train.types import BatchSpec

log = logging.getLogger(__name__)

FULL = 0.9
"""The part of a device's memory that may be planned with: kernels' work space and the allocator's gaps come on top."""

PARTS = ("parameters", "gradients", "moments", "average", "gathered", "activations")


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank, those of the first, whose shards are the largest.

    `parameters`, with buffers; `gradients`; `moments`, all that the optimizer keeps; `average` (`trainer.ema_decay`);
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
        return f"{', '.join(cells)} ({self.samples} samples at a time) = {at_least}{text(self.total)}"


class Rehearsal:
    """A policy without memory, to be asked what training takes. `policy` may lie on the meta device, and isn't changed;
    `spec` is that of the batches it gets, `device_type` that of the device it is for, which must be there: kernels
    differ in what they keep. `notes` say what couldn't be known, and why."""

    def __init__(self, policy: Policy, spec: BatchSpec, device_type: str):
        self.notes: dict[str, str] = {}
        self._policy, self._spec, self._device = policy, spec, torch.device(device_type)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._kept: dict[tuple[int, bool, bool], tuple[int, int] | None] = {}
        self._states: dict[str, list[_State] | None] = {}
        self._twins: dict[torch.dtype | None, Policy] = {}

    @property
    def all_train(self) -> bool:
        """Whether the policy has no frozen parameter."""
        return all(p.requires_grad for p in self._policy.parameters())

    def footprint(self, settings: Settings, ranks: int) -> Footprint:
        """What each of `ranks` holds. Raises `UserError` where the layout that `settings` ask for isn't possible."""
        degrees, trainer = settings.parallelism, settings.trainer
        names = degrees.data_parallel_replicate_degree, degrees.data_parallel_shard_degree
        _, shard = data_parallel_degrees(*names, ranks)
        share = trainer.global_batch_size // ranks
        samples = min(settings.data.max_samples_per_batch or share, share)
        low = trainer.precision != "no"
        kept = self._activations(samples, low, low and shard > 1)
        parameters = list(self._policy.parameters())
        trained = [p for p in parameters if p.requires_grad]
        gradients = sum(_shard_bytes(p, shard) for p in trained)
        if shard > 1 and share > samples:  # they add up whole, in float32, until the last micro-batch
            gradients += sum(4 * p.numel() for p in trained)
        states = self._optimizer_states(settings.optimizer)
        return Footprint(
            parameters=sum(_shard_bytes(p, shard) for p in parameters) + sum(b.nbytes for b in self._policy.buffers()),
            gradients=gradients,
            moments=None if states is None else sum(state.num_bytes(shard) for state in states),
            average=0 if trainer.ema_decay is None else sum(4 * _shard_numel(p.shape, shard) for p in trained),
            gathered=self._gathered(low, degrees.gather_once) if shard > 1 else 0,
            activations=None if kept is None else kept[degrees.activation_checkpointing],
            samples=samples,
        )

    def remedies(self, settings: Settings, ranks: int, limit: float) -> dict[str, Footprint]:
        """{arguments that take less memory: what a rank then holds}, each by itself; `limit` bytes are to be kept."""
        now = self.footprint(settings, ranks)
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
            samples = self._samples_within(settings, ranks, limit)
            data = replace(settings.data, max_samples_per_batch=samples)
            changed[f"data.max_samples_per_batch={samples}"] = replace(settings, data=data)
        then = {argument: self.footprint(other, ranks) for argument, other in changed.items()}
        return {argument: less for argument, less in then.items() if less.total < now.total}

    def _samples_within(self, settings: Settings, ranks: int, limit: float) -> int:
        """The most samples at a time, fewer than now, with which a rank holds at most `limit` bytes; 1 where none do.
        Memory grows by the same with each sample."""

        def total(samples: int) -> int:
            data = replace(settings.data, max_samples_per_batch=samples)
            return self.footprint(replace(settings, data=data), ranks).total

        most = self.footprint(settings, ranks).samples - 1
        slope = (total(most) - total(1)) / max(1, most - 1)
        return most if slope <= 0 else max(1, min(most, 1 + math.floor((limit - total(1)) / slope)))

    def _gathered(self, low: bool, all_at_once: bool) -> int:
        """Bytes that a sharded policy has whole: the parameters outside of blocks, and two blocks, of which one is on
        its way while the other computes, or all; and the gradients of one unit, which are reduced in float32."""
        blocks = [list(block.parameters()) for block in self._policy.blocks()]
        inside = {id(p) for block in blocks for p in block}
        root = [p for p in self._policy.parameters() if id(p) not in inside]

        def size(unit: Sequence[Tensor]) -> int:
            return sum(p.numel() * (2 if low else p.element_size()) for p in unit)

        largest = sorted((size(block) for block in blocks), reverse=True)
        held = size(root) + sum(largest if all_at_once else largest[:2])
        trained = ([p for p in unit if p.requires_grad] for unit in (root, *blocks))
        return held + max(size(unit) + sum(4 * p.numel() for p in unit) for unit in trained)

    def _activations(self, samples: int, low: bool, low_parameters: bool) -> tuple[int, int] | None:
        """What a forward of `samples` keeps, with `low` under autocast to bfloat16, with `low_parameters` of parameters
        that come in bfloat16, as FSDP gathers them."""
        asked = samples, low, low_parameters
        if asked not in self._kept:
            self._kept[asked] = None
            with self._noting("activations"):
                self._kept[asked] = self._forward(*asked)
        return self._kept[asked]

    def _forward(self, samples: int, low: bool, low_parameters: bool) -> tuple[int, int]:
        # A compiled part would be compiled for fakes, and kept so.
        with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices=[]), self._mode, _All():
            policy = self._twin(torch.bfloat16 if low_parameters else None)
            batch = self._blank(samples)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=low):
                plain, checkpointed = kept_for_backward(policy, batch, BlankDraws(batch.key))
        # Autocast holds the matrices that it has cast until the forward is over, whoever computes again.
        matrices = [p for block in policy.blocks() for p in block.parameters() if p.ndim > 1 and p.requires_grad]
        cast = sum(2 * p.numel() for p in matrices if p.dtype == torch.float32) if low else 0
        return plain, min(plain, checkpointed + cast)

    def _optimizer_states(self, settings: OptimizerSettings) -> list[_State] | None:
        """What the optimizer keeps after a step."""
        asked = repr(settings)
        if asked not in self._states:
            self._states[asked] = None
            with self._noting("moments"), self._mode:
                self._states[asked] = _states(build_optimizer(self._twin(), settings))
        return self._states[asked]

    def _twin(self, dtype: torch.dtype | None = None) -> Policy:
        """The policy of fake tensors, its parameters of `dtype`."""
        if dtype in self._twins:
            return self._twins[dtype]
        twins: dict[int, Tensor] = {}
        for tensor in (*self._policy.parameters(), *self._policy.buffers()):
            is_parameter = isinstance(tensor, nn.Parameter)
            other = dtype is not None and is_parameter and tensor.is_floating_point()
            # A third of the time that empty_like takes of a tensor that isn't fake.
            fake = torch.empty_strided(
                tensor.shape, tensor.stride(), device=self._device, dtype=dtype if other else tensor.dtype
            )
            twins[id(tensor)] = nn.Parameter(fake.detach(), tensor.requires_grad) if is_parameter else fake
        # Copied with its tensors exchanged, not run itself: what a forward keeps in the module must not be fake.
        self._twins[dtype] = copy.deepcopy(self._policy, twins)
        return self._twins[dtype]

    def _blank(self, samples: int) -> Batch:
        """A batch of `samples`, laid out in memory as real ones are."""
        batch = blank_batch(self._spec).each(
            lambda t: torch.empty_like(self._mode.from_tensor(t).expand(samples, *t.shape[1:]), device=self._device)
        )
        return batch.replace(**{n: v * samples for n, v in batch.values.items() if isinstance(v, list)})

    @contextmanager
    def _noting(self, part: str) -> Iterator[None]:
        """What asks a tensor for its numbers (`.item()`, `.numpy()`, `if tensor:`), or can't be copied, can't be
        rehearsed, and is noted; a mistake of the policy's own says so in the first step."""
        try:
            yield
        except (RuntimeError, TypeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            self.notes[part] = f"{part} can't be known before the first step: they depend on numbers ({reason})"


@dataclass(frozen=True)
class _State:
    """A tensor that an optimizer keeps for each of `num` parameters; where it `follows` them in shape, it is sharded as
    they are."""

    num: int
    shape: torch.Size
    element_size: int
    follows: bool

    def num_bytes(self, shard: int) -> int:
        return self.num * self.element_size * _shard_numel(self.shape, shard if self.follows else 1)


def _states(optimizer: torch.optim.Optimizer) -> list[_State]:
    """What the optimizer keeps after a step. It takes one for the first of all parameters of a group that are alike."""
    alike: dict[tuple, list[Tensor]] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            alike.setdefault((number, parameter.shape, parameter.dtype), []).append(parameter)
    for first, *_ in alike.values():
        first.grad = torch.empty_like(first)
    optimizer.step()
    return [
        _State(len(parameters), value.shape, value.element_size(), value.shape == parameters[0].shape)
        for parameters in alike.values()
        for value in optimizer.state[parameters[0]].values()
        if isinstance(value, Tensor)
    ]


def kept_for_backward(policy: Policy, batch: Batch, draws: Draws) -> tuple[int, int]:
    """Run a forward and add up the bytes that autograd saves in it: (without, with activation checkpointing). Each
    piece of memory counts once, parameters and buffers apart.

    With activation checkpointing they are what is saved outside of the blocks, what the blocks take in, and the inside
    of the one that is computed again.
    """
    own = {t.untyped_storage()._cdata for t in (*policy.parameters(), *policy.buffers())}
    blocks = policy.blocks()
    storages: list[dict[int, torch.UntypedStorage]] = [{} for _ in range(len(blocks) + 1)]  # the last: outside of all
    at = [len(blocks)]

    def keep(values: Iterable[object], where: int) -> None:
        for value in values:
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in own:
                storages[where][value.untyped_storage()._cdata] = (
                    value.untyped_storage()
                )  # held: its number stays its own

    def save(tensor: Tensor) -> Tensor:
        keep([tensor], at[-1])
        return tensor

    handles = []
    inputs: list[object] = []
    for number, block in enumerate(blocks):

        def enter(_: nn.Module, args: tuple, kwargs: dict, number: int = number) -> None:
            inputs.extend(tree_leaves((args, kwargs)))
            at.append(number)

        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(block.register_forward_hook(lambda *_: (at.pop(), None)[1]))
    try:
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            terms = policy(batch, draws)
            sum(weight * terms[name][0].sum() for name, weight in policy.loss_weights.items())
    finally:
        for handle in handles:
            handle.remove()
    *inside, outside = storages
    plain = _num_bytes({key: storage for part in storages for key, storage in part.items()})
    keep(inputs, len(blocks))
    again = max((_num_bytes({k: s for k, s in part.items() if k not in outside}) for part in inside), default=0)
    return plain, _num_bytes(outside) + again


class BlankDraws(Draws):
    """Draws of the right shapes and types and of no certain numbers."""

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        return torch.empty(len(self.keys), *shape, device=self.keys.device)

    def bits(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        return torch.empty(len(self.keys), *shape, dtype=torch.int32, device=self.keys.device)


class _All(TorchDispatchMode):
    """Inside, a selection by a mask takes all that there is: how much it takes of real data lies in their numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.nonzero.default:
            (mask,) = args
            return torch.empty((mask.numel(), mask.ndim), dtype=torch.int64, device=mask.device)
        if func in _INDEXING:
            values, indices, *others = args
            args = values, [place for index in indices for place in _places(index)], *others
        return func(*args, **(kwargs or {}))


_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


def _places(index: Tensor | None) -> Sequence[Tensor | None]:
    """An index of torch's, as a mask that is True everywhere where it is a mask: a tensor of places for each axis."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return torch.empty((index.numel(), index.ndim), dtype=torch.int64, device=index.device).unbind(1)


def announce(rehearsal: Rehearsal, settings: Settings, ranks: int, device: torch.device) -> None:
    """Log what a rank's memory will hold, and what to do where the device hasn't as much."""
    has = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    log.info(
        "memory of a rank: %s%s",
        rehearsal.footprint(settings, ranks),
        "" if has is None else f"; the device has {text(has)}",
    )
    for note in rehearsal.notes.values():
        log.info("%s", note)
    warning = None if has is None else shortage(rehearsal, settings, ranks, has)
    if warning is not None:
        log.warning("%s", warning)


def shortage(rehearsal: Rehearsal, settings: Settings, ranks: int, has: int) -> str | None:
    """What a rank needs beyond `FULL` of the `has` bytes of its device, and which arguments change it; None where
    nothing is lacking."""
    needs = rehearsal.footprint(settings, ranks).total
    if needs <= FULL * has:
        return None
    less = sorted(rehearsal.remedies(settings, ranks, FULL * has).items(), key=lambda item: item[1].total)
    known = [f"{argument} ({text(then.total)})" for argument, then in less]
    known += ["finetune=lora"] if rehearsal.all_train else []
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


def _shard_bytes(tensor: Tensor, shard: int) -> int:
    return tensor.element_size() * _shard_numel(tensor.shape, shard)


def _num_bytes(storages: dict[int, torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages.values())
