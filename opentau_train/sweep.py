"""A sweep, `--multirun`: Hydra's sweeper chooses the values, its launcher the place, and each run is its own process.

    python -m opentau_train --multirun +recipe=droid_policy optimizer.lr=1e-3,3e-4 seed=0,1
    python -m opentau_train --multirun +recipe=droid_policy +hparams_search=lr

A run is what the same words start by themselves, `python -m opentau_train WORDS`, or torchrun where NPROC_PER_NODE in
the environment says more than one, in a directory of its own below `hydra.sweep.dir`. Nothing of one run, such as its
random state or memory, reaches another.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.hydra_config import HydraConfig

from opentau_train.config.arguments import MULTIRUN, settable
from opentau_train.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_PREEMPTED, UserError
from opentau_train.sinks.jsonl import read_rows

OBJECTIVE = "Validation/Loss"
"""What a sweeper that searches minimises: the lowest of a run."""


class Ended(NamedTuple):
    """A run of the sweep that has ended."""

    folder: Path
    words: tuple[str, ...]
    code: int
    loss: float


class _Stopped(BaseException):
    """A run was stopped from outside, so the sweep is too. Hydra goes on after an Exception."""


_ended: list[Ended] = []
"""The runs that this process started. (A launcher that starts them elsewhere tells of them in its own way.)"""


def run(arguments: Sequence[str]) -> int:
    """Sweep over the arguments' values. The exit code is that of the first run that failed, 0 where none did; a run
    that failed keeps no other from running, one that was stopped ends the sweep. Raises `UserError`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        remedy = "leave torchrun out, and set NPROC_PER_NODE=N in the environment"
        raise UserError("a sweep starts the ranks of each run itself", where="--multirun", remedy=remedy)
    _ended.clear()
    sys.argv[1:] = ["--multirun", *(settable(word) for word in arguments if word not in MULTIRUN)]
    try:
        _one()
    except _Stopped:
        sys.stderr.write("the sweep ends with a run that was stopped; its words with resume=auto go on with that one\n")
    common = set.intersection(*(set(ended.words) for ended in _ended)) if _ended else set()
    for ended in _ended:
        how = f"{OBJECTIVE} {ended.loss:.6g}" if ended.code == EXIT_OK else f"exit code {ended.code}"
        own = " ".join(word.lstrip("+") for word in ended.words if word not in common)
        print(f"{ended.folder}  {how}  {own}")
    return next((ended.code for ended in _ended if ended.code != EXIT_OK), EXIT_OK)


@hydra.main(version_base="1.3", config_path="pkg://opentau_train.conf", config_name="train")
def _one(composed: Any) -> float:
    """Train one run of the sweep, where Hydra's launcher calls this; its objective, infinite where it failed."""
    about = HydraConfig.get()
    folder = Path(about.sweep.dir).absolute() / str(about.sweep.subdir)
    ranks = os.environ.get("NPROC_PER_NODE", "1")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks != "1" else []
    words = tuple(
        w for w in about.overrides.task if not w.lstrip("+").startswith(("hydra.", "hydra/", "hparams_search="))
    )
    command = [sys.executable, *launcher, "-m", "opentau_train", *words, f"++paths.run_dir={folder}"]
    # With HYDRA_FULL_ERROR, which Hydra needs here, a mistake would come with a traceback.
    with subprocess.Popen(command, env={**os.environ, "HYDRA_FULL_ERROR": ""}) as process, _passing_on(process):
        code = process.wait()
    ended = Ended(folder, words, code, _objective(folder) if code == EXIT_OK else math.inf)
    _ended.append(ended)
    if code in (EXIT_PREEMPTED, EXIT_INTERRUPTED) or code < 0:
        raise _Stopped
    return ended.loss


@contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Signals that ask this process to stop ask the run in its place. A terminal's Ctrl-C reaches both anyway."""
    handlers = {s: signal.signal(s, lambda number, _: process.send_signal(number)) for s in _STOPS}
    handlers[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


_STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def _objective(folder: Path) -> float:
    try:
        rows = read_rows(folder)
    except (OSError, UserError):  # ended before its first row
        return math.inf
    return min((row[OBJECTIVE] for row in rows.values() if row.get(OBJECTIVE) is not None), default=math.inf)
