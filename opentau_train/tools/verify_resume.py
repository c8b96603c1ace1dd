"""Does a resume of this configuration, on this machine, go on as if nothing had happened? Runs it and compares.

    python -m opentau_train.tools.verify_resume +recipe=droid_policy [KEY=VALUE ...]
    python -m opentau_train.tools.verify_resume --ranks 2,1,4 --steps 8 --stop 4 +recipe=droid_policy

Trains a few steps without a stop on the first number of ranks; stops a second run after some of them; resumes it on
each number of ranks. The sample ids of every step must be equal, the losses bit for bit on the same number of ranks and
within --tolerance on others, where sums are rounded in another order. Prints a certificate. Exit codes: 0 if it holds,
1 if not, 2 for a mistake in the settings.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opentau_train import __version__
from opentau_train.checkpoints import commit
from opentau_train.errors import EXIT_FAULT, EXIT_OK, EXIT_USER, UserError
from opentau_train.sinks.jsonl import read_rows
from opentau_train.tools.options import Parser

SAMPLES = "Training/BatchId"
OURS = ("resume=", "paths.run_dir=", "trainer.steps=", "trainer.stop_after=")

Rows = dict[int, dict[str, float]]


@dataclass(frozen=True)
class Comparison:
    """A resumed run against the uninterrupted one, over the steps of both: `ids` equal, the largest relative
    difference of a loss, and where it is."""

    ranks: int
    ids: bool
    difference: float
    where: str
    limit: float

    @property
    def holds(self) -> bool:
        return self.ids and self.difference <= self.limit

    def __str__(self) -> str:
        ids = "sample ids equal" if self.ids else "SAMPLE IDS DIFFER"
        losses = "losses equal bit for bit"
        if self.difference > 0:
            losses = f"losses within {self.difference:.1e} (limit {self.limit:.1e}, largest: {self.where})"
        return f"{self.ranks} rank{'s' if self.ranks > 1 else ' '}: {ids}, {losses}: {'ok' if self.holds else 'FAILED'}"


def verify(overrides: Sequence[str], ranks: Sequence[int], steps: int, stop: int, limits: tuple[float, float]) -> bool:
    """Run, stop, resume, compare and print. `limits`: the largest relative difference of a loss on the same number of
    ranks, and on others. Raises `UserError` with the program's own message where it refuses the settings."""
    if not 0 < stop < steps:
        raise UserError(f"--stop {stop} must lie between 0 and --steps {steps}", remedy="give e.g. --steps 8 --stop 4")
    for override in overrides:
        if override.lstrip("+").startswith(OURS):
            raise UserError(f"{override} is set by this tool", remedy="leave it out; --steps and --stop set the length")
    common = [*overrides, f"trainer.steps={steps}", "trainer.log_every=1", "checkpoint.every=0", "validation.every=0"]
    if not any(o.startswith("logger=") for o in overrides):
        common.append("logger=none")
    with tempfile.TemporaryDirectory(prefix="verify_resume_") as folder:
        whole, stopped = Path(folder, "whole"), Path(folder, "stopped")
        _say(f"{steps} steps without a stop on {ranks[0]} rank(s)")
        _train(common, whole, ranks[0], steps)
        _say(f"{stop} steps, then a stop")
        _train([*common, f"trainer.stop_after={stop}"], stopped, ranks[0], stop)
        expected, comparisons = read_rows(whole), []
        for num in ranks:
            _say(f"resumed on {num} rank(s)")
            resumed = Path(folder, f"resumed_{num}")
            shutil.copytree(stopped, resumed, symlinks=True)
            _train([*common, "resume=auto"], resumed, num, steps)
            comparisons.append(compare(expected, read_rows(resumed), steps, num, limits[num != ranks[0]]))
        digest = hashlib.blake2b(" ".join(sorted(overrides)).encode(), digest_size=4).hexdigest()
    holds = all(c.holds for c in comparisons)
    print(f"certificate of resume, opentau_train {__version__}, settings {digest}: {' '.join(overrides)}")
    print(
        f"  {steps} steps on {ranks[0]} rank(s), stopped after {stop}, compared with an uninterrupted run; resumed on"
    )
    for comparison in comparisons:
        print(f"    {comparison}")
    print(f"  this configuration {'resumes exactly' if holds else 'DOES NOT RESUME'}")
    return holds


def compare(expected: Rows, resumed: Rows, steps: int, ranks: int, limit: float) -> Comparison:
    """Every step of `expected` against `resumed`, both {step: {tag: value}}; a loss that one lacks differs wholly."""
    complete = set(expected) == set(resumed) == set(range(1, steps + 1))
    ids = complete and all(SAMPLES in resumed[s] and resumed[s][SAMPLES] == expected[s][SAMPLES] for s in expected)
    worst, where = 0.0, ""
    for step in sorted(set(expected) | set(resumed)):
        left, right = (_losses(rows.get(step, {})) for rows in (expected, resumed))
        for tag in sorted(left | right):
            same = tag in left and tag in right and left[tag] == right[tag]
            gap = 0.0 if same else float("inf")
            if not same and tag in left and tag in right:
                gap = abs(left[tag] - right[tag]) / max(1.0, abs(left[tag]))
            if not gap <= worst:  # NaN too
                worst, where = gap if gap == gap else float("inf"), f"{tag} at step {step}"
    return Comparison(ranks, ids, worst, where, limit)


def _losses(row: dict[str, float]) -> dict[str, float]:
    """The losses of all groups, the total, and the gradient's norm. Loss terms are the tags in capitals."""
    last = {tag: tag.rpartition("/")[2] for tag in row}
    return {
        t: row[t] for t, n in last.items() if t.startswith("Training/") and (n.isupper() or n in ("Loss", "GradNorm"))
    }


def _train(overrides: Sequence[str], run_dir: Path, ranks: int, last_step: int) -> None:
    """Run the program; it must leave a checkpoint of `last_step`. (torchrun answers every exit code of a rank, also
    that of a stop, with 1.)"""
    launcher = ["-m", "opentau_train"]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *launcher]
    command = [sys.executable, *launcher, *overrides, f"paths.run_dir={run_dir}"]
    env = {**os.environ, "HYDRA_FULL_ERROR": ""}  # with it a user's mistake would come with a traceback
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    saved = commit.newest(run_dir / "checkpoints")
    if saved is None or int(saved.name) != last_step:
        message = done.stderr.partition("error: ")[2]
        if message and "Traceback" not in done.stderr.partition("error: ")[0]:
            told = [line for line in message.splitlines()[:4] if not line.startswith(("W", "E"))]
            raise UserError(told[0], details="\n".join(told[1:]))
        raise RuntimeError(f"no checkpoint of step {last_step} from\n  {' '.join(command)}\n{done.stderr[-4000:]}")


def _say(text: str) -> None:
    sys.stderr.write(f"verify_resume: {text}\n")


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if not numbers or min(numbers) < 1:
        raise ValueError(text)
    return list(dict.fromkeys(numbers))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    parser = Parser("verify_resume", __doc__)
    parser.add_argument(
        "--ranks",
        type=_numbers,
        default=[1, 2],
        help="numbers of ranks to resume on; the first also runs without a stop (1,2)",
    )
    parser.add_argument("--steps", type=int, default=8, help="steps of the whole run (8)")
    parser.add_argument("--stop", type=int, default=4, help="steps before the stop (4)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest relative difference of a loss on another number of ranks (1e-4)",
    )
    parser.add_argument(
        "--tolerance-same", type=float, default=0.0, help="the same on the same number of ranks (0; more for CUDA)"
    )
    options, overrides = parser.parse_known_args(arguments)
    limits = options.tolerance_same, options.tolerance
    try:
        holds = verify(overrides, options.ranks, options.steps, options.stop, limits)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USER
    except RuntimeError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_FAULT
    return EXIT_OK if holds else EXIT_FAULT


if __name__ == "__main__":
    sys.exit(main())
