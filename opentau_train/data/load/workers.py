"""The loader's worker processes: how they begin, hand over what they build, make further passes, and die."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from multiprocessing import reduction
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import IO, Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils import signal_handling

from opentau_train.data.load.parcel import Parcel, memory_file, pack, unpack
from opentau_train.errors import Fault, Teller, machine_fault, shared_memory_fault

T = TypeVar("T")

PR_SET_PDEATHSIG = 1
"""See prctl(2)."""
GONE_S = 2.0
"""Seconds that a worker whose connection broke may take to be gone."""
NO_SHARED_MEMORY = (errno.ENOSPC, errno.ENOENT, errno.EACCES, errno.EROFS, errno.ENOSYS)
"""What the system answers where it can't make the semaphores of the workers' queues, which lie in shared memory."""


class SharedNumber:
    """A number that one process sets and its workers read. It lies in a file of memory, which forked workers share and
    new processes are handed: multiprocessing's own would need /dev/shm."""

    def __init__(self, file: IO[bytes] | None = None):
        self._file = memory_file() if file is None else file

    def __reduce__(self) -> Any:
        return _shared, (reduction.DupFd(self._file.fileno()),)

    @property
    def value(self) -> int:
        return int(os.pread(self._file.fileno(), 32, 0) or 0)

    @value.setter
    def value(self, value: int) -> None:
        os.pwrite(self._file.fileno(), b"%32d" % value, 0)


def _shared(handed: Any) -> SharedNumber:
    return SharedNumber(open(handed.detach(), "r+b"))


def one_pass(
    dataset: IterableDataset[T], num_workers: int, prefetch_factor: int, *, afresh: bool = False
) -> Generator[T]:
    """What the workers yield when `dataset` is iterated once, in the order of `passes`. Raises as that does."""
    with closing(passes(dataset, num_workers, prefetch_factor, afresh=afresh)) as endless:
        for item in endless:
            if item is None:
                return
            yield item


def passes(
    dataset: IterableDataset[T], num_workers: int, prefetch_factor: int, *, afresh: bool = False
) -> Generator[T | None]:
    """What the workers yield, pass after pass. In a pass each worker iterates `dataset` once, and their items are
    handed over in turn: worker 0's first, worker 1's first, ...; None marks the end of the pass.

    The same workers make all passes; they live until the generator is closed. With `num_workers` 0 the calling process
    is the only worker. `afresh`: workers are new processes, to which `dataset` is pickled, and no forks of this one: a
    fork of a process that has used CUDA can't use it. Raises `Fault` for a worker that died, and where there is no room
    for what one hands over.
    """
    if num_workers:
        _check_semaphores(num_workers)
    with ExitStack() as stack:
        channels = [socket.socketpair() for _ in range(num_workers)]
        for channel in channels:
            for end in channel:
                stack.enter_context(end)
        senders = [sender for _, sender in channels]
        for item in stack.enter_context(closing(_parcels(dataset, num_workers, prefetch_factor, senders, afresh))):
            if isinstance(item, Fault):
                raise Fault(item.what, where=item.where, remedy=item.remedy, teller=Teller.THIS_RANK)
            yield unpack(item, channels[item.sender][0]) if isinstance(item, Parcel) else item


def _parcels(
    dataset: IterableDataset[T], num_workers: int, prefetch_factor: int, senders: Sequence[socket.socket], afresh: bool
) -> Generator[T | Parcel | Fault | None]:
    """What `passes` gives, still as the workers pack it; worker i sends the files through `senders[i]`."""
    data_loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=num_workers > 0,
        collate_fn=partial(_hand_over, senders) if num_workers else _same,
        worker_init_fn=begin_worker if num_workers else None,
        multiprocessing_context="spawn" if num_workers and afresh else None,
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


def _check_semaphores(num_workers: int) -> None:
    """Raises `Fault` where the system hasn't the shared memory for the workers' queues, a page a semaphore: asked for
    beforehand, since a loader that breaks off half built prints a traceback of its own."""
    needed = 3 * num_workers + 8
    try:
        _ = [multiprocessing.Lock() for _ in range(needed)]
    except OSError as error:
        if error.errno not in NO_SHARED_MEMORY:
            raise
        what = f"{num_workers} data workers need {needed * mmap.PAGESIZE // 1024} kB of it, batches none"
        raise shared_memory_fault(f"{what}: {error.strerror}") from error


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
    mapped = " (SIGBUS: a mapped file or shared memory that the machine couldn't give)"
    by_bus = any(w.exitcode == -signal.SIGBUS for w in workers)
    return Fault(
        f"a data worker on {socket.gethostname()} died ({'; '.join(dead) or 'no exit code'})",
        where="the operating system's log (dmesg) tells whether memory ran out" + (mapped if by_bus else ""),
        remedy="if it did, lower data.num_workers, data.prefetch_factor or data.lanes_per_sample; go on with "
        "resume=auto",
        teller=Teller.THIS_RANK,
    )


def _same(item: T) -> T:
    return item


def _hand_over(senders: Sequence[socket.socket], item: Any) -> Parcel | Fault:
    """The item as a worker hands it over, or what keeps it from that: raised, the error would come with a traceback."""
    info = get_worker_info()
    assert info is not None, "a worker hands over"
    try:
        return pack(item, info.id, senders[info.id])
    except (OSError, MemoryError) as error:
        fault = machine_fault(error)
        if fault is None:
            raise
        return fault


def begin_worker(worker: int) -> None:
    """Make a new worker process deaf to signals and let it collect its own garbage.

    Ctrl-C and a scheduler's signals reach the whole process group; the main process alone ends its workers. Where it is
    killed, the system kills them too: one inside of a read would hold its files, and the run directory, for ever.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # A garbage collection writes to every object it looks at: the pages shared with the main process would be copied.
    gc.freeze()
    gc.enable()  # the main process may have put it off (`performance.scheduled_collection`): here nobody would make up
