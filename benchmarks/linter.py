"""What the linter of `tools.check` finds on generated sources whose conventions are known, and what it finds wrongly.

    python benchmarks/linter.py [--sources 200] [--only NAME]

Each row of the table is a source as it is declared rightly, or one thing about it planted wrongly; its columns are the
answers on that thing, and how many sources had any contradiction, and any doubt, that wasn't planted.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import product

from support.cases import CASES

from opentau_train.config.bounds import at_least
from opentau_train.data.mixture.table import align

ANSWERS = ("contradiction", "doubt", "agree", "found", "unknown")


def table(num_sources: int, only: str = "") -> Iterator[tuple[str, ...]]:
    """The rows of the table: shares of the sources."""
    yield ("source", "data allow", *ANSWERS, "others wrong", "others doubted")
    chosen = [case for case in CASES if only in case.name]
    answers, others = {case.name: Counter[str]() for case in chosen}, Counter[tuple[str, str]]()
    for seed, case in product(range(num_sources), chosen):  # a seed's sources are generated once for all cases
        judged = case.judged(seed)
        answers[case.name][case.read(judged)] += 1
        others.update((case.name, a) for a in {v.answer for v in judged.verdicts if not case.is_planted(v)})
    for case in chosen:
        counts = [answers[case.name][a] if case.asked else None for a in ANSWERS]
        counts += [others[case.name, a] for a in ("contradiction", "doubt")]
        yield (
            case.name,
            case.allowed if case.asked else "",
            *("" if num is None else f"{num / num_sources:.1%}" for num in counts),
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=int, default=200)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    at_least("--sources", options.sources, 1)
    print("\n".join(align(list(table(options.sources, options.only)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
