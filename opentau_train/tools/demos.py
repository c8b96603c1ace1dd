"""Demonstrations of a task by its simulator's scripted expert, as a LeRobot dataset (v3.0).

    python -m opentau_train.tools.demos env=metaworld task=reach-v3 out=DIR [episodes=100] [seed=0] [hold=8]
        [processes=2] [timeout=300] [env.KEY=VALUE ...] [--config-dir DIR]

Noise is put on what the expert does (`env.expert_noise`), not on what is written, so that the data show how errors are
mended. An attempt that misses the goal is left out; one that reaches it goes on for `hold` steps. The same seed gives
the same episodes, whatever `processes`, which are the simulators at a time.

Exit codes: 0; 2 for a mistake in what was given, with where and a remedy; 1 for what the machine does.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from opentau_train.config.bounds import Count, positive
from opentau_train.errors import EXIT_OK, UserError, check_machine
from opentau_train.log import log_to
from opentau_train.simulation.demonstrations import Wanted, write
from opentau_train.tools.environments import parse
from opentau_train.tools.options import answer


@dataclass(frozen=True)
class Options:
    """The command line."""

    env: str
    out: str
    episodes: Count = 100
    seed: int = 0
    hold: Count = 8
    processes: Count = 2
    timeout: Annotated[float, positive] = 300.0

    def check(self, path: str) -> None:
        """Each value is bounded by itself."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    return answer(__doc__, work, arguments)


def work(arguments: Sequence[str]) -> int:
    """Write the dataset that the command line asks for: to a folder beside it first, which then takes its name. Raises
    `UserError`."""
    options, tree = parse(arguments, Options)
    out, started = Path(options.out).expanduser(), time.perf_counter()
    if out.exists():
        raise UserError(f"{out} is there already", where="out", remedy="name a directory that isn't, or remove it")
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.mkdir(parents=True)
        with log_to(sys.stderr, True):
            frames = write(
                partial, tree, Wanted(options.episodes, options.seed, options.hold), options.processes, options.timeout
            )
        partial.rename(out)
    except OSError as error:
        check_machine(error, out)
        raise UserError(f"can't write {out}: {error}", where="out", remedy="name a directory that can be") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{options.episodes} episodes, {frames} frames in {time.perf_counter() - started:.0f} s: {out}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
