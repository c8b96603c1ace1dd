"""Where a rank is, and what happens when it stays there: every stack printed, the job ended.

A step that never ends (a dead file server, a peer that is gone, a deadlock) must not hold a machine until somebody
looks. Each rank has a thread that watches its `Progress`; ranks need no communication for it, for that may be what
hangs.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from opentau_train.errors import EXIT_FAULT

GRACE = 5.0
"""Seconds that the ranks which notice first leave the others to write their stacks before the launcher ends all."""
START_MARGIN = 60.0
"""Seconds that a rank may wait before the first step beyond what a step may take: as long as a collective."""
BUSY = 0.005
"""Of a processor's time: a process that takes less before its first step is taken for one that waits. A download of a
megabyte a second takes more; a file server that is gone, or a pipe that nobody writes to, none."""


@dataclass
class Progress:
    """What a rank is doing: the step being made (the first is 1) and the part of it. `moved` is monotonic, seconds."""

    step: int = 0
    part: str = "opening data and policy"
    moved: float = field(default_factory=time.monotonic)
    shown: Callable[[str, int, int], None] | None = None
    """Is told what `enter` is."""

    def enter(self, part: str, step: int | None = None, done: int = 0, total: int = 0) -> None:
        """Progress was made: `part` begins, or `done` of its `total` pieces are."""
        self.part, self.moved = part, time.monotonic()
        if step is not None:
            self.step = step
        if self.shown is not None:
            self.shown(part, done, total)

    def __str__(self) -> str:
        return f"{self.part}, step {self.step}"


@contextmanager
def watch(progress: Progress, run_dir: Path, *, rank: int, size: int, timeout: float) -> Iterator[None]:
    """While inside: `timeout` seconds without progress end the process with `EXIT_FAULT`.

    Until the first step, while data are fetched and read and weights loaded, whatever takes the processor's time is
    progress (`BUSY`), and it may lack for `START_MARGIN` longer. Before the end every rank writes its place and all its
    threads' stacks to `run_dir/stacks/rankN.txt` and to stderr, and the lowest rank that still can says where each one
    was.
    """
    folder = run_dir / "stacks"
    stacks_file = folder / f"rank{rank}.txt"
    stacks_file.unlink(missing_ok=True)
    progress.enter(progress.part)
    done = threading.Event()
    with _LastResort(stacks_file.with_suffix(".lock")) as last_resort:
        arguments = progress, stacks_file, last_resort, rank, size, timeout, done
        watcher = threading.Thread(target=_watch, args=arguments, name="watchdog", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            faulthandler.cancel_dump_traceback_later()


class _LastResort:
    """Where a timer in C writes the stacks: stderr before the first step, so that a run which is refused leaves nothing
    in its directory, then a file, which is there until the run ends by itself. It is made in the directory that was
    there at the beginning: not in one that has taken its place."""

    def __init__(self, path: Path):
        self.path, self.file, self.run_dir = path, 2, -1
        with suppress(OSError):  # a node may not have it
            self.run_dir = os.open(path.parent.parent, os.O_RDONLY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.file != 2:
            os.close(self.file)
            self.path.unlink(missing_ok=True)
        with suppress(OSError):
            os.close(self.run_dir)

    def of(self, progress: Progress) -> int:
        """The descriptor of the file, or of stderr where it can't be made."""
        if self.file == 2 and progress.step:
            with suppress(OSError):
                with suppress(FileExistsError):
                    os.mkdir(self.path.parent.name, dir_fd=self.run_dir)
                name = f"{self.path.parent.name}/{self.path.name}"
                self.file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666, dir_fd=self.run_dir)
        return self.file


def _watch(
    progress: Progress,
    stacks_file: Path,
    last_resort: _LastResort,
    rank: int,
    size: int,
    timeout: float,
    done: threading.Event,
) -> None:
    period, worked = min(1.0, timeout / 4), time.process_time()
    while not done.wait(period):
        before, worked = worked, time.process_time()
        if progress.step == 0 and worked - before > BUSY * period:
            progress.moved = time.monotonic()
        limit = timeout if progress.step else timeout + START_MARGIN
        # This thread can't run while another one keeps the interpreter's lock, in a deadlock inside a library say. The
        # timer below lives in C, needs no lock, and fires only when this line stops being reached.
        faulthandler.dump_traceback_later(limit + 4 * GRACE, exit=True, file=last_resort.of(progress))
        if time.monotonic() - progress.moved > limit:
            _write_stacks(progress, stacks_file, rank, limit)
            time.sleep(GRACE)
            _summarize(stacks_file.parent, rank, size)
            os._exit(EXIT_FAULT)


def _write_stacks(progress: Progress, stacks_file: Path, rank: int, timeout: float) -> None:
    """Write where this rank is and its stacks to stderr and to its file, whose first line says where."""
    head = f"rank {rank}: no progress for {timeout:g} s in: {progress}"
    partial = stacks_file.with_suffix(".part")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w") as file:
        file.write(head + "\n")
        file.flush()
        faulthandler.dump_traceback(file=file, all_threads=True)
    os.replace(partial, stacks_file)
    sys.stderr.write(stacks_file.read_text())
    sys.stderr.flush()


def _summarize(folder: Path, rank: int, size: int) -> None:
    """The lowest rank with a report says where each rank was; a rank without one is stopped or unreachable."""
    heads = {r: _first_line(folder / f"rank{r}.txt") for r in range(size)}
    if any(heads[r] for r in range(rank)):
        return
    lines = [heads[r] or f"rank {r}: no report: it is stopped, gone, or can't write there" for r in range(size)]
    sys.stderr.write(
        "\n".join(["error: the run stands still; where each rank was:", *(f"  {line}" for line in lines)])
        + f"\n  stacks: {folder}\n"
    )
    sys.stderr.flush()


def _first_line(path: Path) -> str:
    try:
        return path.read_text().partition("\n")[0]
    except OSError:
        return ""
