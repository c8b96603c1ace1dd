"""What the order of the windows does to training: the same data, policy, budget and seeds, four orders.

    python benchmarks/shuffle_stability.py [--steps 240] [--seeds 3] [--png docs/images/shuffle_stability.png]

- in order: the datasets' windows one after the other (`iterable_shuffle=false`);
- episode streams: the usual iterable loader: 2 ranks x 2 workers, each with its own shuffled episodes, one open at a
  time; a rank's batch of 16 comes from one worker, so a global batch of 32 is 2 stretches of consecutive windows;
- lanes: the program's own tape, as the recipe sets it;
- random: every window once a pass, uniformly.

The windows are those of the built-in DROID sample (joint and ee control), 32x32 pictures, decoded once beforehand;
steps are the program's own `train_step` on a small `FlowPolicy`. What each order would decode is counted by the real
readers over the same windows. The measured inflation comes from sketched gradients of single samples (vif.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import time
from pathlib import Path

import numpy as np
import torch
import vif
from support.orders import BATCH, NAMES, Order, all_windows, make_order
from support.program import machine, settings_of

from opentau_train import rng
from opentau_train.config.settings import Settings
from opentau_train.data.batch import Batch, stack
from opentau_train.data.load.samples import SampleBuilder
from opentau_train.data.mixture.mixture import Mixture
from opentau_train.data.mixture.open import open_mixture
from opentau_train.data.order import quality
from opentau_train.data.order.windows import Windows
from opentau_train.distributed.parallel import Replicas
from opentau_train.distributed.world import World, launch
from opentau_train.models.draws import Draws
from opentau_train.models.flow import FlowPolicy
from opentau_train.optim import Cosine, build_optimizer
from opentau_train.step import StepSetup, TrainState, train_step
from opentau_train.types import Address, BatchSpec, WindowSpec
from opentau_train.validation.plan import validation_windows

ARGUMENTS = [
    "+recipe=droid_policy",
    "data.image_size=[32,32]",
    f"trainer.global_batch_size={BATCH}",
    "data.num_workers=0",
]
MEASURED_BATCHES = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    started, before = time.perf_counter(), machine()
    settings = settings_of(ARGUMENTS)
    with launch(device="cpu", precision="no", timeout=60.0, identity={}) as world:
        mixture = open_mixture(settings)
        mixture = mixture.for_policy(make_policy(mixture.spec).wants())
        data = Decoded(mixture)
        runs: dict[str, list[Run]] = {name: [] for name in NAMES}
        for seed in range(options.seeds):
            for name in NAMES:
                order = make_order(name, dataclasses.replace(mixture, seed=seed), seed)
                runs[name].append(train(data, order, settings, world, seed, options.steps))
        policy = runs["random"][0].policy
        print(
            f"{before}; {options.steps} steps of {BATCH}, {options.seeds} seeds, "
            f"{len(data.held_out)} held-out windows\n"
        )
        rows = {name: describe(name, mixture, data, runs, policy, options.steps) for name in NAMES}
        print_tables(rows)
    if options.png is not None:
        draw(runs, options.png)
    print(f"\n{time.perf_counter() - started:.0f} s in all")


# -- the data --------------------------------------------------------------------------------------------------------


class Decoded:
    """Every window of the mixture as one batch in memory."""

    def __init__(self, mixture: Mixture):
        self.mixture = mixture
        held_out = validation_windows(
            [d.validation for d in mixture.datasets], [d.group_of for d in mixture.datasets], 192
        )
        rows = np.concatenate([all_windows(mixture), np.stack(held_out, axis=1)])
        builder = SampleBuilder(mixture, training=False)
        self.every = stack([builder.build(0, Address(*map(int, row), 0)) for row in rows], mixture.spec)
        builder.close()
        self.held_out = np.arange(len(rows) - len(held_out[0]), len(rows))
        self.place = {tuple(row): i for i, row in enumerate(rows.tolist())}
        self.keys = [rng.key(mixture.seed, "sample", d.name) for d in mixture.datasets]

    def batch(self, windows: Windows) -> Batch:
        """The samples of `windows`, with the noise of their pass."""
        columns = [c.tolist() for c in (windows.dataset, windows.episode, windows.frame, windows.pass_index)]
        index = [self.place[row[:3]] for row in zip(*columns, strict=True)]
        keys = [rng.fold_one(self.keys[d], e, f, p) for d, e, f, p in zip(*columns, strict=True)]
        key = torch.from_numpy(np.array(keys, np.uint64).view(np.int64))
        return self.at(index).replace(key=key)

    def at(self, index: list[int]) -> Batch:
        return self.every.rows(torch.tensor(index))


# -- a run -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """`grad_norm` [steps] before clipping; the loss on the held-out windows after the last step."""

    grad_norm: np.ndarray
    held_out: float
    policy: FlowPolicy


def make_policy(spec: BatchSpec) -> FlowPolicy:
    return FlowPolicy(spec, width=64, depth=2, heads=4, patch_size=8, max_prompt_bytes=16)


def train(data: Decoded, order: Order, settings: Settings, world: World, seed: int, steps: int) -> Run:
    torch.manual_seed(rng.key(seed, "init") >> 1)
    policy = make_policy(data.mixture.spec)
    optimizer = build_optimizer(policy, dataclasses.replace(settings.optimizer, lr=1e-3))
    state = TrainState(policy, Replicas(policy, sharded=False), optimizer, None)
    schedule, norms = Cosine(warmup_steps=10, final_ratio=0.1), []
    setup = StepSetup(world, BATCH, settings.trainer.grad_clip, seed)
    for step in range(steps):
        batch = data.batch(order(step))
        counts = {term: float(count.double().sum()) for term, count in policy.term_counts(batch).items()}
        norms.append(float(train_step(state, batch, counts, 1e-3 * schedule(step, steps), setup).grad_norm))
    return Run(np.array(norms), held_out_loss(policy, data), policy)


@torch.no_grad()
def held_out_loss(policy: FlowPolicy, data: Decoded, draws: int = 4) -> float:
    sums = dict.fromkeys(policy.loss_weights, 0.0)
    counts = dict.fromkeys(policy.loss_weights, 0.0)
    for batch in data.at(data.held_out.tolist()).split(64):
        for draw in range(draws):
            for k, (total, count) in policy(batch, Draws(batch.key, draw)).items():
                sums[k] += float(total.double().sum())
                counts[k] += float(count.double().sum())
    return sum(w * sums[k] / counts[k] for k, w in policy.loss_weights.items())


# -- what is reported ------------------------------------------------------------------------------------------------


def describe(
    name: str, mixture: Mixture, data: Decoded, runs: dict[str, list[Run]], policy: FlowPolicy, steps: int
) -> dict[str, str]:
    order = make_order(name, mixture, 0)
    rho, rho_0 = mixture.settings.correlation, quality.background(mixture.tape(BATCH), mixture.settings.correlation)
    chosen = np.linspace(0, steps - 1, 24).astype(int).tolist()
    batches = [order(step) for step in chosen]
    tails = np.stack([run.grad_norm[steps // 4 :] for run in runs[name]])
    jumps = np.abs(np.diff(np.log(tails), axis=1))
    loss = np.array([run.held_out for run in runs[name]])
    random = np.array([run.held_out for run in runs["random"]])
    frames, seconds, pixels = decoding(mixture, order, steps)
    used = steps * BATCH * len(mixture.spec.cameras)
    return {
        "order": name,
        "held-out loss": f"{loss.mean():.4f} ± {loss.std(ddof=1) if len(loss) > 1 else 0:.4f}",
        "against random": f"{np.mean(loss / random) - 1:+.1%}",
        "gradient norm, mean": f"{tails.mean():.2f}",
        "its variance": f"{tails.var(axis=1).mean():.3f}",
        "its relative deviation": f"{np.mean(tails.std(1) / tails.mean(1)):.2f}",
        "median step-to-step change": f"{np.exp(np.median(jumps)) - 1:.0%}",
        "distinct episodes": f"{np.mean([quality.distinct_episodes(b) for b in batches]):.1f}",
        "VIF predicted": f"{np.mean([quality.inflation(b, rho, background=rho_0) for b in batches]):.2f}",
        "VIF measured": f"{measured_inflation(data, order, policy, steps):.2f}",
        "VIF over momentum": f"{np.mean([momentum(order, s, rho, rho_0) for s in chosen[8:]]):.2f}",
        "frames decoded": f"{frames}",
        "a frame used": f"{frames / used:.2f}",
        "MB decoded": f"{pixels / 2**20:.0f}",
        "CPU s": f"{seconds:.1f}",
    }


def momentum(order: Order, step: int, rho, rho_0: float, horizon: int = 44) -> float:
    steps = range(max(0, step + 1 - horizon), step + 1)
    parts = [order(s) for s in steps]
    columns = [name for name in Windows.__dataclass_fields__ if getattr(parts[0], name) is not None]
    joined = Windows(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in columns})
    weight = np.repeat(quality.MOMENTUM ** (step - np.array(steps, np.float64)), BATCH)
    return quality.inflation(joined, rho, weight, rho_0)


def measured_inflation(data: Decoded, order: Order, policy: FlowPolicy, steps: int) -> float:
    """The same policy for all orders: that of the random one, seed 0, after its last step."""
    chosen = np.linspace(0, steps - 1, MEASURED_BATCHES).astype(int).tolist()
    batches = [data.batch(order(step)) for step in chosen]
    sketch = vif.Sketcher(policy, vif.mean_counts(policy, batches))
    return vif.inflation(np.stack([sketch(batch) for batch in batches]))


def decoding(mixture: Mixture, order: Order, steps: int) -> tuple[int, float, int]:
    """(frames decoded, CPU seconds, bytes of decoded pictures) when the real readers read the order's windows."""
    window = WindowSpec(mixture.datasets[0].chunk_length, image_size=mixture.spec.image_size)
    factories = [d.source.cursors(window) for d in mixture.datasets]
    readers, started = {}, time.process_time()
    for step in range(steps):
        windows = order(step)
        columns = windows.slot, windows.dataset, windows.episode, windows.frame, windows.ahead
        for slot, d, e, f, ahead in zip(*(c.tolist() for c in columns)):
            held = readers.get(slot)
            if held is None or held[0] != d:
                if held is not None:
                    held[1].close()
                held = readers[slot] = d, factories[d].cursor()
            held[1].read(e, f, ahead)
    seconds, frames = time.process_time() - started, [f.frames_decoded for f in factories]
    sizes = [next(iter(d.source.frame_sizes.values())) for d in mixture.datasets]
    for factory in factories:
        factory.close()
    return sum(frames), seconds, sum(n * h * w * 3 // 2 for n, (h, w) in zip(frames, sizes, strict=True))


def print_tables(rows: dict[str, dict[str, str]]) -> None:
    keys = list(next(iter(rows.values())))
    for part in (keys[:7], ["order", *keys[7:]]):
        print(f"| {' | '.join(part)} |\n|{'---|' * len(part)}")
        for row in rows.values():
            print(f"| {' | '.join(row[k] for k in part)} |")
        print()


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=[3, 1])
    colours = dict(zip(NAMES, ("tab:red", "tab:orange", "tab:blue", "tab:gray"), strict=True))
    for name in NAMES:
        norms = np.stack([run.grad_norm for run in runs[name]])
        left.plot(norms[0], color=colours[name], lw=1.0, label=name, alpha=0.9)
        for other in norms[1:]:
            left.plot(other, color=colours[name], lw=0.5, alpha=0.35)
    left.set(xlabel="step", ylabel="gradient norm before clipping", yscale="log")
    left.legend(frameon=False, ncols=2)
    for place, name in enumerate(NAMES):
        loss = [run.held_out for run in runs[name]]
        right.plot([place] * len(loss), loss, "o", color=colours[name], ms=5)
    right.set(xticks=range(len(NAMES)), ylabel="held-out loss")
    right.set_xticklabels(NAMES, rotation=30, ha="right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
