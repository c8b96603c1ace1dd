"""Draw a run's curves from its metrics.jsonl as one PNG:

python -m opentau_train.tools.report RUN --out curves.png

A file that is there is overwritten only with --force. Exit codes: 0, or 2 for a mistake in what was given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opentau_train.errors import EXIT_OK, EXIT_USER, UserError
from opentau_train.sinks.jsonl import ABOUT, read_rows
from opentau_train.tools.out import check_format, writing

PANELS = (
    ("loss", ("Training/MSE", "Training/CE")),
    ("gradient norm", ("Training/GradNorm",)),
    ("held-out loss", ("Validation/{group}/MSE",)),
)
"""(title, tags); `{group}` stands for every (dataset, control_mode). Bars are standard errors, where there are any."""


def read_curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value)]} of a run directory. Raises `UserError` where it has no numbers."""
    try:
        rows = read_rows(run)
    except OSError as error:
        raise UserError(f"no numbers there: {error}", where=str(run), remedy="give a run directory") from error
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, row in rows.items():
        for tag, value in row.items():
            if tag not in ABOUT and value is not None:
                curves.setdefault(tag, []).append((step, value))
    return curves


def draw(curves: dict[str, list[tuple[int, float]]], title: str) -> Any:
    """A matplotlib figure with one panel for each of `PANELS`, side by side."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("matplotlib is not installed", remedy="pip install matplotlib") from error
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, (name, patterns) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for pattern in patterns:
            head, _, tail = pattern.partition("{group}")
            group_tags = [
                t for t in curves if t.startswith(head) and t.endswith(tail) and t.count("/") == 3 and "::" not in t
            ]
            for tag in group_tags if tail else [pattern]:
                steps, values = zip(*curves.get(tag, [(0, float("nan"))]), strict=True)
                errors = dict(curves.get(f"{tag}/StdErr", []))
                bars = [errors.get(step, 0.0) for step in steps] if errors else None
                axes.errorbar(steps, values, bars, marker="o" if tail else None, label=tag.partition("/")[2])
        axes.set(title=name, xlabel="optimizer step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m opentau_train.tools.report", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    options = parser.parse_args(arguments)
    try:
        if options.out.exists() and not options.force:
            raise UserError(
                f"{options.out} is there already", where="--out", remedy="name another file, or add --force"
            )
        check_format(options.out)
        figure = draw(read_curves(options.run), options.run.name)
        with writing(options.out):
            figure.savefig(options.out, dpi=110)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USER
    print(options.out)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
