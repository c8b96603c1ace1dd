"""The training stream: a rank's share of every global batch, built by all its workers.

Each worker builds a shard, the samples of the slots it owns, and the main process joins the workers' shards in slot
order, so the ordered global batch is the tape's, whatever the ranks, workers, prefetching or delays.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from opentau_train import rng
from opentau_train.data.batch import Batch, join, stack
from opentau_train.data.decode.video import OpenDecoders
from opentau_train.data.fields import Sample
from opentau_train.data.load.fetching import files_fetched
from opentau_train.data.load.samples import SampleBuilder
from opentau_train.data.load.together import built_together
from opentau_train.data.load.workers import one_pass
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.order.tape import Tape
from opentau_train.data.order.windows import Windows
from opentau_train.errors import BadSample, Explained, UserError, machine_fault
from opentau_train.types import Address

SUBSTITUTE_TRIES = 8
"""Windows that are tried in place of an unreadable one before the run ends."""
STEPS_AT_ONCE = 16
"""Steps whose windows are looked up together: most of what that costs doesn't depend on their number."""


@dataclass(frozen=True)
class Shard:
    """One worker's share of a step: the numbers `t` [n] i64 of its samples, their batch (None where n = 0), and how
    many of them stand in for windows that couldn't be read; or the error that ended the worker.

    Errors travel as values: one raised on a single rank would leave the others in a collective. `left_out`: windows
    that couldn't be read and are missing in `t` and `batch`.
    """

    t: np.ndarray
    batch: Batch | None
    num_substituted: int = 0
    error: Explained | None = None
    left_out: tuple[BadSample, ...] = ()
    open_decoders: OpenDecoders = field(default_factory=OpenDecoders)
    """The decoders that the worker keeps open."""


@dataclass(frozen=True)
class RankBatch:
    """One rank's share of a global batch, in slot order, with the number of substituted windows in it; or the error
    that ended its stream, with the batch None."""

    batch: Batch | None
    num_substituted: int = 0
    error: Explained | None = None
    open_decoders: OpenDecoders = field(default_factory=OpenDecoders)
    """The decoders that all of the rank's workers keep open."""


class ShardDataset(IterableDataset[Shard]):
    """The shards that a worker builds, one for each item of `plan(worker, num_workers)`, which are its windows.

    A window that can't be read is substituted where `train` is set, and noted in the `quarantine` file; else it ends
    the worker, or with `skip_bad` is left out.
    """

    def __init__(
        self,
        mixture: Mixture,
        plan: Callable[[int, int], Iterator[Windows]],
        *,
        train: bool,
        quarantine: Path | None = None,
        skip_bad: bool = False,
    ):
        self.mixture, self.plan, self.train, self.quarantine = mixture, plan, train, quarantine
        self.skip_bad = skip_bad

    def __iter__(self) -> Iterator[Shard]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        builder = SampleBuilder(self.mixture, training=self.train)
        try:
            for windows in files_fetched(self.mixture, self.plan(worker, num_workers)):
                yield self._build(builder, windows)
        except (Explained, OSError, MemoryError, RuntimeError) as error:
            explained = error if isinstance(error, Explained) else machine_fault(error, self.quarantine or "")
            if explained is None:
                raise
            yield Shard(np.zeros(0, np.int64), None, error=explained)
        finally:
            builder.close()

    def _build(self, builder: SampleBuilder, windows: Windows) -> Shard:
        batch = built_together(builder, windows)
        if batch is not None:
            return Shard(windows.t, batch)
        samples, substituted, left_out = [], 0, {}
        mode = np.full(len(windows), -1) if windows.mode is None else windows.mode
        columns = windows.slot, windows.ahead, windows.dataset, windows.episode, windows.frame, windows.pass_index, mode
        for i, (lane, ahead, *numbers) in enumerate(zip(*(c.tolist() for c in columns))):
            address = Address(*numbers)
            try:
                samples.append(builder.build(lane, address, ahead=ahead))
            except BadSample as error:
                if not self.train:
                    if not self.skip_bad:
                        raise self._unreadable(error) from error
                    left_out[i] = error
                    continue
                samples.append(self._substitute(builder, lane, address, error))
                substituted += 1
        batch = stack(samples, self.mixture.spec) if samples else None
        t = np.delete(windows.t, list(left_out))
        return Shard(t, batch, substituted, left_out=tuple(left_out.values()), open_decoders=builder.open_decoders)

    def _substitute(self, builder: SampleBuilder, lane: int, address: Address, error: BadSample) -> Sample:
        """The sample of another training window of the same dataset, drawn by key so that a rerun draws the same."""
        dataset = self.mixture.datasets[address.dataset]
        blocks, pass_index = dataset.train, address.pass_index
        number = int(dataset.source.episodes.episode_index[address.episode])
        self._record(error, pass_index)
        key = rng.key(self.mixture.seed, "substitute", blocks.name, number, address.frame, pass_index)
        for draw in rng.uniform(key, SUBSTITUTE_TRIES):
            other = blocks.window(int(draw * blocks.num_windows))
            try:
                return builder.build(lane, Address(address.dataset, *other, pass_index))
            except BadSample as again:
                self._record(again, pass_index)
        raise UserError(
            f"dataset '{blocks.name}': {SUBSTITUTE_TRIES} windows in place of an unreadable one can't be read either",
            where=str(error),
            remedy=error.remedy or "repair the dataset's files, or exclude the episodes named in quarantine.jsonl",
        )

    def _unreadable(self, error: BadSample) -> UserError:
        """The error of a validation window; its remedy leaves out what the settings do already, too."""
        dataset = next(d for d in self.mixture.datasets if d.name == error.dataset)
        excluded = ",".join(map(str, sorted({*dataset.settings.exclude_episodes, error.episode})))
        return UserError(
            f"a validation window can't be read: {error.cause}",
            where=f"dataset '{error.dataset}', episode {error.episode}, frame {error.frame}",
            remedy=error.remedy
            or f"repair the file, or set data.sources.{error.dataset}.exclude_episodes=[{excluded}] or "
            "validation.on_bad_sample=skip",
        )

    def _record(self, error: BadSample, pass_index: int) -> None:
        if self.quarantine is None:
            return
        row = {"time": time.time(), **vars(error), "pass": pass_index}
        # One write of one line in append mode: lines of several workers and ranks don't mix.
        with open(self.quarantine, "a") as file:
            file.write(json.dumps(row) + "\n")


def last_remedy(quarantine: Path) -> str:
    """What the last window in the quarantine calls for, "" where its cause doesn't tell."""
    lines = quarantine.read_text().splitlines()
    return json.loads(lines[-1])["remedy"] if lines else ""


@dataclass(frozen=True)
class TrainPlan:
    """The windows of steps `first`..`last` - 1 that belong to a worker of rank `rank` of `size`."""

    tape: Tape
    rank: int
    size: int
    first: int
    last: int

    def __call__(self, worker: int, num_workers: int) -> Iterator[Windows]:
        for first in range(self.first, self.last, STEPS_AT_ONCE):
            steps = range(first, min(first + STEPS_AT_ONCE, self.last))
            yield from self.tape.owned(steps, self.rank, self.size, worker, num_workers)


def training_batches(
    mixture: Mixture, tape: Tape, *, rank: int, size: int, first_step: int, last_step: int, quarantine: Path
) -> Generator[RankBatch]:
    """This rank's `B / R` samples of steps `first_step` .. `last_step` - 1, in slot order.

    R must divide B. An `Explained` error comes as the last item's `error` instead of being raised: a rank that ended
    alone would leave the others in a collective. Raises `Fault` for a worker that died (killed for its memory, a crash
    in native code). Close the generator to end the workers.
    """
    data = mixture.settings
    tape.batch(first_step)  # orders the blocks here and now: forked workers then share the pages, 12 B a block
    plan = TrainPlan(tape, rank, size, first_step, last_step)
    width = max(1, data.num_workers)
    pending: list[Shard] = []
    dataset = ShardDataset(mixture, plan, train=True, quarantine=quarantine)
    afresh = data.video_decoder == "nvdec"
    with closing(one_pass(dataset, data.num_workers, data.prefetch_factor, afresh=afresh)) as shards:
        for shard in shards:
            if shard.error is not None:
                yield RankBatch(None, error=shard.error)
                return
            pending.append(shard)
            if len(pending) == width:
                yield _join(pending)
                pending = []


def _join(shards: list[Shard]) -> RankBatch:
    t = np.concatenate([s.t for s in shards])
    batch = join([s.batch for s in shards if s.batch is not None], np.argsort(t, kind="stable").tolist())
    decoders = sum((s.open_decoders for s in shards), OpenDecoders())
    return RankBatch(batch, sum(s.num_substituted for s in shards), open_decoders=decoders)
