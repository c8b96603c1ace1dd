"""Run so many cases, each target its share of them, or all of them on some targets:

    python -m tests.fuzz NUM [SEED] [TARGET ...]

Prints how many ended how. Exit code 1, with the smallest case found, where one ends in a traceback, hangs or takes more
memory than `MEMORY`.
"""

from __future__ import annotations

import faulthandler
import logging
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.targets import ENDINGS, TARGETS, Case, Room

MEMORY = 2 * 2**30
PATIENCE_S = 60
AT_ONCE = 2000
"""Cases that hypothesis keeps in mind."""


def run(case: Case, num: int, first: int) -> Counter[str]:
    """Make `num` cases of one target. Raises what one of them raises."""
    ended: Counter[str] = Counter()
    for start in range(0, num, AT_ONCE):

        @seed(first + start)
        @settings(
            max_examples=min(AT_ONCE, num - start),
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
        )
        @given(st.data())
        def cases(data):
            faulthandler.dump_traceback_later(PATIENCE_S, exit=True)
            try:
                case(data)
                ended["read"] += 1
            except ENDINGS as error:
                ended["refused"] += 1
                assert len(str(error).splitlines()) <= 3, f"more than three lines: {error}"
            finally:
                faulthandler.cancel_dump_traceback_later()

        cases()
    return ended


def main(arguments: list[str]) -> int:
    num, first, names = int(arguments[0]), int((arguments[1:] or [0])[0]), arguments[2:] or list(TARGETS)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    failed = False
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        room = Room(Path(folder))
        cases = {name: TARGETS[name].make(room) for name in names}
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        total = sum(TARGETS[name].share for name in names)
        for name in names:
            begun = time.monotonic()
            try:
                ended = run(cases[name], -(-num * TARGETS[name].share // total), first)
            except Exception:
                traceback.print_exc()
                print(f"{name}: FAILED", flush=True)
                failed = True
                continue
            print(f"{name}: {sum(ended.values()):,} cases, {dict(ended)}, {time.monotonic() - begun:.0f} s", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory {peak / 1e9:.2f} GB")
    return int(failed or peak > MEMORY)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
