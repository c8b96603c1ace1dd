"""Trains several runs one after another in the same processes: starting a process, and what it does the first time,
takes longer than a small run.

    python -m tests.several RUNS        torchrun --nproc-per-node 2 -m tests.several RUNS

`RUNS` is a JSON list of the program's arguments, a list a run. Each has a process group, compiled code and random
numbers of its own; the first that fails is the last.
"""

from __future__ import annotations

import gc
import json
import os
import sys

import torch
import torch._inductor.config
import torch.distributed as dist
from accelerate.state import AcceleratorState

from opentau_train import cli

_groups: list[dist.ProcessGroup] = []
"""Those of past runs. They are left to the process's end, as the program leaves its own: gloo's destructor may hang."""


def forget() -> None:
    """Make this process one that has joined no launch and compiled nothing."""
    if dist.is_initialized():
        _groups.extend(dist.distributed_c10d._world.pg_map)
        dist.destroy_process_group()
    AcceleratorState._reset_state(True)
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()  # what a first run imported


def main(runs: list[list[str]]) -> None:
    gc.freeze()
    torch._inductor.config.compile_threads = 1  # more begin with a process that imports torch
    for number, arguments in enumerate(runs):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # the store is torchrun's: keys of its own for each run
        sys.argv[1:] = arguments
        code = cli.answer(cli._compose_and_run)
        if code:
            sys.stderr.write(f"it was this run: {arguments}\n")
            cli.end(code)
        forget()
    cli.end(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
