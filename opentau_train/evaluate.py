"""The validation pass: one list of windows over the whole mixture, equal shares for all ranks, one all-reduce.

The losses are grouped here, from the windows' own addresses; the policy's `forward` knows nothing of datasets. Every
forward has the same batch size, short batches being filled up with rows of weight 0: a matrix product's last bits may
depend on its shape, so a sample's loss would otherwise depend on which other windows there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from opentau_train.config import ValidationSettings
from opentau_train.data.collate import blank_batch
from opentau_train.data.mixture import Mixture
from opentau_train.data.stream import Parts, loader
from opentau_train.data.tape import Windows, frames_ahead
from opentau_train.data.windows import equal_spans, validation_windows
from opentau_train.distributed import World
from opentau_train.errors import BadSample, UserError
from opentau_train.metrics import Sums, exact, validation_row
from opentau_train.models.policy import Policy
from opentau_train.parallel import Replicas
from opentau_train.step import draw_noise
from opentau_train.stopping import Patient, StopFlag, Stopped
from opentau_train.types import Batch
from opentau_train.watchdog import Place

NOTHING = np.zeros(0, np.int64)

MAX_DECODE_GAP = 32
"""Frames: a larger gap inside an episode costs a seek, about this many frames' decoding at the usual GOP, and so does
the first window of an episode."""
FRAME_COST = 1 / 32
"""Of decoding one frame, against all else that a window costs: measured in benchmarks/validation_pass.py, where an
episode's opening takes less than another window does. A larger value would balance the decoders of ranks whose
forwards are then far from even."""


@dataclass(frozen=True)
class ValidationPlan:
    """What a pass reads, the same on every rank.

    `windows` in reading order, `t` being the place in the list (what is read `ahead` is each worker's: `for_worker`);
    `item` [N] i64 each window's episode as a row of the
    sums, `group_of` [E] i64 the rows' groups, `episodes` (dataset name, episode number) the rows' names; `bounds`
    [R+1] i64 the ranks' contiguous spans.
    """

    mixture: Mixture
    windows: Windows
    item: NDArray[np.int64]
    group_of: NDArray[np.int64]
    episodes: tuple[tuple[str, int], ...]
    bounds: NDArray[np.int64]
    batch_size: int

    @property
    def num_windows(self) -> NDArray[np.int64]:
        """[E] windows of each row."""
        return np.bincount(self.item, minlength=len(self.group_of))

    @property
    def num_rounds(self) -> int:
        """Batches of the busiest rank."""
        return max(self.num_rounds_of(rank) for rank in range(len(self.bounds) - 1))

    def num_rounds_of(self, rank: int) -> int:
        return -int(-(self.bounds[rank + 1] - self.bounds[rank]) // self.batch_size)

    def for_worker(self, rank: int, worker: int, num_workers: int) -> Iterator[Windows]:
        """The batches of a worker: a contiguous run of its rank's, so that it decodes each frame once."""
        low, high = self.bounds[rank : rank + 2]
        starts = np.array_split(np.arange(low, high, self.batch_size), num_workers)[worker]
        if not len(starts):
            return
        run = self.windows.select(slice(starts[0], min(starts[-1] + self.batch_size, high)))
        run = dataclasses.replace(run, ahead=frames_ahead(run.dataset, run.episode, run.frame))
        for start in starts - starts[0]:
            yield run.select(slice(start, start + self.batch_size))


def plan_validation(
    mixture: Mixture, max_samples_per_group: int | None, *, batch_size: int, num_ranks: int
) -> ValidationPlan:
    """List the held-out windows and cut the list into spans of equal decode cost."""
    datasets = mixture.datasets
    dataset, episode, frame = validation_windows(
        [d.validation for d in datasets], [d.group_of for d in datasets], max_samples_per_group
    )
    first = np.ones(len(dataset), bool)
    first[1:] = (dataset[1:] != dataset[:-1]) | (episode[1:] != episode[:-1])
    gap = np.where(first, MAX_DECODE_GAP, np.minimum(np.diff(frame, prepend=0), MAX_DECODE_GAP))
    rows = [(datasets[d], e) for d, e in zip(dataset[first], episode[first], strict=True)]
    zeros = np.zeros(len(dataset), np.int64)
    return ValidationPlan(
        mixture=mixture,
        windows=Windows(np.arange(len(dataset)), zeros, dataset, zeros, episode, frame, ahead=zeros),
        item=np.cumsum(first) - 1,
        group_of=np.array([d.group_of[e] for d, e in rows], np.int64),
        episodes=tuple((d.name, int(d.source.episodes.episode_index[e])) for d, e in rows),
        bounds=equal_spans(1.0 + FRAME_COST * gap, num_ranks),
        batch_size=batch_size,
    )


@dataclass(frozen=True)
class Scores:
    """What a pass measured, equal on all ranks.

    `row` of tags (`metrics.validation_row`); `sums` [E, K, 2] float64 sums and counts of the plan's rows; `left_out`,
    the windows that couldn't be read, in the ranks' order.
    """

    row: dict[str, float]
    sums: NDArray[np.float64] = field(repr=False)
    left_out: tuple[BadSample, ...] = ()


@torch.no_grad()
def evaluate(
    policy: Policy,
    replicas: Replicas,
    plan: ValidationPlan,
    world: World,
    settings: ValidationSettings,
    prefix: str = "Validation",
    stop: StopFlag | None = None,
    place: Place | None = None,
) -> Scores:
    """One pass over the losses; every rank must call it and gets the same scores. One all-reduce.

    Ambient random state is untouched. Raises on all ranks the `UserError` of a window that any rank couldn't read,
    `Stopped` when any was asked to (see `Rounds`), and RuntimeError where windows or loss elements got lost or counted
    twice.
    """
    terms = tuple(policy.loss_weights)
    num = len(plan.group_of)
    sums, expected = Sums(num, terms), Sums(num, terms)
    seen = torch.zeros(num, dtype=torch.float64)
    rounds = Rounds(plan, replicas, world, settings, stop, place)
    with evaluating(policy, replicas):
        for batch, t in rounds:
            item = torch.from_numpy(plan.item[t])
            seen.index_add_(0, item, torch.ones(len(t), dtype=torch.float64))
            counts = policy.term_counts(batch)
            for draw in range(settings.num_noise_draws):
                noise = draw_noise(batch.key, draw, batch.actions.shape[1:])
                with world.accelerator.autocast():
                    found = policy(batch, noise)
                sums.add(item, {k: (s[: len(t)], c[: len(t)]) for k, (s, c) in exact(found).items()})
                expected.add(item, {k: (counts[k][: len(t)], counts[k][: len(t)]) for k in found})
    packed = torch.cat([sums.values.flatten(), expected.values[..., 1].flatten(), seen, rounds.outcome()])
    world.sum(packed)
    parts = packed.split([sums.values.numel(), num * len(terms), num, 4])
    left_out = rounds.settle(parts[3])
    values, windows = parts[0].view_as(sums.values).numpy(), parts[2].numpy()
    check_conservation(plan, values, parts[1].view(num, len(terms)).numpy(), windows, left_out)
    groups = plan.mixture.groups
    row = validation_row(values, plan.group_of, windows, groups, terms, policy.loss_weights, prefix)
    if settings.on_bad_sample == "skip":
        row[f"{prefix}-LeftOut/Windows"] = float(len(left_out))
    return Scores(row, values, left_out)


def check_conservation(
    plan: ValidationPlan, values: NDArray, expected: NDArray, windows: NDArray, left_out: tuple[BadSample, ...]
) -> None:
    """Windows by group equal the plan's (less what was left out), loss elements by group equal the masks'.

    `values` [E, K, 2] the forwards' sums and counts, `expected` [E, K] counts by `term_counts`, `windows` [E] seen.
    Raises RuntimeError naming the first group that differs.
    """
    planned = plan.num_windows.astype(float)
    row_of = {name: row for row, name in enumerate(plan.episodes)}
    for bad in left_out:
        planned[row_of[bad.dataset, bad.episode]] -= 1
    pairs = [("windows", windows, planned)]
    pairs += [("loss elements", values[:, k, 1], expected[:, k]) for k in range(expected.shape[1])]
    for what, found, wanted in pairs:
        wrong = np.flatnonzero(found != wanted)
        if len(wrong):
            group = plan.mixture.groups[plan.group_of[wrong[0]]]
            rows = plan.group_of == plan.group_of[wrong[0]]
            raise RuntimeError(
                f"validation counted {found[rows].sum():.0f} {what} in {group.tag}, {wanted[rows].sum():.0f} were "
                f"planned; first in episode {plan.episodes[wrong[0]][1]}"
            )


@contextmanager
def evaluating(policy: Policy, replicas: Replicas) -> Iterator[None]:
    """The policy in evaluation mode, back in its own mode afterwards and, where sharded, back in its shards."""
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)
        replicas.reshard()


class Rounds:
    """This rank's batches of a plan, as pairs (batch of exactly `plan.batch_size` rows, `t` [n] of its first n rows).

    `stop` asks the rank to leave out the rest; `place` is told of every batch, for the watchdog. A sharded model's
    forward is a collective: every rank then gets as many rounds as the busiest one, the missing ones blank, and all
    leave in the same round, which costs one small all-reduce a round.
    """

    def __init__(
        self,
        plan: ValidationPlan,
        replicas: Replicas,
        world: World,
        settings: ValidationSettings,
        stop: StopFlag | None,
        place: Place | None,
    ):
        self.plan, self.world, self.sharded = plan, world, replicas.sharded
        self.stop, self.place = stop or StopFlag(), place or Place()
        self.skip_bad = settings.on_bad_sample == "skip"
        self.error: UserError | None = None
        self.halted = False
        self.left_out: list[BadSample] = []

    def __iter__(self) -> Iterator[tuple[Batch, NDArray[np.int64]]]:
        plan, rank, data = self.plan, self.world.rank, self.plan.mixture.settings
        parts = Parts(
            plan.mixture,
            lambda worker, width: plan.for_worker(rank, worker, width),
            train=False,
            skip_bad=self.skip_bad,
        )
        own = plan.num_rounds_of(rank)
        with closing(Patient(iter(loader(parts, data.num_workers, data.prefetch_factor)))) as patient:
            for number in range(plan.num_rounds if self.sharded else own):
                self.place.enter("validation")
                part = patient.next(self.stop) if number < own else None
                self.error = part.error if part is not None else None
                self.halted = self.error is not None or self.stop.poll() > 0
                if self.sharded:
                    self.halted = bool(self.world.sum(torch.tensor([float(self.halted)])).item())
                if self.halted:
                    break
                self.left_out += part.left_out if part is not None else ()
                batch, t = (None, NOTHING) if part is None else (part.batch, part.t)
                if batch is not None or self.sharded:
                    batch = fill_up(blank_batch(plan.mixture.spec) if batch is None else batch, plan.batch_size)
                    yield batch.to(self.world.device), t
        self.place.enter("all-reduce of the validation")

    def outcome(self) -> torch.Tensor:
        """[4] float64 for the pass's all-reduce: this rank failed, stopped with code 1 or 2, and left windows out."""
        stopped = self.error is None and self.halted
        flags = [self.error is not None, stopped and self.stop.code == 1, stopped and self.stop.code == 2]
        return torch.tensor([*map(float, flags), float(len(self.left_out))], dtype=torch.float64)

    def settle(self, outcome: torch.Tensor) -> tuple[BadSample, ...]:
        """All ranks' left-out windows, given the summed `outcome`. Raises on all the first failed rank's error, or
        `Stopped` where any left the pass."""
        failed, preempted, interrupted, num_left_out = outcome.tolist()
        if failed:
            raise next(e for e in self.world.gather(self.error) if e is not None)
        if preempted or interrupted:
            raise Stopped(2 if interrupted else 1)
        if not num_left_out:
            return ()
        return tuple(bad for found in self.world.gather(self.left_out) for bad in found)


def fill_up(batch: Batch, size: int) -> Batch:
    """The batch with copies of its first row, of weight 0, up to `size` rows."""
    missing = size - len(batch)
    if missing == 0:
        return batch
    num = len(batch)
    full = batch.map(lambda t: torch.cat([t, t[:1].expand(missing, *t.shape[1:])]), lambda s: s + s[:1] * missing)
    weight = torch.where(torch.arange(size) < num, full.weight, 0.0)
    return dataclasses.replace(full, weight=weight)
