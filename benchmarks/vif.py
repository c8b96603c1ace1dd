"""Measure the shuffle's variance inflation on a trained policy, and the correlation that predicts it.

    python benchmarks/vif.py [RUN] [--batches 8] [--episodes 24] [--frames 24]

Takes each sample's own gradient (`torch.func`) and keeps a random sketch of it that preserves inner products. Stretches
of consecutive windows tell how alike two windows d frames apart are; batches of the tape tell their inflation directly.
Without RUN, a short run on the built-in DROID sample is trained first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.func import functional_call, grad

from opentau_train import cli, rng
from opentau_train.checkpoints.pretrained import load_policy
from opentau_train.config.bounds import at_least
from opentau_train.config.data import CorrelationSettings
from opentau_train.config.settings import load_settings
from opentau_train.data.batch import Batch
from opentau_train.data.load.stream import ShardDataset
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.mixture.open import open_mixture
from opentau_train.data.mixture.table import align
from opentau_train.data.order.quality import ShuffleQuality
from opentau_train.data.order.windows import Windows, frames_ahead
from opentau_train.errors import EXIT_OK, UserError
from opentau_train.models.draws import Draws
from opentau_train.models.policy import Policy

SKETCH = 4096
"""Numbers kept of a gradient: an inner product of two is off by about 1.6 % of the product of their lengths."""

F64 = NDArray[np.float64]


class Sketcher:
    """Gradients of single samples, sketched: each parameter is added with a random sign to one of `dims` random places
    (count sketch, Charikar et al. 2002; inner products are kept without bias). A sample's loss is what the optimizer
    would see of it: each term's sum over `counts` {term: mean count a sample}, weighted."""

    def __init__(self, policy: Policy, counts: dict[str, float], dims: int = SKETCH):
        self.policy, self.counts, self.dims = policy, counts, dims
        self.parameters = {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}
        bits = rng.fold(rng.key("sketch"), np.arange(sum(p.numel() for p in self.parameters.values())))
        self.place = torch.from_numpy((bits >> np.uint64(1)).astype(np.int64) % dims)
        self.sign = torch.from_numpy((bits & np.uint64(1)).astype(np.float32) * 2 - 1)
        self._grad = grad(self._loss)

    def __call__(self, batch: Batch) -> F64:
        """[B, dims]: the sketches of the samples of `batch`."""
        return np.stack([self._one(single) for single in batch.split(1)])

    def _one(self, single: Batch) -> F64:
        found = self._grad(self.parameters, single)
        flat = torch.cat([found[name].flatten() for name in self.parameters])
        return torch.zeros(self.dims).index_add_(0, self.place, self.sign * flat).numpy().astype(np.float64)

    def _loss(self, parameters: dict[str, torch.Tensor], single: Batch) -> torch.Tensor:
        terms = functional_call(self.policy, parameters, (single, Draws(single.key)))
        weights = self.policy.loss_weights
        parts = [weights[k] * terms[k][0].sum() / self.counts[k] for k in weights if self.counts[k] > 0]
        return torch.stack(parts).sum()


def mean_counts(policy: Policy, batches: Sequence[Batch]) -> dict[str, float]:
    """{term: mean count of its loss elements a sample}."""
    found = [policy.term_counts(batch) for batch in batches]
    return {k: float(torch.cat([torch.as_tensor(c[k]) for c in found]).double().mean()) for k in policy.loss_weights}


def inflation(sketches: F64) -> float:
    """The VIF of batches whose samples' gradients are `sketches` [N, B, dims]: B times the variance of the batch mean
    over that of a sample."""
    num, size, _ = sketches.shape
    means = sketches.mean(1)
    between = np.square(means - means.mean(0)).sum() / (num - 1)
    within = np.square(sketches - sketches.mean((0, 1))).sum() / (num * size - 1)
    return float(size * between / within)


def correlation_by_distance(sketches: F64) -> tuple[F64, NDArray[np.int64]]:
    """([L], [L]): the correlation of two windows 0 .. L-1 frames apart and the pairs it was taken over, from stretches
    of consecutive windows [N, L, dims], each of another episode. The place 0 is 1 by definition."""
    num, length, _ = sketches.shape
    centred = sketches - sketches.mean((0, 1))
    variance = np.square(centred).sum(-1).mean()
    products = np.einsum("nid,njd->nij", centred, centred) / variance
    # The mean is these samples' own, so that pairs of different episodes come out a little below 0: count from there.
    everything = np.square(centred.sum((0, 1))).sum() / variance
    others = (everything - products.sum()) / (num * (num - 1) * length**2)
    diagonals = [np.concatenate([np.diagonal(p, d) for p in products]) for d in range(length)]
    found = np.array([(d.mean() - others) / (1 - others) for d in diagonals])
    return found, np.array([len(d) for d in diagonals])


def fit(correlation: F64, pairs: NDArray[np.int64]) -> CorrelationSettings:
    """`episode + neighbours exp(-d / frames)` through the correlations at d = 1 .. L-1: least squares weighted by the
    number of pairs, both parts at least 0, over a grid of `frames`."""
    distance, rho, weight = np.arange(1, len(pairs)), correlation[1:], np.sqrt(pairs[1:])
    best: tuple[float, CorrelationSettings] | None = None
    for frames in np.geomspace(1.0, 2.0 * len(pairs), 64):
        near = np.exp(-distance / frames)
        for columns in ((np.ones_like(near), near), (np.ones_like(near), 0 * near), (0 * near, near)):
            matrix = np.stack(columns, 1)
            found = np.linalg.lstsq(matrix * weight[:, None], rho * weight, rcond=None)[0]
            error = float(np.square((matrix @ found - rho) * weight).sum())
            if (found >= 0).all() and found.sum() < 1 and (best is None or error < best[0]):
                episode, neighbours = (round(float(f), 4) for f in found)
                best = error, CorrelationSettings(episode, neighbours, round(float(frames), 2))
    return best[1] if best is not None else CorrelationSettings(0.0, 0.0, 1.0)


# -- on a run --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """`vif` of the tape's batches, `correlation` [L] by frames apart and `pairs` [L] it was taken over, the `fit`."""

    vif: float
    correlation: F64
    pairs: NDArray[np.int64]
    fit: CorrelationSettings


def stretches(mixture: Mixture, num: int, length: int) -> Iterator[Windows]:
    """`length` consecutive windows each of `num` episodes, drawn by hash over the mixture's training blocks."""
    rows = [(d.index, b) for d in mixture.datasets for b in np.flatnonzero(d.train.length >= length).tolist()]
    order = np.argsort(rng.fold(rng.key(mixture.seed, "vif"), np.arange(len(rows))))
    seen: set[tuple[int, int]] = set()
    for place in order.tolist():
        dataset, block = rows[place]
        blocks = mixture.datasets[dataset].train
        episode = dataset, int(blocks.episode[block])
        if len(seen) < num and episode not in seen:
            seen.add(episode)
            inside = (int(blocks.length[block]) - length) // 2 + np.arange(length)
            frame = blocks.frames(np.full(length, block), inside)
            zeros = np.zeros(length, np.int64)
            ahead = frames_ahead(zeros, zeros, frame)
            yield Windows(np.arange(length), zeros, zeros + dataset, zeros, zeros + episode[1], frame, ahead)


def measure(policy: Policy, mixture: Mixture, batch_size: int, *, batches: int, episodes: int, frames: int) -> Measured:
    """Measure over `batches` batches of the tape, spread over its first epoch, and `episodes` stretches of `frames`.

    Raises `UserError` where fewer than two episodes have such a stretch, or a window can't be read.
    """
    tape = mixture.tape(batch_size)
    steps = np.linspace(0, max(tape.epoch_size // batch_size - 1, batches - 1), batches).astype(int)
    lengths = [int(d.train.length.max(initial=0)) for d in mixture.datasets]
    runs = list(stretches(mixture, episodes, frames))
    if len(runs) < 2:
        raise UserError(
            f"fewer than 2 episodes have {frames} consecutive windows to train on",
            where="--frames",
            remedy=f"ask for fewer: the longest run has {max(lengths)}",
        )
    plan = [*(tape.batch(int(step)) for step in steps), *runs]
    shards = ShardDataset(mixture, lambda worker, width: iter(plan), train=True)
    built: list[Batch] = []
    for shard in shards:
        if shard.error is not None:
            raise shard.error
        assert shard.batch is not None, "a shard of a plan without empty steps has a batch or an error"
        built.append(shard.batch)
    sketch = Sketcher(policy, mean_counts(policy, built[:batches]))
    found = [sketch(batch) for batch in built]
    correlation, pairs = correlation_by_distance(np.stack(found[batches:]))
    return Measured(inflation(np.stack(found[:batches])), correlation, pairs, fit(correlation, pairs))


def describe(found: Measured, mixture: Mixture, batch_size: int) -> str:
    tape = mixture.tape(batch_size)
    rows: list[tuple[str, ...]] = [("frames apart", "correlation", "fitted")]
    distances = [d for d in (1, 2, 4, 8, 16, 32, 64, 128) if d < len(found.correlation)]
    for d in distances:
        fitted = found.fit.episode + found.fit.neighbours * np.exp(-d / found.fit.frames)
        rows.append((str(d), f"{found.correlation[d]:.3f}", f"{fitted:.3f}"))
    shuffle = ShuffleQuality(tape, found.fit)
    step = max(1, tape.epoch_size // batch_size // 2)
    return "\n".join(
        [
            *align(rows),
            f"VIF of the tape's batches: measured {found.vif:.2f}, predicted {shuffle.of_batch(tape.batch(step)):.2f}; "
            f"predicted over a momentum of 0.9: {shuffle.of_momentum(step):.2f}",
            f"data.correlation={{episode:{found.fit.episode:g},neighbours:{found.fit.neighbours:g},"
            f"frames:{found.fit.frames:g}}}",
        ]
    )


def trained(folder: Path) -> Path:
    """A run of 20 steps on the built-in sample."""
    overrides = ["trainer.steps=20", "data.image_size=[32,32]", "validation.every=0", "data.num_workers=0"]
    program = [sys.executable, "-m", "opentau_train", "+recipe=droid_policy", *overrides]
    subprocess.run([*program, f"paths.run_dir={folder / 'run'}"], check=True)
    return folder / "run"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure on the run that `arguments` name, or on one of its own, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="a run, or one of its checkpoints")
    parser.add_argument("--batches", type=int, default=8, help="batches of the tape to measure (8)")
    parser.add_argument("--episodes", type=int, default=24, help="stretches of consecutive windows (24)")
    parser.add_argument("--frames", type=int, default=24, help="windows of a stretch (24)")
    options = parser.parse_args(arguments)

    def work() -> int:
        for name, least in (("batches", 2), ("episodes", 2), ("frames", 2)):
            at_least(f"--{name}", getattr(options, name), least)
        with tempfile.TemporaryDirectory() as folder:
            loaded = load_policy(options.run or trained(Path(folder)))
        settings, policy, stats = load_settings(loaded.meta["config"]), loaded.policy, loaded.stats
        sizes = {"batches": options.batches, "episodes": options.episodes, "frames": options.frames}
        mixture = open_mixture(settings, stats).for_policy(policy.wants())
        batch_size = settings.trainer.global_batch_size
        print(describe(measure(policy, mixture, batch_size, **sizes), mixture, batch_size))
        return EXIT_OK

    return cli.answer(work)


if __name__ == "__main__":
    sys.exit(main())
