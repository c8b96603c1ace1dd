"""What an order costs to decode, from the plan alone: no video is opened but for its index of keyframes."""

from __future__ import annotations

import numpy as np

from opentau_train.data.chunk import chunk_rows, row_step
from opentau_train.data.mixture.mixture import Dataset, Mixture
from opentau_train.data.order.lanes import CONSECUTIVE
from opentau_train.data.order.tape import Tape

COSTLY = 1.2
"""Decoded frames a frame used from which a plan is warned of."""


def beyond(mixture: Mixture, dataset: Dataset) -> int:
    """Frames that a lane reads of its neighbours' windows: the history of its first, the future of its last."""
    window = dataset.window(mixture.spec)
    step = row_step(dataset.source.fps, window.fps)
    return sum(chunk_rows(steps + 1, step) - 1 for steps in (window.history, window.future * window.future_stride))


def decoded_a_frame(mixture: Mixture, tape: Tape) -> dict[str, float]:
    """{dataset: frames that are decoded for one window over the first phase}, of those whose videos' keyframes are
    known: each of its frames once, and in vain those between a keyframe and a lane's or a block's beginning."""
    low, share = np.zeros(len(tape.draws)), tape.draws // tape.num_phases
    for d, begins in tape.lane_begins():
        blocks = tape.datasets[d]
        if blocks.groups is not None:
            group = blocks.groups[np.searchsorted(blocks.groups, begins, side="right") - 1].astype(np.int64)
            block = np.searchsorted(blocks.ends, begins, side="right")
            inside = begins > (blocks.ends - blocks.length)[block]
            low[d] += ((begins - group) * blocks.stride).sum() + beyond(mixture, mixture.datasets[d]) * inside.sum()
    return {
        b.name: b.stride + float(b.lead.sum()) / b.num_windows + float(low[d]) / max(1, int(share[d]))
        for d, b in enumerate(tape.datasets)
        if b.lead is not None and tape.draws[d]
    }


def num_lanes(tape: Tape) -> int:
    """Lanes of the first phase: at most the tape's, fewer where groups of pictures are too long for as many."""
    return sum(len(begins) for _, begins in tape.lane_begins())


def decode_lines(mixture: Mixture, tape: Tape) -> list[str]:
    """The plan's line on decoding, with a warning for each dataset that costs more than it need."""
    if tape.in_order:
        return []
    found = decoded_a_frame(mixture, tape)
    unknown = [
        b.name for b, d in zip(tape.datasets, mixture.datasets, strict=True) if b.lead is None and d.source.frame_sizes
    ]
    parts = [f"{cost:.2f} {name}" for name, cost in found.items()] + [f"unknown {name}" for name in unknown]
    if not parts:
        return []
    lines = [
        f"decoding   frames decoded for one used: {', '.join(parts)}; {num_lanes(tape)} lanes in {tape.num_stretches} "
        "stretches"
    ]
    for name, cost in found.items():
        dataset = next(d for d in mixture.datasets if d.name == name)
        stride = dataset.train.stride
        if cost > COSTLY * stride:
            lines.append(
                f"warning    '{name}' decodes {cost:.1f} frames for one used: python -m opentau_train.tools.reencode "
                f"{dataset.settings.root} --out NEW --gop {proposed_gop(tape)}"
            )
    return lines


def proposed_gop(tape: Tape) -> int:
    """Frames from one keyframe to the next with which the plan would decode little in vain: a group that one lane can
    read whole, and of which the ends of stretches cost little."""
    size = tape.epoch_size / tape.num_phases
    return int(max(2, min(30, CONSECUTIVE * size / tape.batch_size, size / 20 / tape.num_stretches)))
