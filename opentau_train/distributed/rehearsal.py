"""A policy run without memory, to see what training keeps of it.

In torch's fake tensors, which have shapes and types but no numbers, it runs a forward of blank samples, and what
autograd keeps for the backward pass is added up; its optimizer takes a step, and what it keeps by parameter is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opentau_train.config.optimizer import OptimizerSettings
from opentau_train.data.batch import Batch, blank_batch
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.models.draws import Draws
from opentau_train.models.policy import Policy
from opentau_train.optim import build_optimizer
from opentau_train.types import BatchSpec


def rehearse(make: Callable[[], Policy], mixture: Mixture, device_type: str) -> Rehearsal:
    """The policy that `make` builds, to be asked for what training it on batches of `mixture` keeps on a device.
    Raises `UserError`."""
    policy = sketch(make)
    return Rehearsal(policy, mixture.for_policy(policy.wants()).spec, device_type)


def sketch(make: Callable[[], Policy]) -> Policy:
    """The policy that `make` builds on the CPU, without memory unless its constructor needs it. Draws nothing from
    torch's generators."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return make()
        except RuntimeError:  # it asks a tensor for numbers, as it may where `meta_init` is False
            return make()


class Rehearsal:
    """A policy without memory, to be asked what training takes. `policy` may lie on the meta device, and isn't changed;
    `spec` is that of the batches it gets, `device_type` that of the device it is for, which must be there: kernels
    differ in what they keep. `notes` say what couldn't be known, and why."""

    def __init__(self, policy: Policy, spec: BatchSpec, device_type: str):
        self.notes: dict[str, str] = {}
        self.policy, self._spec, self._device = policy, spec, torch.device(device_type)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._kept: dict[tuple[int, bool, bool], tuple[int, int] | None] = {}
        self._states: dict[str, list[State] | None] = {}
        self._twins: dict[torch.dtype | None, Policy] = {}

    def activations(self, samples: int, low: bool, low_parameters: bool) -> tuple[int, int] | None:
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

    def optimizer_states(self, settings: OptimizerSettings) -> list[State] | None:
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
        for tensor in (*self.policy.parameters(), *self.policy.buffers()):
            is_parameter = isinstance(tensor, nn.Parameter)
            other = dtype is not None and is_parameter and tensor.is_floating_point()
            # A third of the time that empty_like takes of a tensor that isn't fake.
            fake = torch.empty_strided(
                tensor.shape, tensor.stride(), device=self._device, dtype=dtype if other else tensor.dtype
            )
            twins[id(tensor)] = nn.Parameter(fake.detach(), tensor.requires_grad) if is_parameter else fake
        # Copied with its tensors exchanged, not run itself: what a forward keeps in the module must not be fake.
        self._twins[dtype] = copy.deepcopy(self.policy, twins)
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
class State:
    """A tensor that an optimizer keeps for each of `num` parameters; where it `follows` them in shape, it is sharded as
    they are."""

    num: int
    shape: torch.Size
    element_size: int
    follows: bool


def _states(optimizer: torch.optim.Optimizer) -> list[State]:
    """What the optimizer keeps after a step. It takes one for the first of all parameters of a group that are alike."""
    alike: dict[tuple, list[Tensor]] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            alike.setdefault((number, parameter.shape, parameter.dtype), []).append(parameter)
    for first, *_ in alike.values():
        first.grad = torch.empty_like(first)
    optimizer.step()
    return [
        State(len(parameters), value.shape, value.element_size(), value.shape == parameters[0].shape)
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


def _num_bytes(storages: dict[int, torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages.values())
