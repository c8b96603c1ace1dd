"""A dataset in memory behind the `Source` protocol: `_target_: tests.fake_source.FakeSource` with `lengths: [5, 7, 3]`.

With `bad: 0.2` that share of the windows can't be read, with `slow: true` every read takes a random time. Each window's
picture says which window it is.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import hydra
import numpy as np
import torch

from opentau_train import composing, rng
from opentau_train.config.arguments import settable
from opentau_train.config.data import SourceSettings
from opentau_train.config.settings import Settings, load_settings
from opentau_train.config.typed import build
from opentau_train.data.load.stream import RankBatch, training_batches
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.mixture.open import open_mixture
from opentau_train.data.source import Keyframes, whole_episodes
from opentau_train.distributed.world import World
from opentau_train.errors import BadSample
from opentau_train.types import EpisodeTable, RawWindow, WindowSpec

READS: list[tuple[str, int, int]] = []
"""Every window read in this process: (dataset, episode, frame)."""

ONE = World(0, 1, 0, 1, torch.device("cpu"), None)


@dataclass(frozen=True)
class FakeSource:
    """Its options: the frames of each episode, the share of unreadable windows, whether reads take their time, and the
    frames from one keyframe to the next, 0 where nobody knows."""

    selects: ClassVar[bool] = False

    lengths: tuple[int, ...]
    bad: float = 0.0
    slow: bool = False
    gop: int = 0

    def open(self, name: str, settings: SourceSettings) -> FakeDataset:
        table = EpisodeTable(
            episode_index=np.arange(len(self.lengths)) + 1000,
            length=np.array(self.lengths, np.int32),
            control_mode=np.zeros(len(self.lengths), np.int16),
            control_modes=("joint",),
        )
        return FakeDataset(name, table, self.bad, self.slow, self.gop, name, repr(self.lengths))


@dataclass(frozen=True)
class FakeDataset:
    name: str
    episodes: EpisodeTable
    bad: float
    slow: bool
    gop: int
    robot_type: str
    fingerprint: str
    rows_stamp: str = ""
    fps: float = 10.0
    frame_sizes: dict = dataclasses.field(default_factory=dict)
    cameras: tuple[str, ...] = ("eye",)
    state_names: tuple[str, ...] = ("episode", "frame")
    action_names: tuple[str, ...] = ("frame",)

    def get_shuffle_blocks(self):
        return whole_episodes(self.episodes.length)

    def keyframes(self, cache: Path) -> Keyframes | None:
        if not self.gop:
            return None
        frames = [np.arange(0, n, self.gop, dtype=np.int32) for n in self.episodes.length.tolist()]
        return Keyframes(np.cumsum([len(f) for f in frames]), np.concatenate(frames))

    def cursors(self, window: WindowSpec) -> FakeCursors:
        return FakeCursors(self, window)

    def columns(self, positions):
        for e in positions:
            frames = np.arange(self.episodes.length[e], dtype=np.float32)
            yield int(e), np.stack([np.full_like(frames, e), frames], axis=1), frames[:, None]

    def readable(self, episode: int, frame: int) -> bool:
        return float(rng.uniform(rng.key("bad", self.name, episode, frame))[0]) >= self.bad


@dataclass(frozen=True)
class FakeCursors:
    """Factory and cursor in one: there is no state."""

    source: FakeDataset
    window: WindowSpec

    def cursor(self) -> FakeCursors:
        return self

    def read(self, episode: int, frame: int, ahead: int = 0) -> RawWindow:
        source = self.source
        READS.append((source.name, episode, frame))
        if source.slow:
            time.sleep(random.SystemRandom().random() * 2e-3)
        if not source.readable(episode, frame):
            raise BadSample(source.name, int(source.episodes.episode_index[episode]), frame, "made unreadable")
        length = int(source.episodes.length[episode])
        steps = np.arange(frame, frame + self.window.chunk_length)
        actions = np.minimum(steps, length - 1)[:, None].astype(np.float32)
        state = np.array([episode, frame], np.float32)
        return RawWindow({"eye": picture(source.name, episode, frame)}, state, actions, steps >= length, ("go",))

    def close(self) -> None: ...


def picture(name: str, episode: int, frame: int) -> np.ndarray:
    """[1, 8, 8, 3] uint8: a hash of the window's address."""
    bits = rng.fold(rng.key("picture", name, episode, frame), np.arange(24))
    return bits.view(np.uint8).reshape(1, 8, 8, 3)


@functools.cache
def _base() -> Settings:
    overrides = ["+recipe=lerobot", "data.sources.main.root=/", "data.image_size=[8,8]", "data.chunk_length=3"]
    with hydra.initialize_config_module("opentau_train.conf", version_base="1.3"):
        return load_settings(composing.plain(hydra.compose("train", [settable(o) for o in overrides])))


def mixture_of(specs: dict[str, str], cache: Path, *, source: dict | None = None, **data) -> Mixture:
    """A mixture of fake datasets {name: `5,7,3`, the frames of each episode, with `;bad=0.2`, `;gop=3` and `;slow`
    where wanted}; `source` are settings of all of them, `data` of the mixture."""
    chosen = {"_target_": "tests.fake_source.FakeSource", "val_split_ratio": 0.0, **(source or {})}
    base = _base()
    sources = {n: build(SourceSettings, {**chosen, **options_of(spec)}, n) for n, spec in specs.items()}
    settings = dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, sources=sources, **data),
        paths=dataclasses.replace(base.paths, cache_dir=str(cache)),
    )
    return open_mixture(settings)


def options_of(spec: str) -> dict:
    """A SPEC of `mixture_of` as options of `FakeSource`."""
    lengths, *words = spec.split(";")
    bad = [float(word.removeprefix("bad=")) for word in words if word.startswith("bad=")]
    gop = [int(word.removeprefix("gop=")) for word in words if word.startswith("gop=")]
    return {"lengths": [int(n) for n in lengths.split(",")], "slow": "slow" in words, "bad": sum(bad), "gop": sum(gop)}


def with_data(mixture: Mixture, **data) -> Mixture:
    """The same mixture with other settings of the loader."""
    return dataclasses.replace(mixture, settings=dataclasses.replace(mixture.settings, **data))


def addresses(batch) -> np.ndarray:
    """[B, 4] i64: (dataset, pass, episode number, frame) of a batch's samples, in order."""
    columns = (batch.dataset_index, batch.pass_index, batch.episode_index, batch.frame_index)
    return torch.stack(columns, dim=1).numpy()


def global_batches(
    mixture: Mixture, tape, quarantine: Path, *, size: int, first: int, last: int
) -> Iterator[list[RankBatch]]:
    """Every rank's part of each step, as `size` ranks would get them."""
    ranks = [
        training_batches(mixture, tape, rank=r, size=size, first_step=first, last_step=last, quarantine=quarantine)
        for r in range(size)
    ]
    yield from zip(*ranks, strict=True)


def in_order(parts: list[RankBatch], tape, step: int, values) -> list:
    """One list of the parts' samples in the order of the global batch; `values(batch)` gives a row a sample."""
    queues = [iter(values(part.batch)) for part in parts]
    out = [next(queues[t % len(parts)]) for t in range(tape.first_sample(step), tape.first_sample(step + 1))]
    assert all(next(q, None) is None for q in queues)
    return out
