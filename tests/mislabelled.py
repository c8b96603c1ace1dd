"""Small datasets whose actions follow from the state alone, and the same with wrong labels."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from tests.lerobot_writer import Dataset, vector, write
from tests.program import TINY_POLICY

FRAMES = 40


def write_source(root: Path, seed: int, *, episodes: int = 24, wrong: Collection[int] = ()) -> Path:
    """A dataset without cameras: in each episode the state wanders, and each action is a fixed function of it, with the
    sign turned in the `wrong` episodes."""
    rng = np.random.default_rng(seed)
    turn = np.random.default_rng(0).normal(size=(4, 3))  # the same robot in all sources
    state = np.zeros((episodes, FRAMES, 4))
    for f in range(FRAMES):  # stationary: an episode can't be told by where its state is
        state[:, f] = 0.7 * state[:, f - 1] + 0.7 * rng.normal(size=(episodes, 4))
    actions = np.tanh(state @ turn) * np.where(np.isin(np.arange(episodes), list(wrong)), -1.0, 1.0)[:, None, None]
    columns = {
        "observation.state": (vector(4)[0], lambda e, f: state[e, f].tolist()),
        "action": (vector(3)[0], lambda e, f: actions[e, f].tolist()),
    }
    return write(root, Dataset(lengths=(FRAMES,) * episodes, cameras={}, columns=columns))


def training(roots: dict[str, Path], steps: int) -> list[str]:
    """The arguments of a run on these sources, one of which is `main`, with a policy whose steps take milliseconds."""
    sources = [
        argument
        for name, root in roots.items()
        for argument in (f"data.sources.{name}.root={root}", f"data.sources.{name}.val_split_ratio=0.3")
    ]
    return [
        "+recipe=lerobot",
        *sources,
        *TINY_POLICY,
        "data.num_workers=0",
        "data.chunk_length=4",
        "trainer.global_batch_size=32",
        f"trainer.steps={steps}",
        "optimizer.lr=2e-3",
        "scheduler.warmup_steps=10",
        f"validation.every={steps}",
        f"checkpoint.every={steps // 4}",
        "flight_recorder=true",
        "logger=none",
    ]
