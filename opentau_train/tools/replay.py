"""Send the numbers of a run that is over, or was logged elsewhere, to trackers.

    python -m opentau_train.tools.replay RUN logger=wandb
    python -m opentau_train.tools.replay runs/droid logger=[mlflow,tensorboard] logger.mlflow.project=robots

Reads metrics.jsonl, which every run has, and the pictures in plots/. `logger=...` and `logger.NAME.KEY=VALUE` mean what
they mean for a training, `logger=[A,B]` several; the configuration that is shown there is the run's. A tracker that
knows the run already (by its directory) goes on with it as after a resume. The run's own files aren't changed, but for
what the tracker keeps beside them. Exit codes: 0; 1 where a tracker didn't take all; 2 for a mistake.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from opentau_train import composing, strangers
from opentau_train.config.typed import instantiate
from opentau_train.errors import EXIT_FAULT, EXIT_OK, UserError
from opentau_train.sinks.base import Sink, SinkContext, Sinks
from opentau_train.sinks.jsonl import read_rows, split
from opentau_train.sinks.trackers import TrackerSink
from opentau_train.tools.options import answer

EVERY = 500
"""Steps after which a tracker is waited for: it keeps no more calls than `background.LIMIT`."""
PLOT = re.compile(r"(?P<name>.+)_(?P<step>\d{8})\.png")
TAGS = {"actions": "Validation-Action/Chunks", "video": "Validation-Video/Strips"}
"""{start of a picture's file name: the tag that the run showed it under}; others are shown under their file's name."""


def replay(run: Path, overrides: Sequence[str]) -> tuple[int, list[str]]:
    """Send all steps of `run` to the sinks that the `overrides` choose. Returns how many steps there are, and the
    names of those that didn't take all. Raises `UserError`."""
    with strangers.understood("the run's configuration", run / "config.yaml"):
        config = strangers.mapping(yaml.safe_load(strangers.read_bytes(run / "config.yaml")))
    try:
        rows = read_rows(run)
    except OSError as error:
        raise UserError(f"no numbers there: {error}", where=str(run), remedy="give a run directory") from error
    context = SinkContext(run, run.resolve().name, max(rows, default=0), 0, config)
    pictures, opened = _pictures(run / "plots"), dict[str, Sink]()
    with ExitStack() as stack:
        for name, options in _chosen(overrides).items():
            opened[name] = instantiate(options, f"logger.{name}", context=context)
            stack.callback(opened[name].close)
        sinks = Sinks(list(opened.values()))
        for number, (step, row) in enumerate(rows.items(), start=1):
            for part in split(row):
                sinks.write(step, part)
            for tag, file in pictures.get(step, ()):
                sinks.image(step, tag, np.asarray(Image.open(file).convert("RGB")))
            if number % EVERY == 0 or number == len(rows):
                _wait(sinks.sinks)
    failed = [n for n, sink in opened.items() if isinstance(sink, TrackerSink) and not sink.complete]
    return len(rows), failed


def _chosen(overrides: Sequence[str]) -> dict[str, Any]:
    """The trackers of the command line, as conf/logger/ describes them. Raises `UserError`."""
    other = next((word for word in overrides if not word.lstrip("+").startswith(("logger=", "logger."))), None)
    if other is not None:
        raise UserError(f"'{other}' says nothing of a tracker", remedy="only logger=... and logger.NAME.KEY=VALUE")
    tree: dict[str, Any] = composing.compose(overrides)["logger"]
    if not any(word.startswith("logger=") for word in overrides) or not tree.keys() - {"console"}:
        remedy = "add logger=wandb, or logger=[mlflow,tensorboard]"
        raise UserError("no tracker is named that the numbers go to", where="logger", remedy=remedy)
    return tree


def _wait(sinks: Sequence[Sink]) -> None:
    for sink in sinks:
        if isinstance(sink, TrackerSink):
            sink.wait()


def _pictures(folder: Path) -> dict[int, list[tuple[str, Path]]]:
    """{step: [(tag, file)]} of the pictures of a run."""
    found: dict[int, list[tuple[str, Path]]] = {}
    for file in sorted(folder.glob("*.png")):
        if match := PLOT.fullmatch(file.name):
            name = match["name"]
            found.setdefault(int(match["step"]), []).append((TAGS.get(name, f"Validation/{name}"), file))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""

    def work(given: Sequence[str]) -> int:
        places = [word for word in given if "=" not in word]
        if len(places) != 1:
            raise UserError("give one run directory", remedy="python -m opentau_train.tools.replay RUN logger=wandb")
        num, failed = replay(Path(places[0]).expanduser(), [word for word in given if "=" in word])
        if failed:
            print(f"{', '.join(failed)} didn't take all of the {num:,} steps: see above", file=sys.stderr)
            return EXIT_FAULT
        print(f"{num:,} steps of {places[0]} were sent")
        return EXIT_OK

    return answer(__doc__, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
