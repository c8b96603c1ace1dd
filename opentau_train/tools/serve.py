"""A policy behind a websocket: openpi's clients connect to it, send observations and get chunks in the robot's units.

    python -m opentau_train.tools.serve checkpoint=RUN port=8000 [host=127.0.0.1] [device=auto] [norm_head=NAME]
        [dataset=NAME] [base=PATH] [rename='{observation/image: front, observation/state: state}'] [seed=0] [steps=N]
        [limits=refuse|clip] [max_batch=8] [max_waiting=32] [max_connections=32] [max_message_mb=16] [timeout=30]
        [idle=3600] [token_file=FILE]

`checkpoint`: what `load_policy` reads. `port=0` takes one that is free, and says which. `rename` tells what a client's
names mean, null: passed over. With `token_file`, or OPENTAU_SERVE_TOKEN in the environment, clients must show the
token, as openpi-client's `api_key` does. SIGINT or SIGTERM ends it with code 0 after the answers that clients wait for,
a second one at once with 130.

Exit codes: 0 once it was ended; 2 for a mistake in what was given; 1 for what the machine does; 130 ended at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from opentau_train import cli
from opentau_train.config.bounds import Count, positive, within
from opentau_train.errors import EXIT_OK, UserError
from opentau_train.log import log_to
from opentau_train.tools.options import answer, parse, read_token

if TYPE_CHECKING:
    from opentau_train.deploy.serving.answers import Answers

log = logging.getLogger("opentau_train.serve")  # not __main__, as it is called where it is started

LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Options:
    """The command line."""

    checkpoint: str
    host: str = "127.0.0.1"
    port: Annotated[int, within(0, 65535)] = 8000
    device: Literal["auto", "cpu"] = "auto"
    norm_head: str | None = None
    dataset: str | None = None
    base: str | None = None
    rename: dict[str, Any] = field(default_factory=dict)
    """{a client's name: the policy's, or None}: of other mappings `typed` leaves None out."""
    seed: int = 0
    steps: Count | None = None
    limits: Literal["refuse", "clip"] | None = None
    max_batch: Count = 8
    max_waiting: Count = 32
    max_connections: Count = 32
    max_message_mb: Annotated[float, positive] = 16.0
    timeout: Annotated[float, positive] = 30.0
    idle: Annotated[float, positive] = 3600.0
    token_file: str | None = None

    def check(self, path: str) -> None:
        for client, name in self.rename.items():
            if not isinstance(name, str | None):
                raise UserError(
                    f"rename.{client}={name!r} is no name", remedy=f"set rename.{client} to a name, or null"
                )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    return answer(__doc__, lambda words: work(parse(words, Options)), arguments)


def work(options: Options) -> int:
    """Serve until a signal comes. The port is taken before the policy is loaded. Raises `UserError`."""
    from opentau_train.deploy.serving import server, wire

    for package in ("websockets", "msgpack"):
        wire.library(package)
    shown = read_token(options.token_file)
    with log_to(sys.stderr, True), server.bind(options.host, options.port) as bound:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _end_early)
        answers = _answers(options)
        bounds = server.Bounds(
            int(options.max_message_mb * 2**20), options.max_connections, options.timeout, options.idle
        )
        serving = server.Server(answers, bound, bounds, shown)
        host, port = bound.getsockname()[:2]
        shown_host = f"[{host}]" if ":" in host else host
        if host not in LOCAL and shown is None:
            log.warning("%s is open to other machines, and no token is asked for: set token_file", host)

        def ready() -> None:
            print(f"serving {options.checkpoint} at ws://{shown_host}:{port}", flush=True)

        serving.run(ready)
        print(
            f"{answers.num_answered} chunks in {answers.num_batches} batches; {serving.gate.num_dropped} connections "
            f"dropped, {serving.gate.num_refused} without the token"
        )
        if not answers.close(bounds.grace):
            sys.stdout.flush()
            os._exit(EXIT_OK)  # a batch is still computed, in a thread that the interpreter's end can't wait for
    return EXIT_OK


def _end_early(*_: object) -> None:
    """A server that is ended while it loads did what it was asked for, too."""
    sys.stderr.write("ended before it served\n")
    sys.stderr.flush()
    os._exit(EXIT_OK)


def _answers(options: Options) -> Answers:
    """Load the policy, and compute a chunk."""
    import torch

    from opentau_train.deploy.policy import load_policy
    from opentau_train.deploy.serving.answers import Answers
    from opentau_train.deploy.serving.requests import Terms

    device = "cuda" if options.device == "auto" and torch.cuda.is_available() else "cpu"
    policy = load_policy(
        options.checkpoint, device, norm_head=options.norm_head, dataset=options.dataset, base=options.base
    )
    terms = Terms(policy, options.rename, options.seed, options.steps, options.limits, options.max_batch)
    answers = Answers(terms, options.max_waiting)
    answers.warm_up()
    return answers


if __name__ == "__main__":
    cli.end(main())
