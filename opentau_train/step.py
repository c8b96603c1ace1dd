"""One optimizer step over one global batch: micro-batches x ranks, one set of denominators.

The counts of valid loss elements of the whole global batch are known from the masks, so they are summed over ranks
before the first forward, together with the flags that all ranks must agree on; each micro-batch then divides by the
same numbers. One rank with eight micro-batches and eight ranks with one give the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from opentau_train.config.settings import TrainerSettings
from opentau_train.data.load.stream import RankBatch
from opentau_train.distributed.parallel import Replicas
from opentau_train.distributed.watchdog import Place
from opentau_train.distributed.world import World
from opentau_train.errors import Fault, UserError
from opentau_train.models.noise import draw_noise
from opentau_train.models.policy import Policy
from opentau_train.optim import Ema, set_lr
from opentau_train.types import Batch, LossTerms


@dataclass
class TrainState:
    """What training changes: the policy's parameters, the optimizer's moments, the average, and two counters."""

    policy: Policy
    replicas: Replicas
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class StepResult:
    """`losses`: (group [B], terms) of this rank's micro-batches, still on the device; `grad_norm` before clipping;
    `num_substituted` over all ranks; `stop`: the highest stop code that any rank raised (0 = go on); `written`: every
    rank has said so; `taken` is False where a stop was asked for while a rank still waited for its data: nothing has
    changed."""

    losses: list[tuple[torch.Tensor, LossTerms]] = field(repr=False)
    grad_norm: float
    lr: float
    num_substituted: int
    stop: int
    written: bool = False
    taken: bool = True


def train_step(
    state: TrainState,
    part: RankBatch | None,
    world: World,
    settings: TrainerSettings,
    *,
    lr: float,
    max_samples: int,
    stop: int,
    place: Place,
    written: bool = False,
) -> StepResult:
    """Take one optimizer step on this rank's `part` of the global batch; every rank must call it.

    None as the `part`, with a `stop` code, says that this rank gave up waiting for its data: then no rank takes the
    step. `place` is told what goes on, for the watchdog. `written` says that this rank has written what it had to of a
    checkpoint in the background, and travels with the counts.

    A gradient norm that isn't finite, which all ranks see alike, skips the update: parameters, moments and average
    stay as they are while the data moves on. Raises on all ranks what any rank's stream raised.
    """
    weights = state.policy.loss_weights
    batch = None if part is None or part.batch is None else part.batch.to(world.device)
    place.enter("all-reduce of the counts")
    denominators, substituted, stop, all_written, taken = _agree(state.policy, batch, part, world, stop, written)
    if not taken:
        return StepResult([], float("nan"), lr, 0, stop, all_written, taken=False)
    assert batch is not None, "a part has a batch or an error, and _agree raises errors"
    micro_batches = list(batch.split(max_samples))
    place.enter("forward and backward")
    losses = []
    for i, micro in enumerate(micro_batches):
        noise = draw_noise(micro.key, 0, micro.actions.shape[1:])
        with state.replicas.accumulate(last=i == len(micro_batches) - 1), world.accelerator.autocast():
            terms = state.replicas.model(micro, noise)
        # Gradients are averaged over ranks; times their number that average is the sum over the global batch. A term
        # that nothing supervises has sum 0 and stays in, so that its head gets a gradient of 0: DDP waits for all.
        loss = world.data_size * sum(weights[k] * terms[k][0].sum() / (denominators[k] or 1.0) for k in weights)
        loss.backward()
        losses.append((micro.group, {k: (s.detach(), c) for k, (s, c) in terms.items()}))
    place.enter("gradient norm and update")
    grad_norm = _clip(state.policy, settings.grad_clip)
    _update(state, grad_norm, lr)
    return StepResult(losses, grad_norm, lr, substituted, stop, all_written)


def _agree(
    policy: Policy, batch: Batch | None, part: RankBatch | None, world: World, stop: int, written: bool
) -> tuple[dict[str, float], int, int, bool, bool]:
    """One all-reduce: each term's valid count in the global batch, substituted windows, failures, stop codes, ranks
    that have written, ranks without a part."""
    absent = part is None
    part = part or RankBatch(None)
    terms = list(policy.loss_weights)
    counts = {k: 0.0 for k in terms} if batch is None else policy.term_counts(batch)
    stops = [float(stop == code) for code in (1, 2)]
    # On the device: there NCCL reduces in a tree, while gloo's ring would take 2 (N - 1) hops in every step.
    head = [torch.as_tensor(counts[k], dtype=torch.float64, device=world.device).sum() for k in terms]
    flags = torch.tensor([part.num_substituted, part.error is not None, absent, written, *stops]).double()
    sums = world.sum(torch.stack([*head, *flags.to(world.device)])).tolist()
    *valid, substituted, failed, absences, writers, preempted, interrupted = sums
    if failed:
        raise next(error for error in world.gather(part.error) if error is not None)
    stop = 2 if interrupted else int(preempted > 0)
    return dict(zip(terms, valid, strict=True)), int(substituted), stop, writers == world.size, not absences


def _clip(policy: nn.Module, limit: float | None) -> float:
    """Clip to a global norm of `limit` and return the norm before."""
    norm = nn.utils.clip_grad_norm_(policy.parameters(), limit if limit is not None else float("inf"))
    whole: Callable | None = getattr(norm, "full_tensor", None)  # a sharded model's norm is a DTensor
    return float(norm if whole is None else whole())


def _update(state: TrainState, grad_norm: float, lr: float) -> None:
    if np.isfinite(grad_norm):
        set_lr(state.optimizer, lr)
        state.optimizer.step()
        if state.ema is not None:
            state.ema.update(state.policy)
        state.skipped_in_a_row = 0
    else:
        state.skipped += 1
        state.skipped_in_a_row += 1
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1


def check_health(
    state: TrainState, settings: TrainerSettings, bad: int, seen: int, max_fraction: float, grace: int
) -> None:
    """Stop a run that has gone wrong, on all ranks at the same step.

    Raises `Fault` after too many skipped steps in a row, `UserError` when too many windows can't be read.
    """
    if state.skipped_in_a_row >= settings.max_skipped_steps:
        raise Fault(
            f"the gradient norm was not finite in {state.skipped_in_a_row} steps in a row",
            where=f"step {state.step}",
            remedy="lower optimizer.lr, or look at the data of these steps",
        )
    if bad > grace and bad > max_fraction * seen:
        raise UserError(
            f"{bad} of {seen} windows could not be read (data.bad_samples.max_fraction={max_fraction})",
            where="quarantine.jsonl in the run directory names each with its cause",
            remedy="repair or exclude these episodes, or raise data.bad_samples.max_fraction",
        )
