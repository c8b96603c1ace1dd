"""The validation pass: one list of windows over the whole mixture, equal shares for all ranks, one all-reduce.

The losses are grouped here, from the windows' own addresses; the policy's `forward` knows nothing of datasets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from opentau_train.config import ValidationSettings
from opentau_train.data.mixture import Mixture
from opentau_train.data.stream import Parts, loader
from opentau_train.data.tape import Windows
from opentau_train.data.windows import equal_spans, validation_windows
from opentau_train.distributed import World
from opentau_train.metrics import Sums, validation_row
from opentau_train.models.policy import Policy
from opentau_train.parallel import Replicas
from opentau_train.step import draw_noise
from opentau_train.stopping import Patient, StopFlag, Stopped
from opentau_train.types import Batch
from opentau_train.watchdog import Place

MAX_DECODE_GAP = 32
"""Frames: a larger gap inside an episode costs a seek, about this many frames' decoding at the usual GOP."""


@dataclass(frozen=True)
class ValidationPlan:
    """What a pass reads, the same on every rank.

    `windows` in reading order, `t` being the place in the list; `item` [N] i64 each window's episode as a row of the
    sums, `group_of` [E] i64 the rows' groups; `bounds` [R+1] i64 the ranks' contiguous spans.
    """

    mixture: Mixture
    windows: Windows
    item: NDArray[np.int64]
    group_of: NDArray[np.int64]
    bounds: NDArray[np.int64]
    batch_size: int

    @property
    def num_rounds(self) -> int:
        """Forwards of the busiest rank, per noise draw."""
        return max(self.num_rounds_of(r) for r in range(len(self.bounds) - 1))

    def num_rounds_of(self, rank: int) -> int:
        return -int(-(self.bounds[rank + 1] - self.bounds[rank]) // self.batch_size)

    def for_worker(self, rank: int, worker: int, num_workers: int) -> Iterator[Windows]:
        """The batches of a worker: a contiguous run of its rank's, so that it decodes each frame once."""
        low, high = self.bounds[rank : rank + 2]
        starts = np.arange(low, high, self.batch_size)
        for start in np.array_split(starts, num_workers)[worker]:
            yield self.windows.select(np.arange(start, min(start + self.batch_size, high)))


def plan_validation(
    mixture: Mixture, settings: ValidationSettings, *, batch_size: int, num_ranks: int
) -> ValidationPlan:
    """List the held-out windows and cut the list into spans of equal decode cost."""
    datasets = mixture.datasets
    dataset, episode, frame = validation_windows(
        [d.validation for d in datasets], [d.group_of for d in datasets], settings.max_samples_per_group
    )
    first = np.ones(len(dataset), bool)
    first[1:] = (dataset[1:] != dataset[:-1]) | (episode[1:] != episode[:-1])
    gap = np.where(first, MAX_DECODE_GAP, np.minimum(np.diff(frame, prepend=0), MAX_DECODE_GAP))
    group_of = [datasets[d].group_of[e] for d, e in zip(dataset[first], episode[first], strict=True)]
    zeros = np.zeros(len(dataset), np.int64)
    return ValidationPlan(
        mixture=mixture,
        windows=Windows(np.arange(len(dataset)), zeros, dataset, zeros, episode, frame),
        item=np.cumsum(first) - 1,
        group_of=np.array(group_of, np.int64),
        bounds=equal_spans(1.0 + np.maximum(gap, 1), num_ranks),
        batch_size=settings.batch_size or batch_size,
    )


@torch.no_grad()
def validate(
    policy: Policy,
    replicas: Replicas,
    plan: ValidationPlan,
    world: World,
    settings: ValidationSettings,
    prefix: str = "Validation",
    stop: StopFlag | None = None,
    place: Place | None = None,
) -> dict[str, float]:
    """One pass; every rank must call it and gets the same row of tags (see `metrics.validation_row`).

    `stop` asks a rank to leave out the rest of its windows; `place` is told of every batch, for the watchdog. Raises on
    all ranks the `UserError` of a window that any rank couldn't read, and `Stopped` when any rank left some out.
    Ambient random state is untouched.
    """
    stop, place = stop or StopFlag(), place or Place()
    terms = tuple(policy.loss_weights)
    sums = Sums(len(plan.group_of), terms)
    seen = torch.zeros(len(plan.group_of), dtype=torch.float64)
    data = plan.mixture.settings
    parts = Parts(plan.mixture, lambda worker, width: plan.for_worker(world.rank, worker, width), train=False)
    error, halted, filler = None, False, None
    own = plan.num_rounds_of(world.rank)
    was_training = policy.training
    policy.eval()
    with closing(Patient(iter(loader(parts, data.num_workers, data.prefetch_factor)))) as patient:
        # A sharded forward is a collective: a rank without windows of its own takes part in the others' with weight 0.
        for number in range(plan.num_rounds if replicas.sharded else own):
            place.enter("validation")
            part = patient.next(stop) if number < own else None
            error = part.error if part is not None else None
            halted = error is not None or stop.poll() > 0
            if replicas.sharded:  # for the same reason all ranks leave the pass in the same round
                halted = bool(world.sum(torch.tensor([float(halted)])).item())
            if halted:
                break
            filler = _idle(filler or plan_first_batch(plan)) if part is None else part.batch
            item = torch.from_numpy(plan.item[part.t]) if part is not None else torch.zeros(len(filler)).long()
            seen.index_add_(0, item, (filler.weight > 0).double().cpu())
            _forward(policy, filler, item, sums, world, settings.num_noise_draws)
    policy.train(was_training)
    place.enter("all-reduce of the validation")
    flags = [error is not None, halted and stop.code == 1, halted and stop.code == 2]
    packed = world.sum(torch.cat([sums.values.flatten(), seen, torch.tensor(flags).double()]))
    failed, preempted, interrupted = packed[-3:].tolist()
    if failed:
        raise next(e for e in world.gather(error) if e is not None)
    if preempted or interrupted:
        raise Stopped(2 if interrupted else 1)
    num = sums.values.numel()
    values, windows = packed[:num].view_as(sums.values).numpy(), packed[num:-3].numpy()
    if windows.sum() != len(plan.windows):
        raise RuntimeError(f"validation saw {windows.sum():.0f} windows of {len(plan.windows)} planned")
    return validation_row(values, plan.group_of, windows, plan.mixture.groups, terms, policy.loss_weights, prefix)


def _forward(policy: Policy, batch: Batch, item: torch.Tensor, sums: Sums, world: World, draws: int) -> None:
    batch = batch.to(world.device)
    for draw in range(draws):
        noise = draw_noise(batch.key, draw, batch.actions.shape[1:])
        with world.accelerator.autocast():
            terms = policy(batch, noise)
        sums.add(item, terms)


def plan_first_batch(plan: ValidationPlan) -> Batch:
    """Any real batch of the plan, for a rank that has none of its own to shape its fillers by."""
    only = plan.windows.select(np.arange(1))
    part = next(iter(Parts(plan.mixture, lambda worker, width: iter([only]), train=False)))
    if part.error is not None:
        raise part.error
    assert part.batch is not None
    return part.batch


def _idle(batch: Batch) -> Batch:
    """The batch with weight 0: its losses count nothing."""
    return dataclasses.replace(batch, weight=torch.zeros_like(batch.weight))
