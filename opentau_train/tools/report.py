"""One HTML page that compares runs: losses, speed, held-out losses, sampled actions, settings, checkpoints.

    python -m opentau_train.tools.report RUN [RUN ...] [--out report.html] [--force]
    python -m opentau_train.tools.report multirun/2026-11-27_10-00-00 --out sweep.html

RUN is a run directory, or a directory of some, such as a sweep's. The page needs a browser and nothing else: no server,
no network. It needs plotly to be written: pip install "opentau_train[report]". A file that is there is overwritten only
with --force. Exit codes: 0, or 2 for a mistake in what was given.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from opentau_train import cli
from opentau_train.errors import EXIT_OK
from opentau_train.tools.options import Parser
from opentau_train.tools.out import check_absent, check_page, make_directory, writing


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    parser = Parser("report", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories, or directories of some")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page's file (report.html)")
    parser.add_argument("--force", action="store_true", help="overwrite the file")

    def work() -> int:
        options = parser.parse_args(arguments)
        write(options.runs, options.out, options.force)
        return EXIT_OK

    return cli.answer(work)


def write(folders: Sequence[Path], out: Path, force: bool = False) -> None:
    """Write the page on the runs in `folders` to `out`, and say where it is. Raises `UserError`."""
    from opentau_train.tools.reporting.page import page
    from opentau_train.tools.reporting.runs import read_runs

    check_page(out)
    check_absent(out, force)
    runs, passed = read_runs(folders)
    make_directory(out)
    text = page(runs, out)
    with writing(out):
        out.write_text(text, encoding="utf-8")
    for folder in passed:
        sys.stderr.write(f"passed over: {folder} has no metrics.jsonl\n")
    print(f"{out.absolute()}  ({len(runs)} run{'s' * (len(runs) > 1)}, {len(text.encode()) / 2**20:.1f} MiB)")


if __name__ == "__main__":
    cli.end(main())
