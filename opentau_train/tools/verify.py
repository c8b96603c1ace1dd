"""Are the files of a checkpoint as they were written?

    python -m opentau_train.tools.verify RUN/checkpoints/00001000 [MORE ...]

Reads every file and compares it with its hash in files.json. A run stands for its newest whole checkpoint.

Exit codes: 0 where all are as they were written, 2 where one isn't or none is there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from opentau_train import cli
from opentau_train.checkpoints import commit, manifest
from opentau_train.errors import EXIT_OK, EXIT_USER
from opentau_train.tools.options import Parser


def verify(given: str) -> bool:
    """Print what holds of the checkpoint; returns whether it is as it was written. Raises `UserError` where there is
    none."""
    checkpoint = commit.at(given)
    files = manifest.read(checkpoint)
    unknown = sum(file.xxh3 is None for file in files.values())
    why = manifest.damage(checkpoint)
    size = sum(file.size for file in files.values())
    words = why or f"{len(files)} files, {size / 1e6:,.1f} MB, as they were written"
    if unknown:
        words += f"; {unknown} have no hash: an older version wrote it"
    print(f"{checkpoint}: {words}")
    return why is None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    parser = Parser("verify", __doc__)
    parser.add_argument("checkpoints", nargs="+", help="checkpoints, or runs")
    options = parser.parse_args(arguments)
    return cli.answer(lambda: EXIT_OK if all([verify(given) for given in options.checkpoints]) else EXIT_USER)


if __name__ == "__main__":
    sys.exit(main())
