"""The open-loop check: predicted beside recorded chunks of a dataset, as one HTML page.

    python -m opentau_train.tools.replay_dataset dataset=ROOT checkpoint=RUN out=open_loop.html
    python -m opentau_train.tools.replay_dataset dataset=ROOT server=ws://HOST:PORT out=open_loop.html
    python -m opentau_train.tools.replay_dataset recording=chunks.npz out=open_loop.html

The first two ask for chunks as `python -m opentau_train.tools.record` does, and take its other arguments; the third
draws what it wrote. The page has the mean absolute error of each dimension in the robot's units, over the chunk, and
both chunks over time. It needs no network.

Exit codes: 0; 2 for a mistake in what was given, with where and a remedy; 1 for what the machine does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opentau_train import cli
from opentau_train.errors import EXIT_OK, UserError
from opentau_train.tools.options import answer, parse
from opentau_train.tools.out import make_directory, writing
from opentau_train.tools.record import Source, in_words, recorded


@dataclass(frozen=True)
class Options(Source):
    """The command line."""

    recording: str | None = None
    out: str = "open_loop.html"

    def check(self, path: str) -> None:
        if self.recording is None:
            super().check(path)
        elif self.dataset or self.checkpoint or self.server:
            raise UserError("a recording has its dataset and policy", where="recording", remedy="set it alone")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    return answer(__doc__, lambda words: work(parse(words, Options)), arguments)


def work(options: Options) -> int:
    """Write the page. Raises `UserError`."""
    from opentau_train.deploy.openloop.page import page
    from opentau_train.deploy.openloop.recording import Recording

    out = Path(options.out).expanduser()
    make_directory(out, "out")
    stored = options.recording
    recording = recorded(options) if stored is None else Recording.load(Path(stored).expanduser())
    with writing(out, "out"):
        out.write_text(page(recording))
    print(in_words(recording), out, sep="\n")
    return EXIT_OK


if __name__ == "__main__":
    cli.end(main())
