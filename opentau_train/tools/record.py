"""What a policy, or a server's, predicts for a dataset's observations, in a file that tools.replay_dataset draws.

    python -m opentau_train.tools.record dataset=ROOT checkpoint=RUN out=chunks.npz [device=auto] [base=PATH]
    python -m opentau_train.tools.record dataset=ROOT server=ws://HOST:PORT out=chunks.npz [token_file=FILE]
        both: [episodes=3] [episodes='[4,7]'] [every=N] [seed=0] [norm_head=NAME] [source.KEY=VALUE ...]

`dataset`: the directory of a LeRobot dataset, read as the policy's own was; `source.KEY` are settings as those of
data.sources.NAME where it is another one. `episodes`: so many, or those with these numbers. `every`: a chunk every N
frames, by default end to end.

Exit codes: 0; 2 for a mistake in what was given, with where and a remedy; 1 for what the machine does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from opentau_train import cli
from opentau_train.config.bounds import Count
from opentau_train.errors import EXIT_OK, UserError
from opentau_train.log import log_to
from opentau_train.tools.options import answer, parse, read_token
from opentau_train.tools.out import make_directory, writing

if TYPE_CHECKING:
    from opentau_train.deploy.openloop.players import Player
    from opentau_train.deploy.openloop.recording import Recording


@dataclass(frozen=True)
class Source:
    """Whom to ask, and about what."""

    dataset: str | None = None
    checkpoint: str | None = None
    server: str | None = None
    device: Literal["auto", "cpu"] = "auto"
    base: str | None = None
    token_file: str | None = None
    norm_head: str | None = None
    episodes: Count | tuple[int, ...] = 3
    every: Count | None = None
    seed: int = 0
    source: dict[str, Any] = field(default_factory=dict)

    def check(self, path: str) -> None:
        if self.dataset is None:
            raise UserError("dataset is required but not set", remedy="add dataset=ROOT, of a LeRobot dataset")
        if (self.checkpoint is None) == (self.server is None):
            raise UserError(
                "one of checkpoint and server must be set", remedy="add checkpoint=RUN or server=ws://HOST:PORT"
            )


@dataclass(frozen=True)
class Options(Source):
    """The command line."""

    out: str = "chunks.npz"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    return answer(__doc__, lambda words: work(parse(words, Options)), arguments)


def work(options: Options) -> int:
    """Write the file. Raises `UserError`."""
    out = Path(options.out).expanduser()
    make_directory(out, "out")
    recording = recorded(options)
    with writing(out, "out"):
        recording.save(out)
    print(in_words(recording), out, sep="\n")
    return EXIT_OK


def recorded(options: Source) -> Recording:
    """Ask for the chunks. Raises `UserError`."""
    from opentau_train.deploy.openloop.collect import collect, open_dataset

    with log_to(sys.stderr, True), player(options) as asked:
        source, settings = open_dataset(os.path.expanduser(options.dataset or ""), asked.reads, options.source)
        return collect(asked, source, settings, options.episodes, options.every, options.seed)


@contextmanager
def player(options: Source) -> Iterator[Player]:
    """The policy, or the connection to a server's, which is closed when the block ends. Raises `UserError`."""
    from opentau_train.deploy.openloop.players import OwnPolicy, Served

    if options.server is not None:
        from opentau_train.deploy.serving.client import Client

        client = Client(options.server, read_token(options.token_file))
        try:
            yield Served(client, options.norm_head)
        finally:
            client.close()
        return
    import torch

    from opentau_train.deploy.policy import load_policy

    assert options.checkpoint is not None, "`check` asks for one of both"
    device = "cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu"
    policy = load_policy(options.checkpoint, device, base=options.base)
    yield OwnPolicy(options.checkpoint, policy, options.norm_head)


def in_words(recording: Recording) -> str:
    """The errors, a line for each dimension."""
    about = recording.about
    names = zip(about["action_names"], about["units"], recording.mae.tolist(), strict=True)
    lines = [f"MAE of {name}: {error:.4g}{' ' if unit else ''}{unit}" for name, unit, error in names]
    return "\n".join([f"{len(recording)} chunks of {about['policy']}", *lines])


if __name__ == "__main__":
    cli.end(main())
