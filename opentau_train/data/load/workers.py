"""The loader's worker processes: how they begin, hand over what they build, make further passes, and die."""

from __future__ import annotations

import gc
import signal
import socket
from collections.abc import Generator
from contextlib import closing
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data._utils import signal_handling

from opentau_train.errors import Fault, Teller

T = TypeVar("T")

GONE_S = 2.0
"""Seconds that a worker whose connection broke may take to be gone."""


def one_pass(dataset: IterableDataset[T], num_workers: int, prefetch_factor: int) -> Generator[T]:
    """What the workers yield when `dataset` is iterated once, in the order of `passes`. Raises as that does."""
    with closing(passes(dataset, num_workers, prefetch_factor)) as endless:
        for item in endless:
            if item is None:
                return
            yield item


def passes(dataset: IterableDataset[T], num_workers: int, prefetch_factor: int) -> Generator[T | None]:
    """What the workers yield, pass after pass. In a pass each worker iterates `dataset` once, and their items are
    handed over in turn: worker 0's first, worker 1's first, ...; None marks the end of the pass.

    The same workers make all passes; they live until the generator is closed. With `num_workers` 0 the calling process
    is the only worker. Raises `Fault` for a worker that died.
    """
    data_loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=num_workers > 0,
        collate_fn=_same,
        worker_init_fn=begin_worker if num_workers else None,
        # The loader draws a base seed from the ambient generator unless it is given one: a validation pass would
        # then change every later ambient draw of the training loop.
        generator=torch.Generator().manual_seed(0),
        in_order=True,
    )
    iterator: Any = iter(data_loader)  # whose workers torch offers no public way to end
    workers: list[BaseProcess] = iterator._workers if num_workers else []
    if num_workers:
        # Torch's handler of SIGCHLD raises in the main thread when a worker dies, wherever that is just then: in the
        # middle of a save, say. Without it a death is seen where the worker's item is waited for, within 5 s.
        signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
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
    # One may die while its batch is handed over: the connection breaks before the system calls it dead.
    return bool(workers) and bool(wait([w.sentinel for w in workers], timeout=GONE_S))


def _worker_death(workers: list[BaseProcess]) -> Fault:
    """The error to raise where one of `workers` ended without an exception of its own."""
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


def begin_worker(worker: int) -> None:
    """Make a new worker process deaf to signals and let it collect its own garbage.

    Ctrl-C and a scheduler's signals reach the whole process group; the main process alone ends its workers.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # A garbage collection writes to every object it looks at: the pages shared with the main process would be copied.
    gc.freeze()
    gc.enable()  # the main process may have put it off (`performance.scheduled_collection`): here nobody would make up
