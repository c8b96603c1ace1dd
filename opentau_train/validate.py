"""The validation pass: one list of windows over the whole mixture, equal shares for all ranks, one all-reduce.

The losses are grouped here, from the windows' own addresses; the policy's `forward` knows nothing of datasets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from opentau_train.config import ValidationSettings
from opentau_train.data.mixture import Mixture
from opentau_train.data.stream import Parts, loader
from opentau_train.data.tape import Windows
from opentau_train.data.windows import equal_spans, validation_windows
from opentau_train.distributed import Replicas, World
from opentau_train.metrics import Sums, validation_row
from opentau_train.models.policy import Policy
from opentau_train.step import draw_noise
from opentau_train.types import Batch

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
        return int(max(-(-np.diff(self.bounds) // self.batch_size), default=0))

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
) -> dict[str, float]:
    """One pass; every rank must call it and gets the same row of tags (see `metrics.validation_row`).

    Raises on all ranks the `UserError` of a window that any rank couldn't read. Ambient random state is untouched.
    """
    terms = tuple(policy.loss_weights)
    sums = Sums(len(plan.group_of), terms)
    seen = torch.zeros(len(plan.group_of), dtype=torch.float64)
    data = plan.mixture.settings
    parts = Parts(plan.mixture, lambda worker, width: plan.for_worker(world.rank, worker, width), train=False)
    error, rounds = None, 0
    was_training = policy.training
    policy.eval()
    for part in loader(parts, data.num_workers, data.prefetch_factor):
        if part.error is not None:
            error = part.error
            break
        item = torch.from_numpy(plan.item[part.t])
        seen.index_add_(0, item, torch.ones(len(item), dtype=torch.float64))
        _forward(policy, part.batch, item, sums, world, settings.num_noise_draws)
        rounds, filler = rounds + 1, part.batch
    if replicas.sharded and error is None:  # a sharded forward is a collective: finish the others' rounds with weight 0
        for _ in range(plan.num_rounds - rounds):
            idle = _idle(filler if rounds else plan_first_batch(plan))
            _forward(policy, idle, torch.zeros(len(idle), dtype=torch.int64), sums, world, settings.num_noise_draws)
    policy.train(was_training)
    packed = torch.cat([sums.values.flatten(), seen, torch.tensor([float(error is not None)], dtype=torch.float64)])
    world.sum(packed)
    if packed[-1]:
        raise next(e for e in world.gather(error) if e is not None)
    num = sums.values.numel()
    values, windows = packed[:num].view_as(sums.values).numpy(), packed[num:-1].numpy()
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
