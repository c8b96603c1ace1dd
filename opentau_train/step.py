"""One optimizer step over one global batch: micro-batches x ranks, one set of denominators.

The counts of supervised loss elements of the whole global batch are known from the masks, and agreed on by all ranks
before the first forward (`distributed.consensus`); each micro-batch divides by the same numbers. One rank with eight
micro-batches and eight ranks with one give the same gradient.

Nothing here reads from the device: the host runs ahead of it, and a step's results stay there until they are logged.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from opentau_train import rng
from opentau_train.config.data import BadSampleSettings
from opentau_train.data.batch import Batch
from opentau_train.distributed.parallel import Replicas
from opentau_train.distributed.performance import ForwardFlops, Stamp
from opentau_train.distributed.watchdog import Progress
from opentau_train.distributed.world import World
from opentau_train.errors import Fault, UserError
from opentau_train.models.average import Ema
from opentau_train.models.draws import Draws
from opentau_train.models.packing.cut import blanked, micro_batches
from opentau_train.models.policy import Policy
from opentau_train.optim import set_lr
from opentau_train.types import LossTerms


@dataclass
class TrainState:
    """What training changes: the policy's parameters, the optimizer's moments, the average, the number of steps, and
    how many of them left the update out: `skipped` [2] int64 on the device, in all and in a row up to now."""

    policy: Policy
    replicas: Replicas
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    step: int = 0
    skipped: torch.Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))


@dataclass(frozen=True)
class StepSetup:
    """How every step of a run is taken: at most `max_samples` and `max_tokens` (-1: any number; of a batch that is
    `counted`) in a micro-batch, gradients clipped to a global norm of `grad_clip`; `seed` is that of a policy's ambient
    randomness; `progress` records the part of the step, for the watchdog; `flops` counts operations, None: not."""

    world: World
    max_samples: int
    grad_clip: float | None
    seed: int
    progress: Progress = field(default_factory=Progress)
    flops: ForwardFlops | None = None
    max_tokens: int = -1


@dataclass(frozen=True)
class StepTaken:
    """The results of a step, still on the device: `losses`, (group [B], terms) of each of this rank's micro-batches,
    whose samples are, one after the other, the `rows` [B] of its batch; `grad_norm` [] f32 before clipping. `stamps`:
    before the forward, after the backward, after the update."""

    losses: list[tuple[torch.Tensor, LossTerms]] = field(repr=False)
    rows: torch.Tensor = field(repr=False)
    grad_norm: torch.Tensor
    lr: float
    stamps: tuple[Stamp, Stamp, Stamp] = field(repr=False)


def train_step(
    state: TrainState, batch: Batch, counts: Mapping[str, float], lr: float, setup: StepSetup, most: int = 0
) -> StepTaken:
    """Take one optimizer step on this rank's `batch` of the global batch; every rank must call it.

    `counts` {term: supervised loss elements of the global batch, each times its sample's weight}; `most` micro-batches
    has any rank: a rank of fewer adds blank ones where the policy is sharded, whose every forward is a collective. A
    global gradient norm that isn't finite, which all ranks see alike, leaves the update out: parameters, moments and
    average stay as they are, bit for bit.
    """
    world, weights = setup.world, state.policy.loss_weights
    begun = Stamp(world.device)
    setup.progress.enter("forward and backward")
    rows = micro_batches(batch, setup.max_samples, setup.max_tokens)
    num, losses = max(len(rows), most if state.replicas.sharded else 0), []
    for i in range(num):
        blank = i >= len(rows)
        micro = blanked(batch) if blank else batch.rows(rows[i])
        seed_ambient(rng.key(setup.seed, "ambient", state.step, world.rank, i))
        draws = Draws(micro.key)
        counting = nullcontext() if setup.flops is None else setup.flops.counting(len(micro))
        accumulate = state.replicas.accumulate(last=i == num - 1)
        with accumulate, world.accelerator.autocast(), counting:
            terms = weighted(state.replicas.model(micro, draws), micro.weight)
        # Gradients are averaged over ranks; times their number that average is the sum over the global batch. A term
        # that nothing supervises has sum 0 and stays in, so that its head gets a gradient of 0: DDP waits for all.
        loss = world.data_size * sum(weights[k] * terms[k][0].sum() / (counts[k] or 1.0) for k in weights)
        assert isinstance(loss, torch.Tensor), "a policy has a loss term"
        loss.backward()
        if not blank:
            losses.append((micro.group, {k: (s.detach(), c) for k, (s, c) in terms.items()}))
    differentiated = Stamp(world.device)
    setup.progress.enter("gradient norm and update")
    grad_norm = _clip(state.policy, setup.grad_clip)
    _update(state, torch.isfinite(grad_norm), lr)
    order = torch.cat([torch.arange(len(batch))[index] for index in rows])
    return StepTaken(losses, order, grad_norm, lr, (begun, differentiated, Stamp(world.device)))


def weighted(terms: LossTerms, weight: torch.Tensor) -> LossTerms:
    """The terms with each sample's sum and count times its `weight` [B]: a mean over them weighs the samples."""
    return {name: (sums * weight, count * weight) for name, (sums, count) in terms.items()}


def seed_ambient(key: int) -> None:
    """Make randomness that has no key of its own (nn.Dropout) a function of `key`, 64 bits: seeds torch's generators on
    all devices, and NumPy's and Python's global ones."""
    torch.manual_seed(key >> 1)  # some devices' generators take 63 bits
    np.random.seed(key & 0xFFFFFFFF)
    random.seed(key)


def _clip(policy: nn.Module, limit: float | None) -> torch.Tensor:
    """Clip to a global norm of `limit` and return the norm before, [] f32 on the device."""
    norm = nn.utils.clip_grad_norm_(policy.parameters(), limit if limit is not None else float("inf"))
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm  # a sharded model's is made of the shards'
    return whole.float()


def _update(state: TrainState, finite: torch.Tensor, lr: float) -> None:
    """The update where `finite` [] bool, and none where not: decided on the device, wherever the optimizer can."""
    set_lr(state.optimizer, lr)
    if all(group.get("fused") for group in state.optimizer.param_groups):
        # As for torch's GradScaler: where it is 1, the fused kernels write nothing.
        state.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        state.optimizer.step()
    elif finite:  # this reads from the device: an optimizer without such kernels can't be called in vain
        state.optimizer.step()
    if state.ema is not None:
        state.ema.update(state.policy, finite, step=state.step)
    state.optimizer.zero_grad(set_to_none=True)
    skip = (~finite).long()
    in_all, in_a_row = state.skipped.to(skip.device)
    state.skipped = torch.stack([in_all + skip, (in_a_row + 1) * skip])
    state.step += 1


def check_skipped(step: int, in_a_row: int, limit: int) -> None:
    """Raises `Fault`, on all ranks alike, where `limit` steps in a row had no finite gradient."""
    if in_a_row >= limit:
        raise Fault(
            f"the gradient norm was not finite in {in_a_row} steps in a row",
            where=f"step {step}",
            remedy="lower optimizer.lr, or look at the data of these steps",
        )


def check_windows(bad: int, seen: int, limits: BadSampleSettings, remedy: Callable[[], str] = str) -> None:
    """Raises `UserError`, on all ranks alike, where more of the windows `seen` can't be read than `limits` allow.
    `remedy` gives what their causes call for, "" where they don't tell."""
    if bad > limits.grace and bad > limits.max_fraction * seen:
        raise UserError(
            f"{bad} of {seen} windows could not be read (data.bad_samples.max_fraction={limits.max_fraction})",
            where="quarantine.jsonl in the run directory names each with its cause",
            remedy=remedy() or "repair or exclude these episodes, or raise data.bad_samples.max_fraction",
        )
