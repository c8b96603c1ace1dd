"""The gradients of parts of episodes at a checkpoint, sketched: of training and held-out episodes of each dataset."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from opentau_train import rng
from opentau_train.data.batch import Batch, stack
from opentau_train.data.fields import Sample
from opentau_train.data.load.samples import SampleBuilder
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.order.blocks import DatasetBlocks
from opentau_train.errors import BadSample
from opentau_train.models.draws import Draws
from opentau_train.models.policy import Policy
from opentau_train.tools.curating.sketch import Sketch
from opentau_train.types import Address

log = logging.getLogger(__name__)

NUM_PARTS = 4
"""Parts of an episode, whose spread tells the error of their mean."""


@dataclass(frozen=True)
class Gradients:
    """N parts of episodes as columns: `dataset` [N] i64 (its place in the mixture), `episode` [N] i64 (its number),
    `group` [N] i64, `held_out` [N] bool, `loss` [N] f64, the mean over the part's windows, and the sketch of its
    gradient `vector` [N, m] f32."""

    dataset: NDArray[np.int64]
    episode: NDArray[np.int64]
    group: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    loss: NDArray[np.float64]
    vector: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.loss)


def together(parts: Sequence[Gradients]) -> Gradients:
    """The same windows at several checkpoints as one: inner products add up (TracInCP), each checkpoint's in units of
    its own mean square, since early gradients are the largest. Losses are the last one's."""
    scales = [np.sqrt(np.square(part.vector).sum(1).mean()) or 1.0 for part in parts]
    vectors = [part.vector / scale for part, scale in zip(parts, scales, strict=True)]
    return replace(parts[-1], vector=np.concatenate(vectors, axis=1))


def choose(blocks: DatasetBlocks, num_episodes: int, num_windows: int, key: int) -> list[tuple[int, list[int]]]:
    """[(the episode's position, its frames)]: up to `num_episodes` that `key` draws, in order, and of each up to
    `num_windows` of its windows, evenly spaced."""
    positions = np.unique(blocks.episode)
    drawn = positions[np.argsort(rng.fold(key, positions), kind="stable")[:num_episodes]]
    chosen = []
    for position in np.sort(drawn).tolist():
        own = np.flatnonzero(blocks.episode == position)
        own = own[np.argsort(blocks.start[own], kind="stable")]
        ends = np.cumsum(blocks.length[own], dtype=np.int64)
        num = min(num_windows, int(ends[-1]))
        places = (np.arange(num) * 2 + 1) * int(ends[-1]) // (2 * num)
        block = np.searchsorted(ends, places, side="right")
        frames = blocks.frames(own[block], places - (ends - blocks.length[own])[block])
        chosen.append((position, frames.tolist()))
    return chosen


def parts_of(mixture: Mixture, num_episodes: int, num_windows: int) -> Iterator[tuple[list[Address], bool]]:
    """(windows of one episode, whether they are held out) of each dataset, training episodes first. Of an episode come
    up to `NUM_PARTS` parts, each spread over the whole of it."""
    for dataset in mixture.datasets:
        for held_out, blocks in ((False, dataset.train), (True, dataset.validation)):
            key = rng.key(mixture.seed, "curate", dataset.name, int(held_out))
            for position, frames in choose(blocks, num_episodes, num_windows, key):
                windows = [Address(dataset.index, position, frame, 0) for frame in frames]
                yield from ((windows[i::NUM_PARTS], held_out) for i in range(min(NUM_PARTS, len(windows))))


def measure(
    policy: Policy, mixture: Mixture, parts: Sequence[tuple[list[Address], bool]], sketch: Sketch, draws: int
) -> Gradients:
    """The gradients of these parts of episodes, one by one, with the weights as they are; of each window the mean over
    `draws` draws of noise. Windows that can't be read are left out, and told; parts that no loss term supervises are
    left out, too."""
    policy.eval()
    device = next(policy.parameters()).device
    rows: list[tuple[int, int, int, bool, float, torch.Tensor]] = []
    with closing(SampleBuilder(mixture, training=False)) as builder:
        for windows, held_out in parts:
            samples = list(_readable(builder, windows))
            if not samples:
                continue
            every = torch.arange(len(samples)).repeat(draws)
            batch = stack(samples, mixture.spec).rows(every).to(device)
            policy.zero_grad(set_to_none=True)
            loss = _loss(policy, batch)
            if loss is None:
                continue
            loss.backward()
            of = int(batch.episode_index[0]), int(batch.group[0])
            rows.append((windows[0].dataset, *of, held_out, loss.item(), sketch.of_gradient()))
    policy.zero_grad(set_to_none=True)
    columns = list(zip(*rows, strict=True)) or [()] * 6
    vector = torch.stack(columns[5]).numpy() if rows else np.zeros((0, sketch.num_buckets), np.float32)
    dataset, episode, group = (np.array(column, np.int64) for column in columns[:3])
    return Gradients(dataset, episode, group, np.array(columns[3], bool), np.array(columns[4], np.float64), vector)


def _readable(builder: SampleBuilder, windows: Sequence[Address]) -> Iterator[Sample]:
    """The samples of those windows that can be read."""
    for address in windows:
        try:
            yield builder.build(0, address)
        except BadSample as error:
            log.warning("left out: %s", error)


def _loss(policy: Policy, batch: Batch) -> torch.Tensor | None:
    """What training minimises, of these samples: its terms' means, weighted. None where nothing supervises them. Each
    row has draws of its own, so that a sample may stand in several."""
    keys = rng.fold(rng.key("curate"), batch.key.cpu().numpy(), np.arange(len(batch))).view(np.int64)
    terms = policy(batch, Draws(torch.from_numpy(keys).to(batch.key.device)))
    parts = [policy.loss_weights[k] * total.sum() / count.sum() for k, (total, count) in terms.items() if count.any()]
    return sum(parts[1:], parts[0]) if parts else None
