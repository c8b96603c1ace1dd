"""What reading a window takes of a core, measured on some, and whether a rank's workers keep up with its steps."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import islice

from opentau_train.config.settings import Settings
from opentau_train.data.load.stream import ShardDataset, TrainPlan
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.tools.decoding import num_lanes


def cost_of_a_window(mixture: Mixture, batch_size: int, num: int) -> tuple[float, int]:
    """(CPU seconds a window, windows that were timed) of about `num` windows, read as a worker does, in this process.

    The first windows of the lanes open files and aren't timed, nor is more than half of what is read. Raises
    `Explained` for what ends a worker.
    """
    tape = mixture.tape(batch_size)
    steps = max(2, num // batch_size)
    untimed = min(steps // 2, -(-num_lanes(tape) // batch_size))
    shards = iter(ShardDataset(mixture, TrainPlan(tape, 0, 1, 0, steps), train=True))
    started, windows = time.process_time(), 0
    for number, shard in enumerate(islice(shards, steps)):
        if shard.error is not None:
            raise shard.error
        if number < untimed:
            started = time.process_time()
        else:
            windows += len(shard.t)
    return (time.process_time() - started) / windows, windows


def reading_lines(
    settings: Settings, mixture: Mixture, num_ranks: Sequence[int], num: int, step_ms: float | None
) -> list[str]:
    """The report's lines on reading; with `step_ms`, milliseconds that a step takes a device, what a step waits in
    launches of each of `num_ranks`."""
    size, workers = settings.trainer.global_batch_size, settings.data.num_workers
    seconds, windows = cost_of_a_window(mixture, size, num)
    lines = [
        f"reading    {1e3 * seconds:.2f} ms of a core a window ({windows} read here): a worker on a core of its own "
        f"feeds {1 / seconds:,.0f} samples/s"
    ]
    if step_ms is None:
        return lines
    for ranks in num_ranks:
        share = size // ranks
        read = 1e3 * seconds * share
        # Without workers the step's own process reads, before it computes.
        wait = read if workers == 0 else max(0.0, read / workers - step_ms)
        lines.append(
            f"waiting    {wait:.1f} ms of a step of {step_ms + wait:.1f} ms ({wait / (step_ms + wait):.0%}): {share} "
            f"samples a rank, {workers} workers; {math.ceil(read / step_ms)} would keep up; {ranks} ranks"
        )
    return lines
