"""The training stream: every rank's part of every global batch, built by all its workers.

Each worker builds the samples of the slots it owns and the main process joins the workers' parts in slot order, so the
ordered global batch is the tape's, whatever the ranks, workers, prefetching or delays.
"""

from __future__ import annotations

import gc
import json
import signal
import socket
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from opentau_train import rng
from opentau_train.batch import Batch, Sample, join, stack
from opentau_train.data.decode.video import OpenDecoders
from opentau_train.data.load.samples import SampleBuilder
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.order.tape import Tape, Windows
from opentau_train.errors import BadSample, Fault, Teller, UserError
from opentau_train.types import Address

SUBSTITUTE_TRIES = 8
GONE_S = 2.0
"""Seconds that a worker whose connection broke may take to be gone."""
STEPS_AT_ONCE = 16
"""Steps whose windows are looked up together: most of what that costs doesn't depend on their number."""


@dataclass(frozen=True)
class Part:
    """What one worker built of a step: the samples' numbers `t` [n] i64, their batch (None where n = 0), how many of
    them stand in for windows that couldn't be read, or the error that ended the worker (errors travel as values: one
    raised on a single rank would leave the others in a collective). `left_out`: windows that couldn't be read and are
    missing in `t` and `batch`."""

    t: np.ndarray
    batch: Batch | None
    num_substituted: int = 0
    error: UserError | None = None
    left_out: tuple[BadSample, ...] = ()
    open_decoders: OpenDecoders = field(default_factory=OpenDecoders)
    """The decoders that the worker keeps open."""


@dataclass(frozen=True)
class RankBatch:
    """One rank's share of a global batch, in slot order, with the number of substituted windows in it; or the error
    that ended its stream, with the batch None."""

    batch: Batch | None
    num_substituted: int = 0
    error: UserError | None = None
    open_decoders: OpenDecoders = field(default_factory=OpenDecoders)
    """The decoders that all of the rank's workers keep open."""


class Parts(IterableDataset):
    """`plan(worker, num_workers)` gives the windows that a worker builds, item by item; each becomes a `Part`.

    A window that can't be read is substituted where `train`; else it ends the worker, or with `skip_bad` is left out.
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

    def __iter__(self) -> Iterator[Part]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        builder = SampleBuilder(self.mixture, training=self.train)
        try:
            for windows in self.plan(worker, num_workers):
                yield self._build(builder, windows)
        except UserError as error:
            yield Part(np.zeros(0, np.int64), None, error=error)
        finally:
            builder.close()

    def _build(self, builder: SampleBuilder, windows: Windows) -> Part:
        samples, substituted, left_out = [], 0, {}
        columns = windows.slot, windows.ahead, windows.dataset, windows.episode, windows.frame, windows.pass_index
        for i, (lane, ahead, *numbers) in enumerate(zip(*(c.tolist() for c in columns))):
            address = Address(*numbers)
            try:
                samples.append(builder.build(lane, address, ahead=ahead))
            except BadSample as error:
                if not self.train:
                    if not self.skip_bad:
                        raise _unreadable(error) from error
                    left_out[i] = error
                    continue
                samples.append(self._substitute(builder, lane, address, error))
                substituted += 1
        batch = stack(samples, self.mixture.spec) if samples else None
        t = np.delete(windows.t, list(left_out))
        return Part(t, batch, substituted, left_out=tuple(left_out.values()), open_decoders=builder.open_decoders)

    def _substitute(self, builder: SampleBuilder, lane: int, address: Address, error: BadSample) -> Sample:
        """A keyed draw from the same dataset and side of the split, so that a rerun draws the same one."""
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
            remedy="repair the dataset's files, or exclude the episodes named in quarantine.jsonl",
        )

    def _record(self, error: BadSample, pass_index: int) -> None:
        if self.quarantine is None:
            return
        row = {
            "time": time.time(),
            "dataset": error.dataset,
            "episode": error.episode,
            "frame": error.frame,
            "pass": pass_index,
            "cause": error.cause,
        }
        # One write of one line in append mode: lines of several workers and ranks don't mix.
        with open(self.quarantine, "a") as file:
            file.write(json.dumps(row) + "\n")


def _unreadable(error: BadSample) -> UserError:
    return UserError(
        f"a validation window can't be read: {error.cause}",
        where=f"dataset '{error.dataset}', episode {error.episode}, frame {error.frame}",
        remedy=f"repair the file, or set data.sources.{error.dataset}.exclude_episodes=[{error.episode}] or "
        "validation.on_bad_sample=skip",
    )


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
    mixture: Mixture,
    tape: Tape,
    *,
    rank: int,
    size: int,
    first_step: int,
    last_step: int,
    quarantine: Path,
) -> Generator[RankBatch]:
    """This rank's `B / R` samples of steps `first_step` .. `last_step` - 1, in slot order.

    R must divide B. A `UserError` comes as the last item's `error` instead of being raised: a rank that ended alone
    would leave the others in a collective. Raises `Fault` for a worker that died (killed for its memory, a crash in
    native code). Close the generator to end the workers.
    """
    data = mixture.settings
    tape.batch(first_step)  # orders the blocks here and now: forked workers then share the pages, 12 B a block
    plan = TrainPlan(tape, rank, size, first_step, last_step)
    width = max(1, data.num_workers)
    pending: list[Part] = []
    stream = Parts(mixture, plan, train=True, quarantine=quarantine)
    with closing(loader(stream, data.num_workers, data.prefetch_factor)) as parts:
        for part in parts:
            if part.error is not None:
                yield RankBatch(None, error=part.error)
                return
            pending.append(part)
            if len(pending) == width:
                yield _join(pending)
                pending = []


def _join(parts: list[Part]) -> RankBatch:
    t = np.concatenate([p.t for p in parts])
    batch = join([p.batch for p in parts if p.batch is not None], np.argsort(t, kind="stable").tolist())
    decoders = sum((p.open_decoders for p in parts), OpenDecoders())
    return RankBatch(batch, sum(p.num_substituted for p in parts), open_decoders=decoders)


def loader(parts: Parts, num_workers: int, prefetch_factor: int) -> Generator[Part]:
    """The first of `passes`."""
    with closing(passes(parts, num_workers, prefetch_factor)) as endless:
        for part in endless:
            if part is None:
                return
            yield part


def passes(parts: Parts, num_workers: int, prefetch_factor: int) -> Generator[Part | None]:
    """What workers each yield, handed over in turn: worker 0's first item, worker 1's first, ..., and None at the end;
    then the same workers begin again, with what `parts.plan` gives then.

    The workers live until the generator is closed. Raises `Fault` for a worker that died.
    """
    data_loader = DataLoader(
        parts,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=num_workers > 0,
        collate_fn=_same,
        worker_init_fn=_begin_worker if num_workers else None,
        # The loader draws a base seed from the ambient generator unless it is given one: a validation pass would
        # then change every later ambient draw of the training loop.
        generator=torch.Generator().manual_seed(0),
        in_order=True,
    )
    iterator: Any = iter(data_loader)  # whose workers torch offers no public way to end
    workers: list[BaseProcess] = iterator._workers if num_workers else []
    try:
        while True:
            yield from iterator
            yield None
            iterator = iter(data_loader)  # with workers the same one, begun again
    except (RuntimeError, OSError, EOFError) as error:
        if not _tells_of_death(error, workers):
            raise
        raise _worker_death(workers) from error
    finally:
        # Not left to the garbage collector: an error's traceback keeps the iterator alive up to the interpreter's end,
        # which then sends the workers a SIGTERM, which they ignore, and waits for them for ever.
        if num_workers:
            iterator._shutdown_workers()


def _tells_of_death(error: Exception, workers: list[BaseProcess]) -> bool:
    """Whether the loader failed because a worker ended without an exception of its own."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    try:
        # One may die while its batch is handed over: the connection breaks before the system calls it dead.
        return bool(workers) and bool(wait([w.sentinel for w in workers], timeout=GONE_S))
    except RuntimeError as told:  # by torch's handler of SIGCHLD, where the main thread itself reads the batches
        return str(told).startswith("DataLoader worker")


def _worker_death(workers: list[BaseProcess]) -> Fault:
    """What to tell about workers of which one ended without an exception of its own."""
    for sentinel in wait([w.sentinel for w in workers], timeout=0):
        next(w for w in workers if w.sentinel == sentinel).join()  # it is closed a moment before there is an exit code
    dead = [
        f"pid {w.pid}, " + (f"killed by {signal.Signals(-w.exitcode).name}" if w.exitcode < 0 else f"exit {w.exitcode}")
        for w in workers
        if w.exitcode
    ]
    return Fault(
        f"a data worker on {socket.gethostname()} died ({'; '.join(dead) or 'no exit code'})",
        where="the operating system's log (dmesg) tells whether memory ran out",
        remedy="if it did, lower data.num_workers, data.prefetch_factor or data.lanes_per_sample; go on with "
        "resume=auto",
        teller=Teller.THIS_RANK,
    )


def _same(item: Any) -> Any:
    return item


def _begin_worker(worker: int) -> None:
    """Ctrl-C and a scheduler's signals reach the whole process group; the main process alone ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # A garbage collection writes to every object it looks at: the pages shared with the main process would be copied.
    gc.freeze()
    gc.enable()  # the main process may have put it off (`performance.scheduled_collection`): here nobody would make up
